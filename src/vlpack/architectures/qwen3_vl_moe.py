"""Qwen3-VL-MoE: Qwen3-VL, vision encoder and DeepStack included, with experts in its decoder.

Source: Qwen3-VL technical report (arXiv:2511.21631); transformers' ``modeling_qwen3_vl_moe.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpack.architectures.moe import MixtureOfExperts
from vlpack.architectures.qwen3_vl import Qwen3VL
from vlpack.checkpoint.config import Section
from vlpack.tasks import GENERATE


class Qwen3VLMoe(MixtureOfExperts, Qwen3VL):
    """``Qwen3VLMoeForConditionalGeneration``, the models 30B-A3B, 235B-A22B."""

    models = "Qwen3-VL 30B-A3B, 235B-A22B"
    tasks = (GENERATE,)
    text_defaults: Mapping[str, Any] = {}

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        # transformers normalizes the experts' shares whatever the config's norm_topk_prob is
        self.add_experts(Section(config).section("text_config"), norm_topk_prob=True)
