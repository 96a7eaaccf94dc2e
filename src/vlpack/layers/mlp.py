"""Feed-forward layers: SwiGLU of the text decoders, and the two-layer MLP of the vision encoders."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops
from vlpack.layers.channels import RowChannels
from vlpack.layers.linear import Linear, Stored

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_new", "gelu", "quick_gelu", "silu")


def activation(op: OpBuilder, x: ir.Value, name: str) -> ir.Value:
    """An activation by its name in config.json (transformers' ``ACT2FN``)."""
    match name:
        case "gelu_pytorch_tanh" | "gelu_new":
            return op.Gelu(x, approximate="tanh")
        case "gelu":
            return op.Gelu(x, approximate="none")
        case "quick_gelu":
            return op.Mul(x, op.Sigmoid(op.Mul(x, 1.702)))
        case "silu":
            return op.Mul(x, op.Sigmoid(x))
        case _:
            raise AssertionError(f"activation {name}: the config's reader lets only {ACTIVATIONS} through")


class GatedMLP(nn.Module):
    """``down(act(gate(x)) · up(x))``: SwiGLU (Shazeer 2020, arXiv:2002.05202) where ``act`` is SiLU.

    Trained models have tokens whose product of gate and up, and what ``down`` makes of it, leave fp16's range ("massive
    activations", Sun et al. 2024, arXiv:2402.17762), so the product is fp32 and ``down`` is wide.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, bias: bool = False) -> None:
        super().__init__()
        # joined, they would be one product, and a copy to take it apart, which costs more than a second product
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, wide=True)
        self.hidden_act = hidden_act

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        gate, up = (ops.cast(op, half(op, x), ops.FLOAT) for half in (self.gate_proj, self.up_proj))
        return self.down_proj(op, op.Mul(activation(op, gate, self.hidden_act), up))

    @property
    def readers(self) -> list[Stored]:
        """What multiplies the module's input."""
        return [self.gate_proj, self.up_proj]

    def channels(self) -> list[RowChannels]:
        """See `vlpack.layers.channels`."""
        return [RowChannels(self.up_proj, 0, self.down_proj, (1, 1, self.up_proj.rows))]


class VisionMLP(nn.Module):
    """Two layers with biases and an activation between: the encoders' feed-forward modules and mergers.

    Args:
        hidden_size: of the input.
        intermediate_size: between the layers.
        hidden_act: the activation.
        out_size: of the output; the input's where None.
        names: of the two layers in the checkpoint.
        role: of the second layer's weight.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        out_size: int | None = None,
        names: tuple[str, str] = ("linear_fc1", "linear_fc2"),
        role: str = "linear",
    ) -> None:
        super().__init__()
        setattr(self, names[0], Linear(hidden_size, intermediate_size, bias=True))
        setattr(self, names[1], Linear(intermediate_size, out_size or hidden_size, bias=True, wide=True, role=role))
        self.hidden_act = hidden_act

    @property
    def readers(self) -> list[Stored]:
        """What multiplies the module's input."""
        first, _ = self.children()
        assert isinstance(first, Linear)
        return [first]

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        first, second = self.children()
        return second(op, activation(op, first(op, x), self.hidden_act))
