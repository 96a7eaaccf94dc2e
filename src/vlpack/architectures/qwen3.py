"""Qwen3: a text decoder with norms on queries and keys. Source: transformers' ``modeling_qwen3.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpack.architectures.base import Architecture
from vlpack.architectures.text import TextDecoder
from vlpack.checkpoint.config import Section
from vlpack.tasks import EMBEDDING, GENERATE, RERANKER


class Qwen3(Architecture):
    """``Qwen3ForCausalLM``, the models 0.6B to 32B."""

    models = "Qwen3 0.6B to 32B"
    needs = "no sliding window"
    genai_type = genai_text_type = "qwen3"
    tasks: tuple[str, ...] = (GENERATE, EMBEDDING, RERANKER)

    defaults: Mapping[str, Any] = {"head_dim": 128}
    """Default values of this family, for configs without them, that differ from those of other text models."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        root = Section(config).with_defaults(self.defaults)
        bias = root.flag("attention_bias", False)
        self.decoder = TextDecoder.read(
            root, root, prefix="model", qk_norm=True, qkv_bias=bias, o_bias=bias, theta=10000.0
        )
