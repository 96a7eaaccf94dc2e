"""Feed-forward layers: the text decoders' SwiGLU and the vision encoders' two-layer MLP."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops
from vlpack.layers.channels import RowChannels
from vlpack.layers.linear import Linear, Stored

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_new", "gelu", "quick_gelu", "silu")


def activation(op: OpBuilder, x: ir.Value, name: str) -> ir.Value:
    """Apply an activation function, given by its name in config.json (transformers' ``ACT2FN``)."""
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
    """A gated feed-forward layer ``down(act(gate(x)) · up(x))``.

    With SiLU as ``act`` it is SwiGLU (Shazeer 2020, arXiv:2002.05202). In trained models, a few tokens' product of gate
    and up, and the output of ``down``, exceed fp16's range ("massive activations", Sun et al. 2024, arXiv:2402.17762),
    so the product is fp32 and ``down`` is ``fp16_safe``.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, bias: bool = False) -> None:
        super().__init__()
        # one joined matrix would need a copy to split its output, which costs more than a second product
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, fp16_safe=True)
        self.hidden_act = hidden_act

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        gate, up = (ops.cast(op, half(op, x), ops.FLOAT) for half in (self.gate_proj, self.up_proj))
        return self.down_proj(op, op.Mul(activation(op, gate, self.hidden_act), up))

    @property
    def readers(self) -> list[Stored]:
        """The matrices that multiply the module's input."""
        return [self.gate_proj, self.up_proj]

    def channels(self) -> list[RowChannels]:
        """The channels that can be rescaled within the weights (`vlpack.layers.channels`)."""
        return [RowChannels(self.up_proj, 0, self.down_proj, (1, 1, self.up_proj.rows))]


class VisionMLP(nn.Module):
    """Two linear layers with biases and an activation between them: the encoders' feed-forward modules and mergers.

    Args:
        hidden_size: width of the input.
        intermediate_size: width between the two layers.
        hidden_act: name of the activation.
        out_size: width of the output; the input's if None.
        names: names of the two layers in the checkpoint.
        role: role of the second layer's weight (`Stored`).
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
        setattr(
            self, names[1], Linear(intermediate_size, out_size or hidden_size, bias=True, fp16_safe=True, role=role)
        )
        self.hidden_act = hidden_act

    @property
    def readers(self) -> list[Stored]:
        """The matrices that multiply the module's input."""
        first, _ = self.children()
        assert isinstance(first, Linear)
        return [first]

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        first, second = self.children()
        return second(op, activation(op, first(op, x), self.hidden_act))
