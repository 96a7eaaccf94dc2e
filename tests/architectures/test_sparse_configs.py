"""Sparse configurations: they contain only the values that differ from the defaults of transformers' classes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from family import TEXT, Member, make_member
from vlpack.architectures import ARCHITECTURES
from vlpack.architectures.base import Architecture
from vlpack.builder import build
from vlpack.errors import CheckpointError

transformers = pytest.importorskip("transformers")

MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
QWEN2_VL_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": MROPE,
}
FLAT: dict[str, list[Any]] = {
    "Qwen2VL": [
        QWEN2_VL_7B | {"vision_config": {"model_type": "qwen2_vl"}},
        QWEN2_VL_7B | {"vision_config": {"depth": 4, "mlp_ratio": 2}},
        {"rope_scaling": MROPE, "vision_config": {"hidden_size": 8192}},  # the 72B's decoder is the default
        {"rope_scaling": MROPE, "num_key_value_heads": None, "vision_config": {"hidden_size": 8192}},
    ],
    "Qwen2_5_VL": [
        QWEN2_VL_7B | {"vision_config": {"hidden_size": 1280, "tokens_per_second": 2}},
        QWEN2_VL_7B | {"vision_config": {"hidden_size": 1280, "window_size": 56}},
        {"rope_scaling": MROPE, "vision_config": {"hidden_size": 1280, "out_hidden_size": 8192}},
    ],
}
CASES = [(family, config) for family, configs in FLAT.items() for config in configs]


def facts(architecture: Architecture) -> dict[str, Any]:
    decoder = architecture.decoder
    return {
        "text": architecture.text,
        "vision": architecture.vision,
        "eps": decoder.eps,
        "inverse": decoder.frequencies.inverse.tolist(),
        "axes": decoder.frequencies.axis_of.tolist(),
        "tied": architecture.tied,
    }


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("family", "config"), CASES)
def test_missing_values_are_read_as_in_transformers(family: str, config: dict[str, Any], nested: bool) -> None:
    if nested:
        text = {name: value for name, value in config.items() if name != "vision_config"}
        config = {"text_config": text, "vision_config": config["vision_config"]}
    whole = getattr(transformers, f"{family}Config")(**copy.deepcopy(config)).to_dict()
    make = ARCHITECTURES[f"{family}ForConditionalGeneration"]
    assert facts(make(config)) == facts(make(whole))


@pytest.mark.parametrize(
    ("name", "expected"), [("Qwen3ForCausalLM", 128), ("Qwen3MoeForCausalLM", 16), ("LlamaForCausalLM", 16)]
)
def test_head_dim_of_sparse_configs(name: str, expected: int) -> None:
    config = TEXT | {"num_experts": 8, "moe_intermediate_size": 32}
    reference = getattr(transformers, name.replace("ForCausalLM", "Config"))(**config)
    with_default = getattr(reference, "head_dim", None) or reference.hidden_size // reference.num_attention_heads
    assert ARCHITECTURES[name](config).text.head_size == expected == with_default


SPARSE = [
    Member(
        "Qwen2VL sparse",
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        {"embed_dim": 64, "num_heads": 16, "hidden_size": 64},
        old=True,
    ),
    Member(
        "Qwen2_5_VL sparse",
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        {"hidden_size": 64, "num_heads": 16, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 64},
        old=True,
    ),
]


@pytest.mark.parametrize("member", SPARSE, ids=lambda member: member.name)
def test_a_sparse_config_gives_the_same_package(member: Member, tmp_path: Path) -> None:
    folder = make_member(tmp_path / "checkpoint", member)
    graphs = {}
    for kind in ("whole", "sparse"):
        package = build(folder, tmp_path / kind, precision="fp32").folder
        graphs[kind] = [(package / f"{part}.onnx").read_bytes() for part in ("decoder", "vision", "embedding")]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        default = getattr(transformers, member.config_class)().vision_config.to_dict()
        vision = config["vision_config"]
        dropped = [name for name, value in list(vision.items()) if name in default and default[name] == value]
        config["vision_config"] = {name: value for name, value in vision.items() if name not in dropped}
        assert {"num_heads", "temporal_patch_size"} <= set(dropped) or kind == "sparse"
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert graphs["whole"] == graphs["sparse"]


def test_null_values_count_as_missing() -> None:
    config = QWEN2_VL_7B | {"vision_config": {"depth": None}}
    with pytest.raises(CheckpointError, match="'depth' is missing"):
        ARCHITECTURES["Qwen2VLForConditionalGeneration"](config).vision_model(None)  # type: ignore[arg-type]
