"""Qwen2 and Qwen2.5: a text decoder with biases on q, k and v. Source: transformers' ``modeling_qwen2.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpack.architectures.base import Architecture
from vlpack.architectures.text import TextDecoder
from vlpack.checkpoint.config import Section
from vlpack.tasks import EMBEDDING, GENERATE


class Qwen2(Architecture):
    """``Qwen2ForCausalLM``: Qwen2, Qwen2.5 and other models of this architecture."""

    models = "Qwen2, Qwen2.5 and others of that shape"
    needs = "no sliding window"
    genai_type = genai_text_type = "qwen2"
    tasks: tuple[str, ...] = (GENERATE, EMBEDDING)

    def __init__(self, config: Mapping[str, Any]) -> None:
        root = Section(config)
        self.decoder = TextDecoder.read(
            root, root, prefix="model", qk_norm=False, qkv_bias=True, o_bias=False, theta=10000.0
        )
