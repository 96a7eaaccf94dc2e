"""The text decoder: a stack of attention and feed-forward layers, the final norm, and the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops
from vlpack.layers.attention import Attention, AttentionBackend, MakeBackend, Past, SelectTokens, grouped_query
from vlpack.layers.candidates import Candidates
from vlpack.layers.channels import NormChannels, readers_of
from vlpack.layers.deepstack import SideChannel
from vlpack.layers.delta_net import GatedDeltaNet
from vlpack.layers.linear import Embedding, Linear
from vlpack.layers.norm import RMSNorm
from vlpack.layers.rope import Rope

MakeRope = Callable[[OpBuilder, ir.Value], Rope]
"""Computes the rotary angles of ``position_ids``."""


def every_token(op: OpBuilder, x: ir.Value) -> ir.Value:
    """Select all tokens: ``x [B, S, ..]`` unchanged."""
    return x


def last_token(op: OpBuilder, x: ir.Value) -> ir.Value:
    """Select the last token: ``[B, S, ..] → [B, 1, ..]``."""
    return op.Slice(x, [-1], [2**62], [1])


class DecoderLayer(nn.Module):
    """A decoder layer: attention and feed-forward, each with a norm before it and a residual around it (pre-norm).

    The attention may be linear. ``norm_offset`` is added to the weights of the norms (`RMSNorm`).
    """

    def __init__(
        self,
        attention: Attention | GatedDeltaNet,
        mlp: nn.Module,
        hidden_size: int,
        eps: float,
        norm_offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.place = attention.place
        setattr(self, attention.place, attention)  # both kinds have the checkpoint's name
        self.mlp = mlp
        self.input_layernorm = RMSNorm(hidden_size, eps, norm_offset)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps, norm_offset)

    @property
    def attention(self) -> Attention | GatedDeltaNet:
        """The layer's attention."""
        found: Attention | GatedDeltaNet = getattr(self, self.place)
        return found

    def forward(
        self, op: OpBuilder, x: ir.Value, backend: AttentionBackend, past: Past, select_tokens: SelectTokens
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The layer's output for the tokens that ``select_tokens`` keeps, and what it keeps of all tokens (`Past`)."""
        # the residual stream x [B, S, H] stays in fp32: trained models reach values that fp16 cannot hold
        y, key, value = self.attention(op, self.input_layernorm(op, x), backend, past, select_tokens)
        x = op.Add(select_tokens(op, x), ops.cast(op, y, ops.FLOAT))
        y = self.mlp(op, self.post_attention_layernorm(op, x))
        return op.Add(x, ops.cast(op, y, ops.FLOAT)), key, value

    def channels(self) -> list[NormChannels]:
        """The channels that can be rescaled within the weights (`vlpack.layers.channels`)."""
        pairs = (self.input_layernorm, self.attention), (self.post_attention_layernorm, self.mlp)
        return [NormChannels(norm, readers_of(module)) for norm, module in pairs]


class TextModel(nn.Module):
    """The decoder without embedding and head: from embeddings to normalized hidden states.

    DeepStack's features are added to the hidden states after the first layers. The last layer is computed only for the
    tokens that ``select_tokens`` keeps: the others need their keys and values, but neither o_proj nor feed-forward,
    which are most of a layer's work. The module's name is the prefix of its tensors in the checkpoint.
    """

    def __init__(
        self, layers: Sequence[DecoderLayer], hidden_size: int, eps: float, name: str, norm_offset: float = 0.0
    ) -> None:
        super().__init__(name)
        self.layers = nn.ModuleList(list(layers))
        self.norm = RMSNorm(hidden_size, eps, norm_offset)

    def forward(
        self,
        op: OpBuilder,
        x: ir.Value,
        backend: AttentionBackend,
        past: Sequence[ir.Value],
        deepstack: Sequence[ir.Value],
        select_tokens: SelectTokens,
    ) -> tuple[ir.Value, list[ir.Value]]:
        x = ops.cast(op, x, ops.FLOAT)  # [B, S, H]
        present = []
        for index, layer in enumerate(self.layers):
            select = select_tokens if index == len(self.layers) - 1 else every_token
            x, key, value = layer(op, x, backend, (past[2 * index], past[2 * index + 1]), select)
            present += [key, value]
            if index < len(deepstack):
                x = op.Add(x, ops.cast(op, select(op, deepstack[index]), ops.FLOAT))
        return self.norm(op, x), present


class CausalLM(nn.Module):
    """A causal language model: embeddings (or, with ``embed_tokens``, token ids) to logits, with a key/value cache.

    ``forward(op, tokens, attention_mask, position_ids, *[deepstack channel], *past)`` returns the logits ``[B, S, V]``
    (``[B, 1, V]`` with ``last_logits``) and the present keys and values.
    """

    def __init__(
        self,
        model: TextModel,
        lm_head: Linear,
        make_rope: MakeRope,
        dtype: ir.DataType,
        last_logits: bool,
        deepstack: SideChannel | None = None,
        embed_tokens: Embedding | None = None,
        make_backend: MakeBackend = grouped_query,
        candidates: Candidates | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.lm_head = lm_head
        self.candidates = candidates
        self.embed_tokens = embed_tokens
        self.make_backend = make_backend
        self.make_rope, self.dtype, self.last_logits, self.deepstack = make_rope, dtype, last_logits, deepstack

    def forward(
        self, op: OpBuilder, tokens: ir.Value, attention_mask: ir.Value, position_ids: ir.Value, *rest: ir.Value
    ) -> list[ir.Value]:
        x = tokens if self.embed_tokens is None else self.embed_tokens(op, tokens)
        levels: list[ir.Value] = []
        if self.deepstack is not None and self.deepstack.levels:
            levels, rest = self.deepstack.levels_of(op, rest[0]), rest[1:]
        backend = self.make_backend(op, attention_mask, position_ids, self.make_rope(op, position_ids))
        x, present = self.model(op, x, backend, rest, levels, last_token if self.last_logits else every_token)
        logits = self.lm_head(op, x)
        if self.candidates is not None:
            logits = self.candidates(op, x, logits)
        return [ops.cast(op, logits, self.dtype), *present]

    def channels(self) -> list[NormChannels]:
        """The final norm's channels (`vlpack.layers.channels`).

        There are none if the head is tied: its weight is the embedding too, which a norm's scales must not change.
        """
        if self.lm_head.tied_to:
            return []
        readers = [self.lm_head] if self.candidates is None else [self.lm_head, self.candidates]
        return [NormChannels(self.model.norm, readers)]
