"""Llama: a text decoder, usually without biases. Source: transformers' ``modeling_llama.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpack.architectures.base import Architecture
from vlpack.architectures.text import TextDecoder
from vlpack.checkpoint.config import Section


class Llama(Architecture):
    """``LlamaForCausalLM``: Llama 1, 2 and 3 (to 3.3), SmolLM, TinyLlama and other models of this architecture."""

    models = "Llama 1 to 3.3 and others of that shape"
    genai_type = genai_text_type = "llama"

    def __init__(self, config: Mapping[str, Any]) -> None:
        root = Section(config)
        root.integer("max_position_embeddings")  # required here: the default in `TextFacts` is Qwen's
        bias = root.flag("attention_bias", False)
        self.decoder = TextDecoder.read(
            root,
            root,
            prefix="model",
            qk_norm=False,
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=root.flag("mlp_bias", False),
            theta=10000.0,
        )
