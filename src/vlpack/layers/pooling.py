"""The decoder of embedding and reranker models: no cache and no words, one vector or score for a row of tokens.

Source: the recipes of Qwen3-Embedding (arXiv:2506.05176) and Qwen3-VL-Embedding (arXiv:2601.04720).
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.checkpoint.rows import Part, Rows, Source, stacked
from vlpack.layers import ops
from vlpack.layers.attention import MakeAttend, grouped_query
from vlpack.layers.decoder import RopeOf, TextModel
from vlpack.layers.deepstack import SideChannel
from vlpack.layers.linear import Embedding, Stored


class EmbeddingHead(nn.Module):
    """``x [B, H]`` → ``x / |x|``, fp32: what cosine similarity compares."""

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        # the floor is that of torch's normalize
        return op.Div(x, op.Max(op.ReduceL2(x, [-1], keepdims=1), ops.constant(op, 1e-12)))


class AnswerRows(Stored):
    """Two rows of the head's matrix, those of the tokens yes and no: ``x [B, H]`` → logits ``[B, 2]``."""

    can_rotate = False  # they are floats in every precision, which rotation does nothing for

    def __init__(self, table: str, vocab_size: int, hidden_size: int, answers: tuple[int, int]) -> None:
        super().__init__(2, hidden_size, role="answers")
        self.table, self.vocab_size, self.answers = table, vocab_size, answers

    def source(self, path: str) -> Rows:
        whole = Source(self.table, (self.vocab_size, self.cols))
        return stacked(Part(whole, token_id, 1) for token_id in self.answers)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.Gemm(x, self.arrays["weight"], transB=1)  # [B, 2]


class ScoreHead(nn.Module):
    """``x [B, H]`` → ``[B]``: the probability of the token yes where only yes and no can follow.

    That softmax over two logits is the sigmoid of their difference, so no other row of the head is needed.
    """

    def __init__(self, table: str, vocab_size: int, hidden_size: int, answers: tuple[int, int]) -> None:
        super().__init__()
        self.answers = AnswerRows(table, vocab_size, hidden_size, answers)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        yes, no = op.Split(self.answers(op, x), [1, 1], axis=1, _outputs=2)
        return op.Sigmoid(op.Squeeze(op.Sub(yes, no), [1]))


class PooledModel(nn.Module):
    """Embeddings (or, with ``embed_tokens``, token ids) to what ``head`` makes of each row's last valid token.

    ``forward(op, tokens, attention_mask)`` counts positions itself; where ``tokens`` are embeddings, ``position_ids``
    and DeepStack's channel follow. Rows are padded on the right: causal attention never looks there.
    """

    def __init__(
        self,
        model: TextModel,
        head: nn.Module,
        rope_of: RopeOf,
        cache: tuple[int, int],
        dtype: ir.DataType,
        deepstack: SideChannel | None = None,
        embed_tokens: Embedding | None = None,
        make_attend: MakeAttend = grouped_query,
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.embed_tokens = embed_tokens
        self.make_attend = make_attend
        self.rope_of, self.cache, self.dtype, self.deepstack = rope_of, cache, dtype, deepstack

    def forward(self, op: OpBuilder, tokens: ir.Value, attention_mask: ir.Value, *rest: ir.Value) -> list[ir.Value]:
        if self.embed_tokens is None:
            x, position_ids, levels = tokens, rest[0], []
            if self.deepstack is not None and self.deepstack.levels:
                levels = self.deepstack.levels_of(op, rest[1])
        else:
            x, position_ids, levels = self.embed_tokens(op, tokens), _count(op, tokens), []
        attend = self.make_attend(op, attention_mask, position_ids, self.rope_of(op, position_ids))
        past = (self._empty_cache(op, attention_mask),) * (2 * len(self.model.layers))
        last = op.Unsqueeze(op.Sub(op.ReduceSum(attention_mask, [1], keepdims=1), 1), [2])  # [B, 1, 1]
        x, _ = self.model(op, x, attend, past, levels, lambda op, y: op.GatherND(y, last, batch_dims=1))
        return [self.head(op, op.Squeeze(x, [1]))]

    def _empty_cache(self, op: OpBuilder, attention_mask: ir.Value) -> ir.Value:
        """Keys or values of no tokens, ``[B, kv_heads, 0, D]``: the attention operator wants some."""
        heads, size = self.cache
        shape = op.Concat(op.Shape(attention_mask, start=0, end=1), [heads, 0, size], axis=0)
        empty = op.ConstantOfShape(shape, value=ir.tensor([0.0], dtype=self.dtype))
        return ops.typed(empty, self.dtype, ["batch_size", heads, 0, size])


def _count(op: OpBuilder, input_ids: ir.Value) -> ir.Value:
    """Positions 0, 1, 2 … of text, int64 ``[B, S]``; M-RoPE's three axes are equal there, and one stands for all."""
    shape = op.Shape(input_ids)
    length = op.Squeeze(op.Shape(input_ids, start=1, end=2))
    return ops.typed(op.Expand(op.Range(0, length, 1), shape), ops.INT64, ops.shape_of(input_ids))
