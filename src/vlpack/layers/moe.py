"""Mixture of experts: a router sends every token through a few of many small feed-forward modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.checkpoint.rows import Alternating, Part, Rows, Source, Stacked, TransposedRows
from vlpack.layers import ops
from vlpack.layers.linear import Linear, Stored
from vlpack.layers.mlp import GatedMLP
from vlpack.layers.rotation import rotate

if TYPE_CHECKING:
    from vlpack.checkpoint.safetensors import TensorInfo


class Layout(Enum):
    """The layout of a checkpoint's E experts, each with ``2 · I`` rows of gate and up and H rows of down."""

    SEPARATE = "a matrix per expert"  # experts.{e}.gate_proj.weight [I, H], up_proj [I, H], down_proj [H, I]
    FUSED = "all experts in one tensor"  # experts.gate_up_proj [E, 2 · I, H], down_proj [E, H, I]
    TRANSPOSED = "all experts in one tensor, input first"  # experts.gate_up_proj [E, H, 2 · I], down_proj [E, I, H]


@dataclass(frozen=True)
class ExpertSizes:
    """The sizes of a mixture of experts, with Hugging Face's names."""

    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int


def layout_of(tensors: Mapping[str, TensorInfo], experts: str, sizes: ExpertSizes) -> Layout:
    """The layout of a checkpoint's experts, recognized by the tensors of one module ``…mlp.experts``."""
    down = tensors.get(f"{experts}.down_proj")
    if down is None:
        return Layout.SEPARATE
    up = tensors.get(f"{experts}.gate_up_proj")
    hidden, inner = sizes.hidden_size, sizes.moe_intermediate_size
    # one of the two may be square, which does not show the layout, but not both
    transposed = down.shape[1:] == (inner, hidden) and (up is None or up.shape[1:] == (hidden, 2 * inner))
    return Layout.TRANSPOSED if transposed else Layout.FUSED


class ExpertWeights(Stored):
    """The weights of all experts: ``[E, out, in]`` in the graph, ``[E · out, in]`` for storages.

    Args:
        sizes: sizes of the mixture.
        layout: layout of the experts in the checkpoint.
        names: ``("gate_proj", "up_proj")``, whose rows alternate, or ``("down_proj",)``.
    """

    def __init__(self, sizes: ExpertSizes, layout: Layout, names: tuple[str, ...]) -> None:
        # the input of the down projections stays inside onnxruntime's operator, where the graph cannot rotate it
        self.can_rotate = len(names) == 2
        hidden, inner = sizes.hidden_size, sizes.moe_intermediate_size
        self.experts, self.layout, self.names = sizes.num_experts, layout, names
        self.inner = inner
        self.out, self.width = (2 * inner, hidden) if len(names) == 2 else (hidden, inner)
        super().__init__(self.experts * self.out, self.width, role="expert")

    def declared_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        packed = shape[1] * shape[2] if name == "qweight" else shape[1]
        return (self.experts, self.out, packed)

    def source(self, path: str) -> Rows:
        return Stacked(tuple(self._expert(path, expert) for expert in range(self.experts)))

    def forward(self, op: OpBuilder) -> list[ir.Value]:
        return list(self.arrays.values())

    def _expert(self, path: str, expert: int) -> Rows:
        if self.layout is Layout.SEPARATE:
            parent, rows = path.rpartition(".")[0], self.out // len(self.names)
            parts: list[Rows] = [Source(f"{parent}.{expert}.{name}.weight", (rows, self.width)) for name in self.names]
        else:
            transposed = self.layout is Layout.TRANSPOSED
            shape = (self.experts, self.width, self.out) if transposed else (self.experts, self.out, self.width)
            whole: Rows = Part(Source(path, shape, leading=2), expert * shape[1], shape[1])
            whole = TransposedRows(whole) if transposed else whole
            rows = self.out // len(self.names)
            parts = [Part(whole, index * rows, rows) for index in range(len(self.names))]
        return Alternating(*parts) if len(parts) == 2 else parts[0]


class Experts(nn.Module):
    """The experts of one layer; its modules are named as in the checkpoint."""

    def __init__(self, sizes: ExpertSizes, layout: Layout) -> None:
        super().__init__()
        self.gate_up_proj = ExpertWeights(sizes, layout, ("gate_proj", "up_proj"))
        self.down_proj = ExpertWeights(sizes, layout, ("down_proj",))

    def forward(self, op: OpBuilder, x: ir.Value, logits: ir.Value, k: int, normalize: bool) -> ir.Value:
        gate_up, down = self.gate_up_proj(op), self.down_proj(op)
        x = ops.cast(op, x, ops.dtype_of(gate_up[min(1, len(gate_up) - 1)]))  # the scales' dtype, or the weights'
        x = rotate(op, x, self.gate_up_proj.rotation)
        storages = (self.gate_up_proj.storage, self.down_proj.storage)
        return ops.experts(op, x, logits, gate_up, down, storages, k, normalize)


class SparseMoe(nn.Module):
    """A mixture-of-experts layer: ``Σ share(e) · down_e(silu(gate_e(x)) · up_e(x))`` over a token's likeliest experts.

    The sum is over ``num_experts_per_tok`` experts of the token.

    Args:
        sizes: sizes of the mixture.
        layout: layout of the experts in the checkpoint.
        norm_topk_prob: whether the shares of the chosen experts sum to 1; otherwise they are the softmax over all
            experts.
        shared: width of an expert that all tokens go through in addition, times the sigmoid of a gate; 0 for none.

    Source: transformers' ``Qwen3MoeSparseMoeBlock`` and, with the shared expert, ``Qwen3_5MoeSparseMoeBlock``; Fedus et
    al. 2021 (arXiv:2101.03961).
    """

    def __init__(self, sizes: ExpertSizes, layout: Layout, norm_topk_prob: bool, shared: int = 0) -> None:
        super().__init__()
        self.gate = Linear(sizes.hidden_size, sizes.num_experts, role="router")
        self.experts = Experts(sizes, layout)
        self.k, self.normalize, self.num_experts = sizes.num_experts_per_tok, norm_topk_prob, sizes.num_experts
        self.shared_expert = GatedMLP(sizes.hidden_size, shared, "silu") if shared else None
        self.shared_expert_gate = Linear(sizes.hidden_size, 1, role="gate") if shared else None

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        logits = op.Reshape(self.gate(op, x), [-1, self.num_experts])  # [B · S, E]
        y = self.experts(op, x, logits, self.k, self.normalize)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return y
        share = op.Sigmoid(ops.cast(op, self.shared_expert_gate(op, x), ops.FLOAT))
        shared = op.Mul(ops.cast(op, self.shared_expert(op, x), ops.FLOAT), share)
        return op.Add(ops.cast(op, y, ops.FLOAT), shared)

    @property
    def readers(self) -> list[Stored]:
        """The matrices that multiply the module's input."""
        shared = [] if self.shared_expert is None else self.shared_expert.readers
        gate = [] if self.shared_expert_gate is None else [self.shared_expert_gate]
        return [self.gate, self.experts.gate_up_proj, *shared, *gate]
