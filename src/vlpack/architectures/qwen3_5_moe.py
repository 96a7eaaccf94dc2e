"""Qwen3.5-MoE and Qwen3.6-MoE: Qwen3.5 with experts in every layer, one of which is shared by all tokens.

Source: transformers' ``modeling_qwen3_5_moe.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpack.architectures.moe import MixtureOfExperts
from vlpack.architectures.qwen3_5 import TEXT_DEFAULTS, Qwen35, Qwen35Text
from vlpack.checkpoint.config import Section
from vlpack.quantize.policy import STATE_PROVIDERS

DEFAULTS: Mapping[str, Any] = {
    **TEXT_DEFAULTS,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "intermediate_size": 1,  # size of dense layers, which these models do not have
}
"""Values of this family for configs that lack them, where they differ from those of other text models."""


class _Experts(MixtureOfExperts):
    """Mixin that adds the experts of Qwen3.5-MoE to a decoder."""

    providers = STATE_PROVIDERS

    def add_shared(self, text: Section) -> None:
        """Gives every layer its experts and a shared expert, as the config describes them.

        Raises:
            CheckpointError: a value is missing or not supported.
        """
        text = text.with_defaults(DEFAULTS)
        # transformers makes all layers sparse and normalizes the experts' shares, whatever a config says
        text = Section({**text.values, "mlp_only_layers": [], "decoder_sparse_step": 1}, text.where)
        self.add_experts(text, norm_topk_prob=True, shared=text.integer("shared_expert_intermediate_size"))


class Qwen35MoeText(_Experts, Qwen35Text):
    """``Qwen3_5MoeForCausalLM``: a model that is only the decoder."""

    models = "Qwen3.5 and Qwen3.6 with experts, text only"
    genai_type = genai_text_type = "qwen3_5_moe_text"
    text_defaults: Mapping[str, Any] = DEFAULTS

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.add_shared(Section(config))


class Qwen35Moe(_Experts, Qwen35):
    """``Qwen3_5MoeForConditionalGeneration``: the models 35B-A3B, 122B-A10B and 397B-A17B, with vision."""

    models = "Qwen3.5 35B-A3B to 397B-A17B; Qwen3.6 35B-A3B"
    genai_type = "qwen3_5_moe"
    genai_text_type = "qwen3_5_moe_text"
    text_defaults: Mapping[str, Any] = DEFAULTS

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.add_shared(Section(config).section("text_config"))
