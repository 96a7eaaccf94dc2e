"""The text decoder: a stack of attention and feed-forward layers, its final norm, and the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops
from vlpack.layers.attention import Attend, Attention, MakeAttend, Past, Pick, grouped_query
from vlpack.layers.channels import NormChannels, readers_of
from vlpack.layers.deepstack import SideChannel
from vlpack.layers.linear import Embedding, Linear
from vlpack.layers.norm import RMSNorm
from vlpack.layers.rope import Rope

RopeOf = Callable[[OpBuilder, ir.Value], Rope]
"""Angles from ``position_ids``."""


def every_token(op: OpBuilder, x: ir.Value) -> ir.Value:
    """All of ``x [B, S, ..]``."""
    return x


def last_token(op: OpBuilder, x: ir.Value) -> ir.Value:
    """``[B, S, ..] → [B, 1, ..]``."""
    return op.Slice(x, [-1], [2**62], [1])


class DecoderLayer(nn.Module):
    """Attention and feed-forward with residuals around both, normalized before each (pre-norm)."""

    def __init__(self, attention: Attention, mlp: nn.Module, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)

    def forward(
        self, op: OpBuilder, x: ir.Value, attend: Attend, past: Past, pick: Pick
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Keys and values are of every token; what follows the attention is of those that ``pick`` takes."""
        # the residual stream x [B, S, H] stays in fp32: trained models reach values that fp16 cannot hold
        y, key, value = self.self_attn(op, self.input_layernorm(op, x), attend, past, pick)
        x = op.Add(pick(op, x), ops.cast(op, y, ops.FLOAT))
        y = self.mlp(op, self.post_attention_layernorm(op, x))
        return op.Add(x, ops.cast(op, y, ops.FLOAT)), key, value

    def channels(self) -> list[NormChannels]:
        """See `vlpack.layers.channels`."""
        pairs = (self.input_layernorm, self.self_attn), (self.post_attention_layernorm, self.mlp)
        return [NormChannels(norm, readers_of(module)) for norm, module in pairs]


class TextModel(nn.Module):
    """Embeddings in, normalized hidden states out; DeepStack's features are added after the first layers.

    The last layer computes the tokens that ``pick`` takes and no others: of the rest only the keys and values are
    needed, so that o_proj, feed-forward and what follows, most of a layer's work, are left out.

    The module's name is the prefix of its tensors in the checkpoint.
    """

    def __init__(self, layers: Sequence[DecoderLayer], hidden_size: int, eps: float, name: str) -> None:
        super().__init__(name)
        self.layers = nn.ModuleList(list(layers))
        self.norm = RMSNorm(hidden_size, eps)

    def forward(
        self,
        op: OpBuilder,
        x: ir.Value,
        attend: Attend,
        past: Sequence[ir.Value],
        deepstack: Sequence[ir.Value],
        pick: Pick,
    ) -> tuple[ir.Value, list[ir.Value]]:
        x = ops.cast(op, x, ops.FLOAT)  # [B, S, H]
        present = []
        for index, layer in enumerate(self.layers):
            here = pick if index == len(self.layers) - 1 else every_token
            x, key, value = layer(op, x, attend, (past[2 * index], past[2 * index + 1]), here)
            present += [key, value]
            if index < len(deepstack):
                x = op.Add(x, ops.cast(op, here(op, deepstack[index]), ops.FLOAT))
        return self.norm(op, x), present


class CausalLM(nn.Module):
    """Embeddings (or, with ``embed_tokens``, token ids) to logits, with the cache as inputs and outputs.

    ``forward(op, tokens, attention_mask, position_ids, *[deepstack channel], *past)`` returns logits ``[B, S, V]``
    (``[B, 1, V]`` where only the last are wanted) and the present keys and values.
    """

    def __init__(
        self,
        model: TextModel,
        lm_head: Linear,
        rope_of: RopeOf,
        dtype: ir.DataType,
        last_logits: bool,
        deepstack: SideChannel | None = None,
        embed_tokens: Embedding | None = None,
        make_attend: MakeAttend = grouped_query,
    ) -> None:
        super().__init__()
        self.model = model
        self.lm_head = lm_head
        self.embed_tokens = embed_tokens
        self.make_attend = make_attend
        self.rope_of, self.dtype, self.last_logits, self.deepstack = rope_of, dtype, last_logits, deepstack

    def forward(
        self, op: OpBuilder, tokens: ir.Value, attention_mask: ir.Value, position_ids: ir.Value, *rest: ir.Value
    ) -> list[ir.Value]:
        x = tokens if self.embed_tokens is None else self.embed_tokens(op, tokens)
        levels: list[ir.Value] = []
        if self.deepstack is not None and self.deepstack.levels:
            levels, rest = self.deepstack.levels_of(op, rest[0]), rest[1:]
        attend = self.make_attend(op, attention_mask, position_ids, self.rope_of(op, position_ids))
        x, present = self.model(op, x, attend, rest, levels, last_token if self.last_logits else every_token)
        return [ops.cast(op, self.lm_head(op, x), self.dtype), *present]

    def channels(self) -> list[NormChannels]:
        """See `vlpack.layers.channels`. A tied head is the embedding too, which no norm's scales may change."""
        return [] if self.lm_head.tied_to else [NormChannels(self.model.norm, [self.lm_head])]
