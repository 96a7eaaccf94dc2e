"""The second stage of a 4-bit head: the likeliest tokens are scored again by rows of the head in 8 bits."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder

from vlpack.layers import ops
from vlpack.layers.linear import Table
from vlpack.layers.rotation import rotate

CANDIDATES = 128
"""Number of tokens that are scored again; docs/results.md has the accuracy and time of other numbers."""


NAME = "lm_head_candidates"
"""Name of the module with the 8-bit rows."""


class Candidates(Table):
    """The weight of a head ``[V, H]`` as a table, from which only the rows of the likeliest tokens are read.

    A head in 4 bits reads half the bytes of one in 8 bits, but its rounding changes the probabilities of the tokens
    that matter. With a few of the 8-bit rows, those tokens get the logits of an 8-bit head. The other tokens keep
    their 4-bit logits.

    Args:
        vocab_size: number V of tokens.
        hidden_size: width H of the hidden states.
        tied_to: name of the checkpoint's tensor that is the head's weight.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tied_to: str) -> None:
        super().__init__(vocab_size, hidden_size, name=NAME, role="candidates", tied_to=tied_to)

    def forward(self, op: OpBuilder, x: ir.Value, logits: ir.Value) -> ir.Value:
        """Replace the largest of ``logits [B, S, V]`` by exact products of ``x [B, S, H]``; both are fp32."""
        _, ids = op.TopK(logits, [min(CANDIDATES, self.rows)], axis=-1, sorted=0, _outputs=2)
        ids = ops.typed(ids, ops.INT64, ops.last_dim(logits, min(CANDIDATES, self.rows)))  # [B, S, k]
        column = op.Unsqueeze(rotate(op, x, self.rotation), [-1])  # [B, S, H, 1]
        scores = op.Squeeze(op.MatMul(self.stored_rows(op, ids), column), [-1])
        return ops.typed(op.ScatterElements(logits, ids, scores, axis=-1), ops.FLOAT, ops.shape_of(logits))
