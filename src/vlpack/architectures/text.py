"""The text decoders of the family: what they share, read from a config once, and built from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.architectures.hparams import TextFacts
from vlpack.architectures.ports import GraphOptions, Part, pooled_part
from vlpack.checkpoint.config import Section
from vlpack.errors import CheckpointError
from vlpack.layers.attention import Attention, MakeAttend, grouped_query, mask_bias
from vlpack.layers.decoder import CausalLM, DecoderLayer, TextModel
from vlpack.layers.deepstack import SideChannel
from vlpack.layers.int8_kv_cache import byte_cache
from vlpack.layers.linear import Embedding, Linear
from vlpack.layers.mlp import ACTIVATIONS, GatedMLP
from vlpack.layers.pooling import EmbeddingHead, PooledModel, ScoreHead
from vlpack.layers.rope import Frequencies, Rope, Weave, angles_from_positions, read_frequencies

MakeMLP = Callable[[int], nn.Module]
"""The feed-forward module of a layer, by its index."""


@dataclass(frozen=True)
class TextDecoder:
    """A decoder's settings, and what can be built from them.

    Args:
        facts: its sizes.
        prefix: of its tensors in the checkpoint.
        tied: the head's weight is the embedding's.
        eps: of its RMS norms.
        qkv_bias: biases on q, k and v.
        o_bias: … on the output projection.
        qk_norm: an RMS norm on every query and key head.
        frequencies: of the rotary embedding, and which axis of the positions turns each.
        position_axes: 3 for M-RoPE's positions ``[3, B, S]``, 0 for ``[B, S]``.
        make_mlp: makes the feed-forward modules.
    """

    facts: TextFacts
    prefix: str
    tied: bool
    eps: float
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    frequencies: Frequencies
    position_axes: int
    make_mlp: MakeMLP

    @classmethod
    def read(
        cls,
        root: Section,
        text: Section,
        *,
        prefix: str,
        qk_norm: bool,
        qkv_bias: bool,
        o_bias: bool,
        theta: float,
        eps: float = 1e-6,
        mlp_bias: bool = False,
        weave: Weave | None = None,
        sections: tuple[int, int, int] = (0, 0, 0),
    ) -> TextDecoder:
        """From a config.json and its text part.

        Args:
            root: the whole config, which has the last word on tying.
            text: the part with the decoder's sizes; the same where the config is flat.
            prefix: see the class.
            qk_norm: see the class.
            qkv_bias: see the class.
            o_bias: see the class.
            theta: of the rotary embedding where the config has none.
            eps: of the norms, likewise.
            mlp_bias: biases on the feed-forward matrices.
            weave: how M-RoPE's three axes share the frequencies; None for plain positions.
            sections: of M-RoPE, where the config has none.

        Raises:
            CheckpointError: a value is missing or not supported.
        """
        facts = TextFacts.read(text)
        refuse_sliding_window(text)
        size, intermediate = facts.hidden_size, text.integer("intermediate_size")
        act = text.choice("hidden_act", ACTIVATIONS, "silu")
        return cls(
            facts=facts,
            prefix=prefix,
            tied=root.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False)),
            eps=text.number("rms_norm_eps", eps),
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            qk_norm=qk_norm,
            frequencies=read_frequencies(text, facts.head_size, theta, weave, sections),
            position_axes=3 if weave else 0,
            make_mlp=lambda layer: GatedMLP(size, intermediate, act, mlp_bias),
        )

    def embed_tokens(self) -> Embedding:
        """The token embedding."""
        return Embedding(self.facts.vocab_size, self.facts.hidden_size, name=f"{self.prefix}.embed_tokens")

    def causal_lm(self, options: GraphOptions, deepstack: SideChannel | None) -> CausalLM:
        """The decoder; it takes ``inputs_embeds`` where ``deepstack`` is given, and token ids where it is None."""
        facts = self.facts
        tied_to = f"{self.prefix}.embed_tokens.weight" if self.tied else None
        return CausalLM(
            self._text_model(),
            Linear(facts.hidden_size, facts.vocab_size, tied_to=tied_to, role="head"),
            self._rope,
            options.dtype,
            options.last_logits,
            deepstack,
            self.embed_tokens() if deepstack is None else None,
            self._make_byte_cache() if options.byte_cache else _make_attend(options),
        )

    def pooled_part(
        self,
        name: str,
        options: GraphOptions,
        deepstack: SideChannel | None,
        answers: tuple[int, int] | None,
    ) -> Part:
        """The decoder as one vector for each row of tokens or, with ``answers``, one score; no cache, no logits."""
        facts = self.facts
        table = f"{self.prefix}.embed_tokens.weight" if self.tied else "lm_head.weight"
        head = ScoreHead(table, facts.vocab_size, facts.hidden_size, answers) if answers else EmbeddingHead()
        module = PooledModel(
            self._text_model(),
            head,
            self._rope,
            (facts.num_key_value_heads, facts.head_size),
            options.dtype,
            deepstack,
            self.embed_tokens() if deepstack is None else None,
            _make_attend(options),
        )
        return pooled_part(name, module, facts, options, deepstack, bool(answers))

    def _text_model(self) -> TextModel:
        facts = self.facts
        layers = [
            DecoderLayer(self._attention(), self.make_mlp(layer), facts.hidden_size, self.eps)
            for layer in range(facts.num_hidden_layers)
        ]
        return TextModel(layers, facts.hidden_size, self.eps, self.prefix)

    def _attention(self) -> Attention:
        return Attention(
            self.facts.hidden_size,
            self.facts.num_attention_heads,
            self.facts.num_key_value_heads,
            self.facts.head_size,
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            qk_norm_eps=self.eps if self.qk_norm else None,
        )

    def _make_byte_cache(self) -> MakeAttend:
        facts = self.facts
        heads = facts.num_attention_heads, facts.num_key_value_heads, facts.head_size
        return byte_cache(*heads, self.frequencies.scaling)

    def _rope(self, op: OpBuilder, position_ids: ir.Value) -> Rope:
        return angles_from_positions(op, position_ids, self.frequencies)


def _make_attend(options: GraphOptions) -> MakeAttend:
    return grouped_query if options.grouped_kernel else mask_bias


def refuse_sliding_window(text: Section) -> None:
    """Attention over a window of past tokens would be computed over all of them.

    Raises:
        CheckpointError: the config asks for it.
    """
    kinds = text.values.get("layer_types") or []
    if text.flag("use_sliding_window", False) or "sliding_attention" in kinds:
        raise CheckpointError(f"{text.where}: sliding-window attention (use_sliding_window) is not supported.")
