"""The decoder of embedding models and rerankers: one vector or score for each row of tokens, without a cache.

Source: the recipes of Qwen3-Embedding (arXiv:2506.05176) and Qwen3-VL-Embedding (arXiv:2601.04720).
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.checkpoint.rows import Part, Rows, Source, stacked
from vlpack.layers import ops
from vlpack.layers.attention import MakeBackend, grouped_query
from vlpack.layers.decoder import MakeRope, TextModel
from vlpack.layers.deepstack import SideChannel
from vlpack.layers.linear import Embedding, Stored


class EmbeddingHead(nn.Module):
    """An embedding model's head, ``x [B, H]`` → ``x / |x|`` in fp32: unit vectors for cosine similarity."""

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        # the floor is that of torch's normalize
        return op.Div(x, op.Max(op.ReduceL2(x, [-1], keepdims=1), ops.constant(op, 1e-12)))


class YesNoRows(Stored):
    """The two rows of the head's matrix for the tokens yes and no: ``x [B, H]`` → logits ``[B, 2]``.

    The role ``answers``, and the name ``answers`` of the module within `ScoreHead`, are part of the package format.
    """

    can_rotate = False  # the rows are floats in every precision, and rotation improves only quantized weights

    def __init__(self, table: str, vocab_size: int, hidden_size: int, yes_no_ids: tuple[int, int]) -> None:
        super().__init__(2, hidden_size, role="answers")
        self.table, self.vocab_size, self.yes_no_ids = table, vocab_size, yes_no_ids

    def source(self, path: str) -> Rows:
        whole = Source(self.table, (self.vocab_size, self.cols))
        return stacked(Part(whole, token_id, 1) for token_id in self.yes_no_ids)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.Gemm(x, self.arrays["weight"], transB=1)  # [B, 2]


class ScoreHead(nn.Module):
    """A reranker's head, ``x [B, H]`` → ``[B]``: the probability of the token yes, if only yes or no can follow.

    This softmax over two logits is the sigmoid of their difference, so no other row of the head's matrix is needed.
    """

    def __init__(self, table: str, vocab_size: int, hidden_size: int, yes_no_ids: tuple[int, int]) -> None:
        super().__init__()
        self.answers = YesNoRows(table, vocab_size, hidden_size, yes_no_ids)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        yes, no = op.Split(self.answers(op, x), [1, 1], axis=1, _outputs=2)
        return op.Sigmoid(op.Squeeze(op.Sub(yes, no), [1]))


class PooledModel(nn.Module):
    """A decoder with pooling: applies ``head`` to the hidden state of each row's last valid token.

    ``forward(op, tokens, attention_mask)`` takes token ids if the model has ``embed_tokens``, and counts the positions
    itself. Otherwise ``tokens`` are embeddings, and ``position_ids`` and DeepStack's channel are further inputs. Rows
    are padded on the right, where causal attention does not look.
    """

    def __init__(
        self,
        model: TextModel,
        head: nn.Module,
        make_rope: MakeRope,
        cache: tuple[int, int],
        dtype: ir.DataType,
        deepstack: SideChannel | None = None,
        embed_tokens: Embedding | None = None,
        make_backend: MakeBackend = grouped_query,
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.embed_tokens = embed_tokens
        self.make_backend = make_backend
        self.make_rope, self.cache, self.dtype, self.deepstack = make_rope, cache, dtype, deepstack

    def forward(self, op: OpBuilder, tokens: ir.Value, attention_mask: ir.Value, *rest: ir.Value) -> list[ir.Value]:
        if self.embed_tokens is None:
            x, position_ids, levels = tokens, rest[0], []
            if self.deepstack is not None and self.deepstack.levels:
                levels = self.deepstack.levels_of(op, rest[1])
        else:
            x, position_ids, levels = self.embed_tokens(op, tokens), _count(op, tokens), []
        backend = self.make_backend(op, attention_mask, position_ids, self.make_rope(op, position_ids))
        past = (self._empty_cache(op, attention_mask),) * (2 * len(self.model.layers))
        last = op.Unsqueeze(op.Sub(op.ReduceSum(attention_mask, [1], keepdims=1), 1), [2])  # [B, 1, 1]
        x, _ = self.model(op, x, backend, past, levels, lambda op, y: op.GatherND(y, last, batch_dims=1))
        return [self.head(op, op.Squeeze(x, [1]))]

    def _empty_cache(self, op: OpBuilder, attention_mask: ir.Value) -> ir.Value:
        """Keys or values of no tokens, ``[B, kv_heads, 0, D]``, because the attention operator requires a cache."""
        heads, size = self.cache
        shape = op.Concat(op.Shape(attention_mask, start=0, end=1), [heads, 0, size], axis=0)
        empty = op.ConstantOfShape(shape, value=ir.tensor([0.0], dtype=self.dtype))
        return ops.typed(empty, self.dtype, ["batch_size", heads, 0, size])


def _count(op: OpBuilder, input_ids: ir.Value) -> ir.Value:
    """Positions 0, 1, 2 … of text, int64 ``[B, S]``; M-RoPE's three axes are equal in text, so one is enough."""
    shape = op.Shape(input_ids)
    length = op.Squeeze(op.Shape(input_ids, start=1, end=2))
    return ops.typed(op.Expand(op.Range(0, length, 1), shape), ops.INT64, ops.shape_of(input_ids))
