"""The configuration of a model in a GGUF file, as the config.json of a Hugging Face checkpoint.

The metadata has the settings under keys such as ``qwen3.embedding_length``. Only the tensors show whether the head is
tied and whether projections have biases, and one of them holds the divisors of the rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.config import Section
from vlpack.checkpoint.gguf.header import Entry
from vlpack.checkpoint.gguf.names import HEAD, ROPE_FACTORS
from vlpack.errors import CheckpointError

Array = npt.NDArray[Any]

MODELS = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen2vl": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "qwen3vl": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3vlmoe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
}
"""Architecture in the metadata → class and model type in transformers. The file of a vision-language model has only its
decoder. For text alone this is the text model of the same family, because the three positions of M-RoPE are equal."""
SEEING = ("qwen2vl", "qwen3vl", "qwen3vlmoe")
"""Architectures of the decoders of vision-language models."""

_LLAMA3: dict[str, float] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Settings of the rotary scaling of Llama 3.1 to 3.3 that all models share; only the factor differs between them."""


def architecture_of(metadata: Section) -> str:
    """The architecture that the metadata names.

    Raises:
        CheckpointError: the metadata names none.
    """
    name = metadata.values.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{metadata.where}: 'general.architecture' is missing.")
    return name


def model_config(metadata: Section, tensors: Mapping[str, Entry], rope_factors: Array | None) -> dict[str, Any]:
    """The config.json that describes the model of a GGUF file.

    Args:
        metadata: the file's metadata.
        tensors: its tensors, by their names in the file.
        rope_factors: values of the tensor `ROPE_FACTORS`, ``[head_dim / 2]``; None if there is no such tensor.

    Raises:
        CheckpointError: the architecture is not supported, or a setting is missing, out of range or not supported.
    """
    name = architecture_of(metadata)
    if name not in MODELS:
        raise CheckpointError(
            f"{metadata.where}: the architecture {name!r} is not supported in GGUF files.",
            "Supported: " + ", ".join(sorted(MODELS)) + ".",
        )
    keys = _Keys(metadata, name)
    model_class, model_type = MODELS[name]
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{metadata.where.removesuffix(': metadata')} has no token embedding (token_embd.weight)."
        )
    heads = keys.integer("attention.head_count", high=1 << 12)
    hidden = keys.integer("embedding_length", high=1 << 20)
    head_dim = keys.integer("attention.key_length", hidden // heads, high=1 << 12)
    keys.must_be("attention.value_length", head_dim)
    keys.must_be("rope.dimension_count", head_dim)
    keys.must_be("rope.scale_linear", 1)
    config: dict[str, Any] = {
        "architectures": [model_class],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length", high=1 << 24),
        "num_hidden_layers": keys.integer("block_count", high=1 << 12),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads, high=1 << 12),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": HEAD not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "use_sliding_window": keys.integer("attention.sliding_window", 0, low=0) > 0,
        "dtype": "float32",
    }
    if model_type == "qwen2" and not config["attention_bias"]:
        raise CheckpointError(f"{metadata.where.removesuffix(': metadata')} has no biases of q, k and v, as Qwen2 has.")
    scaling = _rope_scaling(keys, config, rope_factors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    experts = keys.integer("expert_count", 0, low=0, high=1 << 12)
    if model_type == "qwen3_moe":
        config |= _experts(keys, tensors, experts)
    elif experts:
        raise CheckpointError(f"{keys.metadata.where}: {name} with {experts} experts is not supported.")
    return config


class _Keys:
    """A reader of the settings of one architecture, whose keys begin with its name."""

    def __init__(self, metadata: Section, name: str) -> None:
        self.metadata, self.name = metadata, name

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 1 << 31) -> int:
        return self.metadata.integer(f"{self.name}.{key}", default, low=low, high=high)

    def number(self, key: str, default: float | None = None) -> float:
        return self.metadata.number(f"{self.name}.{key}", default)

    def must_be(self, key: str, value: float) -> None:
        """Raises a CheckpointError if a setting has another value than the only one that is supported."""
        given = self.metadata.values.get(f"{self.name}.{key}")
        if given is not None and given != value:
            raise CheckpointError(
                f"{self.metadata.where}: '{self.name}.{key}' is {given!r:.60}; only {value} is supported here."
            )


def _rope_scaling(keys: _Keys, config: Mapping[str, Any], factors: Array | None) -> dict[str, Any] | None:
    """The ``rope_scaling`` of config.json; None if the model has none."""
    kind = keys.metadata.values.get(f"{keys.name}.rope.scaling.type", "none")
    if factors is not None:
        if kind not in ("none", "llama3"):
            raise CheckpointError(
                f"{keys.metadata.where}: rope scaling {kind!r:.60} with {ROPE_FACTORS} is not supported."
            )
        return _llama3(keys, config, factors)
    if kind == "none":
        return None
    if kind != "yarn":
        raise CheckpointError(
            f"{keys.metadata.where}: the rope scaling {kind!r:.60} is not supported; vlpack would compute wrong "
            "positions.",
            "Supported: none, yarn, and the frequencies of Llama 3.1.",
        )
    for key in ("yarn_ext_factor", "yarn_attn_factor", "attn_factor"):
        keys.must_be(f"rope.scaling.{key}", 1)
    keys.must_be("rope.scaling.yarn_log_multiplier", 0)
    return {
        "rope_type": "yarn",
        "factor": keys.number("rope.scaling.factor"),
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3(keys: _Keys, config: Mapping[str, Any], factors: Array) -> dict[str, Any]:
    """The rotary settings of Llama 3.1 that lead to the given divisors of the frequencies.

    Raises:
        CheckpointError: the divisors are not those of Llama 3.1 to 3.3.
    """
    factor = float(np.rint(factors.max(initial=0)))
    if factor >= 1:
        half = config["head_dim"] // 2
        turns = _LLAMA3["original_max_position_embeddings"] / (2 * np.pi)
        turns = turns * config["rope_theta"] ** -(np.arange(half) / half)  # rotations over the trained length
        low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4, atol=0):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise CheckpointError(
        f"{keys.metadata.where.removesuffix(': metadata')}: the tensor {ROPE_FACTORS} has other rotary frequencies "
        "than Llama 3.1 to 3.3, which are not supported.",
        "Build from the model's original checkpoint.",
    )


def _experts(keys: _Keys, tensors: Mapping[str, Entry], experts: int) -> dict[str, Any]:
    """The settings of config.json for a mixture of experts."""
    first = tensors.get("blk.0.ffn_gate_exps.weight")
    if first is None or len(first.shape) != 3 or first.shape[0] != experts:
        shape = None if first is None else list(first.shape)
        raise CheckpointError(
            f"{keys.metadata.where}: '{keys.name}.expert_count' is {experts}, but the matrices of the experts "
            f"(ffn_gate_exps) have the shape {shape}."
        )
    return {
        "num_experts": experts,
        "num_experts_per_tok": keys.integer("expert_used_count", high=experts),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length", first.shape[1], high=1 << 24),
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,  # llama.cpp normalizes the weights of experts for all files of these architectures
    }
