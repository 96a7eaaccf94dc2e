"""Qwen3-MoE: Qwen3 with experts in its feed-forward layers. Source: transformers' ``modeling_qwen3_moe.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpack.architectures.moe import MixtureOfExperts
from vlpack.architectures.qwen3 import Qwen3
from vlpack.checkpoint.config import Section
from vlpack.tasks import GENERATE


class Qwen3Moe(MixtureOfExperts, Qwen3):
    """``Qwen3MoeForCausalLM``, the models 30B-A3B, 235B-A22B."""

    models = "Qwen3 30B-A3B, 235B-A22B"
    tasks = (GENERATE,)
    defaults: Mapping[str, Any] = {}

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        root = Section(config)
        self.add_experts(root, norm_topk_prob=root.flag("norm_topk_prob", False))
