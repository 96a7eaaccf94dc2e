"""Qwen3-Next: the text-only ancestor of Qwen3.5-MoE, with plain positions and grouped projections.

Source: transformers' ``modeling_qwen3_next.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpack.architectures.moe import MixtureOfExperts
from vlpack.architectures.qwen3_5 import DRAFTS, read_hybrid
from vlpack.checkpoint.config import Section
from vlpack.quantize.policy import STATE_PROVIDERS

DEFAULTS: Mapping[str, Any] = {
    "head_dim": 256,
    "num_key_value_heads": 2,
    "intermediate_size": 5632,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
"""Values of this family for configs that lack them, where they differ from those of other text models."""


class Qwen3Next(MixtureOfExperts):
    """``Qwen3NextForCausalLM``: the models 80B-A3B Instruct and 80B-A3B Thinking."""

    models = "Qwen3-Next 80B-A3B; Instruct and Thinking"
    needs = "onnxruntime 1.31"
    providers = STATE_PROVIDERS
    # the runtime has no type qwen3_next, but inputs and outputs are those of Qwen3.5's decoder
    genai_type = genai_text_type = "qwen3_5_moe_text"
    ignored: Mapping[str, str] = DRAFTS

    def __init__(self, config: Mapping[str, Any]) -> None:
        root = Section(config).with_defaults(DEFAULTS)
        self.decoder = read_hybrid(root, root, prefix="model", mrope_layout=None, grouped=True)
        shared = root.integer("shared_expert_intermediate_size")
        self.add_experts(root, norm_topk_prob=root.flag("norm_topk_prob", True), shared=shared)
