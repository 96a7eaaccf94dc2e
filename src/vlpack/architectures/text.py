"""The text decoder that all families share: its settings, read from a config, and the modules built from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.architectures.hparams import TextFacts
from vlpack.architectures.ports import GraphOptions, Part, pooled_part
from vlpack.checkpoint.config import Section
from vlpack.errors import CheckpointError
from vlpack.layers.attention import Attention, MakeBackend, grouped_query, mask_bias
from vlpack.layers.decoder import CausalLM, DecoderLayer, TextModel
from vlpack.layers.deepstack import SideChannel
from vlpack.layers.delta_net import DeltaNetSizes, GatedDeltaNet
from vlpack.layers.int8_kv_cache import int8_kv_cache
from vlpack.layers.linear import Embedding, Linear
from vlpack.layers.mlp import ACTIVATIONS, GatedMLP
from vlpack.layers.pooling import EmbeddingHead, PooledModel, ScoreHead
from vlpack.layers.rope import Frequencies, MropeLayout, Rope, angles_from_positions, read_frequencies

MakeMLP = Callable[[int], nn.Module]
"""Makes the feed-forward module of a layer, given its index."""


@dataclass(frozen=True)
class TextDecoder:
    """The settings of a text decoder, with methods that build its modules.

    Args:
        facts: the decoder's sizes.
        prefix: prefix of its tensors in the checkpoint.
        tied: whether the head and the embedding share one weight.
        eps: epsilon of its RMS norms.
        qkv_bias: whether q, k and v have biases.
        o_bias: whether the output projection has a bias.
        qk_norm: whether every query and key head has an RMS norm.
        frequencies: frequencies of the rotary embedding, and the position axis of each.
        position_axes: 3 for M-RoPE's positions ``[3, B, S]``, 0 for ``[B, S]``.
        make_mlp: makes the feed-forward module of a layer.
        hidden_act: activation of the feed-forward modules and of linear attention's convolution.
        norm_offset: number that is added to the checkpoint's weights of RMS norms, all but linear attention's.
        output_gate: whether the output of every attention head is multiplied by a gate.
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
    hidden_act: str = "silu"
    norm_offset: float = 0.0
    output_gate: bool = False

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
        mrope_layout: MropeLayout | None = None,
        sections: tuple[int, int, int] = (0, 0, 0),
        rotated_share: float | None = None,
    ) -> TextDecoder:
        """Read the settings from a config.json and its text part.

        Args:
            root: the whole config; its tie_word_embeddings overrides the text part's.
            text: the part with the decoder's sizes; the whole config if it is flat.
            prefix: prefix of the decoder's tensors in the checkpoint.
            qk_norm: whether every query and key head has an RMS norm.
            qkv_bias: whether q, k and v have biases.
            o_bias: whether the output projection has a bias.
            theta: theta of the rotary embedding for a config without one.
            eps: epsilon of the norms for a config without one.
            mlp_bias: whether the feed-forward matrices have biases.
            mrope_layout: how M-RoPE's three axes share the frequencies; None for plain positions.
            sections: M-RoPE's sections for a config without them.
            rotated_share: share of a head's channels that are rotated, for a config without one; None if always all.

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
            frequencies=read_frequencies(text, facts.head_size, theta, mrope_layout, sections, rotated_share),
            position_axes=3 if mrope_layout else 0,
            make_mlp=lambda layer: GatedMLP(size, intermediate, act, mlp_bias),
            hidden_act=act,
        )

    def with_linear_layers(self, layers: Sequence[int], sizes: DeltaNetSizes) -> TextDecoder:
        """This decoder with linear attention in the given layers."""
        return replace(self, facts=replace(self.facts, linear_layers=tuple(layers), delta_net=sizes))

    def embed_tokens(self) -> Embedding:
        """The module of the token embedding."""
        return Embedding(self.facts.vocab_size, self.facts.hidden_size, name=f"{self.prefix}.embed_tokens")

    def causal_lm(self, options: GraphOptions, deepstack: SideChannel | None) -> CausalLM:
        """The decoder with its head; it takes embeddings if ``deepstack`` is given, and token ids if it is None."""
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
            self._int8_kv_cache_backend() if options.int8_kv_cache else _backend(options),
        )

    def pooled_part(
        self,
        name: str,
        options: GraphOptions,
        deepstack: SideChannel | None,
        yes_no_ids: tuple[int, int] | None,
    ) -> Part:
        """The decoder graph of an embedding model or, with ``yes_no_ids``, of a reranker; without cache and logits.

        It gives one vector, or one score, for each row of tokens.
        """
        facts = self.facts
        table = f"{self.prefix}.embed_tokens.weight" if self.tied else "lm_head.weight"
        head = ScoreHead(table, facts.vocab_size, facts.hidden_size, yes_no_ids) if yes_no_ids else EmbeddingHead()
        module = PooledModel(
            self._text_model(),
            head,
            self._rope,
            (facts.num_key_value_heads, facts.head_size),
            options.dtype,
            deepstack,
            self.embed_tokens() if deepstack is None else None,
            _backend(options),
        )
        return pooled_part(name, module, facts, options, deepstack, bool(yes_no_ids))

    def _text_model(self) -> TextModel:
        facts = self.facts
        layers = [
            DecoderLayer(self._attention(layer), self.make_mlp(layer), facts.hidden_size, self.eps, self.norm_offset)
            for layer in range(facts.num_hidden_layers)
        ]
        return TextModel(layers, facts.hidden_size, self.eps, self.prefix, self.norm_offset)

    def _attention(self, layer: int) -> Attention | GatedDeltaNet:
        sizes = self.facts.delta_net
        if layer in self.facts.linear_layers:
            assert sizes is not None, "linear layers have sizes"
            return GatedDeltaNet(self.facts.hidden_size, sizes, self.eps, self.hidden_act)
        return Attention(
            self.facts.hidden_size,
            self.facts.num_attention_heads,
            self.facts.num_key_value_heads,
            self.facts.head_size,
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            qk_norm_eps=self.eps if self.qk_norm else None,
            norm_offset=self.norm_offset,
            output_gate=self.output_gate,
        )

    def _int8_kv_cache_backend(self) -> MakeBackend:
        facts = self.facts
        heads = facts.num_attention_heads, facts.num_key_value_heads, facts.head_size
        return int8_kv_cache(*heads, self.frequencies.scaling)

    def _rope(self, op: OpBuilder, position_ids: ir.Value) -> Rope:
        return angles_from_positions(op, position_ids, self.frequencies)


def _backend(options: GraphOptions) -> MakeBackend:
    return grouped_query if options.grouped_kernel else mask_bias


def refuse_sliding_window(text: Section) -> None:
    """Refuse a model with sliding-window attention, because vlpack would let tokens attend to all earlier ones.

    Raises:
        CheckpointError: the config asks for sliding-window attention.
    """
    kinds = text.values.get("layer_types") or []
    if text.flag("use_sliding_window", False) or "sliding_attention" in kinds:
        raise CheckpointError(f"{text.where}: sliding-window attention (use_sliding_window) is not supported.")
