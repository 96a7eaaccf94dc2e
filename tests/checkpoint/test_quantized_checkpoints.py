"""Checkpoints that are already quantized are refused with a message that says so, whichever file or tensor shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samples import QUERY, Tensors, copy_digits, edit_json, edit_tensors
from vlpack.builder import build
from vlpack.errors import CheckpointError
from vlpack.inspection import inspect

STEM = QUERY.removesuffix(".weight")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_digits(tmp_path / "checkpoint")


def refused(source: Path, tmp_path: Path, match: str) -> None:
    for attempt in (lambda: build(source, tmp_path / "package"), lambda: inspect(source)):
        with pytest.raises(CheckpointError, match=f"already quantized .*{match}") as caught:
            attempt()
        assert "original" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config in config"),
        ("compression_config", {"format": "float-quantized"}, "llm-compressor"),
        ("quantization", {"group_size": 64, "bits": 4}, "MLX"),
    ],
)
def test_quantized_according_to_the_config(name: str, value: Any, match: str, source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", name, value=value)
    refused(source, tmp_path, match)
    edit_json(source / "config.json", name, value=...)
    edit_json(source / "config.json", "text_config", name, value=value)
    refused(source, tmp_path, match)


@pytest.mark.parametrize(
    ("end", "match"),
    [
        ("qweight", "GPTQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "FP8"),
        ("weight_scale", "scales"),
        ("SCB", "bitsandbytes"),
        ("scales", "MLX"),
    ],
)
def test_quantized_according_to_the_tensors(end: str, match: str, source: Path, tmp_path: Path) -> None:
    def quantize(tensors: Tensors) -> None:
        weight = tensors[QUERY] if end.endswith(("_scale", "scale_inv", "SCB")) else tensors.pop(QUERY)
        tensors[f"{STEM}.{end}"] = weight._replace(shape=(4,), data=weight.data[:8])

    edit_tensors(source, quantize)
    refused(source, tmp_path, f"{match}.*{STEM}.{end}")


@pytest.mark.parametrize(
    ("file", "settings", "match"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "NVFP4', as ModelOpt"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "4 bits, as AutoGPTQ"),
        ("quant_config.json", {"w_bit": 4}, "4 bits, as AutoAWQ"),
    ],
)
def test_quantized_according_to_another_tools_file(
    file: str, settings: dict[str, Any], match: str, source: Path, tmp_path: Path
) -> None:
    (source / file).write_text(json.dumps(settings), encoding="utf-8")
    refused(source, tmp_path, match)


def test_a_file_that_names_no_method(source: Path, tmp_path: Path) -> None:
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None}}
    (source / "hf_quant_config.json").write_text(json.dumps(settings), encoding="utf-8")
    build(source, tmp_path / "package")
