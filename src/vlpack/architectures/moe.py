"""The base of the mixture-of-experts models: which layers have experts, and how the checkpoint stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd

from onnxscript import nn

from vlpack.architectures.base import Architecture
from vlpack.checkpoint.config import Section
from vlpack.checkpoint.safetensors import TensorInfo
from vlpack.layers.moe import ExpertSizes, Layout, SparseMoe, layout_of
from vlpack.quantize.policy import EXPERT_PROVIDERS, PrecisionFacts


class MixtureOfExperts(Architecture):
    """A mixture-of-experts architecture; a subclass calls `add_experts` once its decoder has been read."""

    providers: tuple[str, ...] = EXPERT_PROVIDERS
    layout = Layout.SEPARATE

    def add_experts(self, text: Section, norm_topk_prob: bool, shared: int = 0) -> None:
        """Replace the feed-forward modules of those layers that have experts according to the config.

        Args:
            text: the decoder's settings.
            norm_topk_prob: whether the shares of a token's chosen experts sum to 1 (`SparseMoe`).
            shared: width of the expert that all tokens share; 0 for none.

        Raises:
            CheckpointError: a value is missing or not supported.
        """
        experts = text.integer("num_experts", text.integer("num_local_experts", 0, low=0), high=1 << 12)
        self.sizes = ExpertSizes(
            num_experts=experts,
            num_experts_per_tok=text.integer("num_experts_per_tok", 8, high=experts),
            hidden_size=self.text.hidden_size,
            moe_intermediate_size=text.integer("moe_intermediate_size"),
        )
        text.choice("hidden_act", ["silu"], "silu")  # the only activation that vlpack writes for MoE and QMoE
        step = text.integer("decoder_sparse_step", 1)
        dense = text.integers("mlp_only_layers", []) if text.values.get("mlp_only_layers") else []
        self.norm_topk_prob, self.shared = norm_topk_prob, shared
        self.sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(self.text.num_hidden_layers)]
        make_dense = self.decoder.make_mlp
        self.decoder = replace(
            self.decoder, make_mlp=lambda layer: self._sparse() if self.sparse[layer] else make_dense(layer)
        )

    def _sparse(self) -> nn.Module:
        return SparseMoe(self.sizes, self.layout, self.norm_topk_prob, self.shared)

    def observe(self, tensors: Mapping[str, TensorInfo]) -> None:
        if True in self.sparse:
            first = self.sparse.index(True)
            self.layout = layout_of(tensors, f"{self.decoder.prefix}.layers.{first}.mlp.experts", self.sizes)

    @property
    def precision_facts(self) -> PrecisionFacts:
        return PrecisionFacts(
            self.text.num_hidden_layers,
            gcd(self.sizes.hidden_size, self.sizes.moe_intermediate_size) if True in self.sparse else None,
            gates=self.text.delta_net is not None,
        )
