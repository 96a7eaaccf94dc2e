"""Scaled rotary frequencies (YaRN and Llama 3.1) equal transformers', wherever a configuration has their settings."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from family import TEXT
from vlpack.architectures import ARCHITECTURES
from vlpack.errors import CheckpointError

transformers = pytest.importorskip("transformers")

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
BARE = {name: value for name, value in YARN.items() if name != "original_max_position_embeddings"}
ORIGINAL = {"original_max_position_embeddings": 256}
MROPE = {"mrope_section": [6, 5, 5]}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 8192,
}

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (YARN, {}),
    "no length": (BARE, {}),
    "a length beside": (BARE, ORIGINAL),
    "a length beside and within": (YARN, ORIGINAL),
    "a broken length": (YARN | {"original_max_position_embeddings": 400.5}, {}),
    "a broken length beside": (YARN, {"original_max_position_embeddings": 400.5}),
    "fast below slow": (YARN | {"beta_fast": 1, "beta_slow": 32}, {}),
    "fast below slow, not rounded": (YARN | {"beta_fast": 1, "beta_slow": 4.5, "truncate": False}, {}),
    "fast is slow": (YARN | {"beta_fast": 3, "beta_slow": 3, "truncate": False}, {}),
    "near": (YARN | {"beta_fast": 3.0001, "beta_slow": 3, "truncate": False}, {}),
    "long": (YARN | {"original_max_position_embeddings": 32768, "factor": 8}, {}),
    "given attention": (YARN | {"attention_factor": 1.25}, {}),
    "llama3": (LLAMA3, {}),
    "llama3 of 3.2": (LLAMA3 | {"factor": 32.0, "rope_theta": 500000.0}, {}),
    "llama3, a short length": (LLAMA3 | {"original_max_position_embeddings": 64}, {}),
    "llama3, no length": ({k: v for k, v in LLAMA3.items() if not k.startswith("original")}, {}),
    "llama3, a length beside": (LLAMA3, ORIGINAL),
    "llama3, odd factors": (LLAMA3 | {"low_freq_factor": 0.5, "high_freq_factor": 17.25, "factor": 1.5}, {}),
}


def expected(config: Any) -> tuple[np.ndarray, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config.standardize_rope_params()
    inverse, scaling = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    return inverse.numpy(), float(scaling)


def check(name: str, config: dict[str, Any], reference: Any) -> None:
    inverse, scaling = expected(reference.get_text_config())
    frequencies = ARCHITECTURES[name](config).decoder.frequencies
    np.testing.assert_allclose(frequencies.inverse, inverse, rtol=2e-6)
    assert frequencies.scaling == pytest.approx(scaling)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Qwen2"])
def test_text_models(family: str, case: str, key: str) -> None:
    rope, beside = SETTINGS[case]
    config = TEXT | {"head_dim": 32} | beside | {key: rope}
    reference = getattr(transformers, f"{family}Config")(**copy.deepcopy(config))
    check(f"{family}ForCausalLM", config, reference)


@pytest.mark.parametrize("case", SETTINGS)
def test_nested_configs(case: str) -> None:
    rope, beside = SETTINGS[case]
    text = TEXT | {"head_dim": 32} | beside | {"rope_parameters": rope | MROPE}
    vision = {"deepstack_visual_indexes": [0], "out_hidden_size": 64}
    vision |= transformers.Qwen3VLConfig().vision_config.to_dict() | vision
    config = {"text_config": text, "vision_config": vision}
    check("Qwen3VLForConditionalGeneration", config, transformers.Qwen3VLConfig(**copy.deepcopy(config)))


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL"])
def test_flat_configs_with_settings_beside_rope_scaling(family: str, case: str) -> None:
    rope, beside = SETTINGS[case]
    name = f"{family}Config"
    width = {"hidden_size": 64} if family == "Qwen2VL" else {"out_hidden_size": 64}
    vision = getattr(transformers, name)().vision_config.to_dict() | width
    rope = rope | {"mrope_section": [2, 3, 3]}
    config = {**TEXT, **beside, "rope_scaling": rope, "vision_config": vision}
    check(f"{family}ForConditionalGeneration", config, getattr(transformers, name)(**copy.deepcopy(config)))


PARTIAL = {"partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
SIZES = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}


@pytest.mark.parametrize("case", SETTINGS)
def test_partial_rotation(case: str) -> None:
    """Qwen3.5 rotates a quarter of each head, and the scaling counts only those channels."""
    rope, beside = SETTINGS[case]
    config = TEXT | SIZES | {"head_dim": 32, "num_hidden_layers": 4} | beside | {"rope_parameters": rope | PARTIAL}
    check("Qwen3_5ForCausalLM", config, transformers.Qwen3_5TextConfig(**copy.deepcopy(config)))


def test_partial_rotary_factors_are_refused() -> None:
    config = TEXT | {"head_dim": 32, "rope_scaling": YARN, "partial_rotary_factor": 0.5}
    with pytest.raises(CheckpointError, match="partial_rotary_factor"):
        ARCHITECTURES["Qwen3ForCausalLM"](config)


@pytest.mark.parametrize(("slow", "fast"), [(4.0, 1.0), (2.0, 2.0)])
def test_a_llama3_ramp_without_width(slow: float, fast: float) -> None:
    scaling = LLAMA3 | {"low_freq_factor": slow, "high_freq_factor": fast}
    with pytest.raises(CheckpointError, match="high_freq_factor"):
        ARCHITECTURES["LlamaForCausalLM"](TEXT | {"head_dim": 32, "rope_scaling": scaling})
