"""Quantized checkpoints that cannot be built: errors that name the format or the damage, before anything is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantized
from quantized import Format
from samples import QUERY, Tensors, copy_digits, edit_json, edit_tensors
from tiny import Tiny
from vlpack.builder import build
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats import detect
from vlpack.errors import CheckpointError
from vlpack.inspection import inspect

PLAIN = Tiny(layers=2, depth=1, deepstack=(0,))
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
        ("quantization_config", {"quant_method": "hqq"}, "quantization_config in config.json, by the method 'hqq'"),
        ("quantization_config", {"bits": 4}, "of no method that it names"),
        ("quantization_config", {"quant_method": "mxfp4"}, "MXFP4"),
        ("quantization_config", {"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ 'gemv'"),
        ("quantization_config", {"quant_method": "awq", "bits": 4, "zero_point": False}, "AWQ without zero points"),
        ("quantization_config", {"quant_method": "gptq", "bits": 3, "group_size": 128}, "GPTQ .* with 3 bits"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        (
            "quantization_config",
            {"quant_method": "auto-round", "bits": 4, "packing_format": "a:b"},
            "AutoRound .*'a:b'",
        ),
        ("quantization_config", {"quant_method": "fp8", "fmt": "e5m2"}, "FP8 of the type 'e5m2'"),
        ("quantization_config", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4.* of ModelOpt"),
        ("quantization_config", {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "NVFP4"),
        ("quantization_config", {"quant_method": "compressed-tensors", "format": "marlin-24"}, "'marlin-24'"),
        ("compression_config", {"format": "pack-quantized", "transform_config": {"a": 1}}, "transforms"),
        ("quantization", {"group_size": 64, "bits": 4}, "MLX"),
        # declared, but the tensors are those of an unquantized model
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config in config.json.*none of its tensors"),
    ],
)
def test_refused_by_the_config(name: str, value: Any, match: str, source: Path, tmp_path: Path) -> None:
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
def test_tensors_without_a_declaration(end: str, match: str, source: Path, tmp_path: Path) -> None:
    def quantize(tensors: Tensors) -> None:
        weight = tensors[QUERY] if end.endswith(("_scale", "scale_inv", "SCB")) else tensors.pop(QUERY)
        tensors[f"{STEM}.{end}"] = weight._replace(shape=(4,), data=weight.data[:8])

    edit_tensors(source, quantize)
    refused(source, tmp_path, f"{match}.*{STEM}.{end}")


@pytest.mark.parametrize(
    ("file", "settings", "match"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "NVFP4.*, as ModelOpt"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "4 bits, as AutoGPTQ.*none of its tensors"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "4 bits, as AutoAWQ.*none of its tensors"),
    ],
)
def test_quantized_according_to_another_tools_file(
    file: str, settings: dict[str, Any], match: str, source: Path, tmp_path: Path
) -> None:
    (source / file).write_text(json.dumps(settings), encoding="utf-8")
    refused(source, tmp_path, match)


def test_files_with_the_names_of_old_releases_of_autogptq(checkpoint: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    quantized.quantize(checkpoint(PLAIN), folder, quantized.gptq())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "quantize_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with Checkpoint.open(folder) as opened:
        wanted = dict(opened.tensors)
    one, two = (folder / f"gptq_model-4bit-{size}g.safetensors" for size in (32, 128))
    (folder / "model.safetensors").rename(one)
    assert inspect(folder)["files"] == {one.name: one.stat().st_size}
    build(folder, tmp_path / "package", threads=1)
    index = one.with_name(f"{one.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(wanted, two.name)}), encoding="utf-8")
    one.rename(two)
    with Checkpoint.open(folder) as opened:
        assert opened.weight_files() == [two]
    index.unlink()
    shutil.copyfile(two, one)
    with pytest.raises(CheckpointError, match=r"2 models of AutoGPTQ: 'gptq_model-4bit-128g\.safetensors'"):
        Checkpoint.open(folder)
    shutil.copyfile(two, folder / "model.safetensors")
    with Checkpoint.open(folder) as opened:
        assert opened.weight_files() == [folder / "model.safetensors"]


def test_a_file_that_names_no_method(source: Path, tmp_path: Path) -> None:
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None}}
    (source / "hf_quant_config.json").write_text(json.dumps(settings), encoding="utf-8")
    build(source, tmp_path / "package")


REAL = Path(__file__).parents[1] / "data" / "quantization_configs.json"


@pytest.mark.parametrize("name", json.loads(REAL.read_text(encoding="utf-8")))
def test_published_configs(name: str, source: Path) -> None:
    published = json.loads(REAL.read_text(encoding="utf-8"))[name]
    edit_json(source / "config.json", "quantization_config", value=published["quantization_config"])
    with Checkpoint.open_settings(source) as checkpoint:
        if "refused" in published:
            with pytest.raises(CheckpointError, match=f"already quantized .*{published['refused']}"):
                detect(checkpoint)
            return
        declared = detect(checkpoint)
    assert declared is not None
    assert declared.label == published["label"]
    assert declared.bits == published["bits"]


def other(**changes: Any) -> Any:
    """A function that changes values of a packed matrix's tensors: name → function of the array, or None to drop it."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for end, edit in changes.items():
            if edit is None:
                del tensors[end]
            else:
                tensors[end] = edit(tensors[end])

    return change


def poked(value: Any) -> Any:
    """A function that sets the first value of an array."""

    def edit(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[0] = value
        return array

    return edit


def state(**values: Any) -> Any:
    """A change of the JSON object that describes a weight of bitsandbytes."""
    end = "weight.quant_state.bitsandbytes__nf4"

    def edit(array: np.ndarray) -> np.ndarray:
        return np.frombuffer(json.dumps({**json.loads(array.tobytes()), **values}).encode(), np.uint8)

    return other(**{end: edit})


AWQ, GPTQ, FP8, NF4 = quantized.awq(), quantized.gptq(symmetric=False, desc_act=True), quantized.fp8(), quantized.nf4()
PACK = quantized.compressed(symmetric=False, dtype=np.float32)
HOSTILE: dict[str, tuple[Format, Any, str]] = {
    "awq: scales of another shape": (AWQ, other(scales=lambda x: x[:-1]), "scales' has the shape"),
    "awq: zero points of another type": (AWQ, other(qzeros=lambda x: x.astype(np.int64)), "is of type int64"),
    "awq: no scales": (AWQ, other(scales=None), "has no tensor .*scales"),
    "awq: NaN scale": (AWQ, other(scales=poked(np.nan)), "the scale nan .* row 0, group 0"),
    "awq: no rows": (AWQ, other(qweight=lambda x: x[:0]), "has two dimensions"),
    "gptq: group out of range": (GPTQ, other(g_idx=poked(99)), "names the group 99"),
    "gptq: negative group": (GPTQ, other(g_idx=poked(-1)), "names the group -1"),
    "gptq: groups of another number": (GPTQ, other(g_idx=lambda x: x[:-1]), "g_idx' has the shape"),
    "gptq: fewer groups": (GPTQ, other(scales=lambda x: x[:1], qzeros=lambda x: x[:1]), "does not fit the group size"),
    "gptq: infinite scale": (GPTQ, other(scales=poked(np.inf)), "the scale inf"),
    "fp8: scales of another shape": (FP8, other(weight_scale_inv=lambda x: x.reshape(-1)), "weight_scale_inv' has the"),
    "fp8: NaN scale": (FP8, other(weight_scale_inv=poked(np.nan)), "the scale nan"),
    "fp8: products overflow": (FP8, other(weight_scale_inv=poked(1e38)), "not finite"),
    "fp8: no scales": (FP8, other(weight_scale_inv=None), "has no scales"),
    "pack: shape of another size": (PACK, other(weight_shape=lambda x: x + 8), "does not fit"),
    "pack: negative shape": (PACK, other(weight_shape=lambda x: -x), "does not fit"),
    "pack: huge shape": (PACK, other(weight_shape=lambda x: x + (1 << 40)), "does not fit"),
    "pack: scales fit no scheme": (PACK, other(weight_scale=lambda x: x[:, :1]), "fits no entry of config_groups"),
    "pack: zero points of another shape": (
        PACK,
        other(weight_zero_point=lambda x: x[:-1]),
        "weight_zero_point has the",
    ),
    "pack: no zero points": (PACK, other(weight_zero_point=None), "has no weight_zero_point"),
    "nf4: shape of another size": (NF4, state(shape=[64, 65]), "bytes; its shape"),
    "nf4: negative block size": (NF4, state(blocksize=-64), "'blocksize' is -64"),
    "nf4: block size 0": (NF4, state(blocksize=0), "'blocksize' is 0"),
    "nf4: offset NaN": (NF4, state(nested_offset=float("nan")), "nested_offset|NaN"),
    "nf4: absmax of another size": (NF4, other(**{"weight.absmax": lambda x: x[:-1]}), "absmax' has the shape"),
    "nf4: NaN in the codebook": (NF4, other(**{"weight.quant_map": poked(np.nan)}), "the scale nan"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_tensors(case: str, checkpoint: Any, tmp_path: Path) -> None:
    form, change, match = HOSTILE[case]

    def pack(weight: np.ndarray) -> Any:
        matrix = form.pack(weight)
        change(matrix.tensors)
        return matrix

    wrong = replace(form, pack=pack)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    quantized.quantize(checkpoint(PLAIN), tmp_path / "checkpoint", wrong, lambda tensor: tensor == name)
    with pytest.raises(CheckpointError, match=match):
        build(tmp_path / "checkpoint", tmp_path / "package", precision="fp32")
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize(
    ("form", "key", "value", "match"),
    [
        (AWQ, "group_size", 0, "'group_size' is 0"),
        (AWQ, "group_size", -128, "'group_size' is -128"),
        (AWQ, "bits", "4", "'bits' is '4'"),
        (GPTQ, "group_size", 1 << 40, "'group_size' is"),
        (FP8, "weight_block_size", [0, 128], "'weight_block_size'"),
        (FP8, "weight_block_size", [-128, 128], "'weight_block_size'"),
        (FP8, "weight_block_size", [128], "two numbers"),
        (AWQ, "modules_to_not_convert", [1], "must be a list of names"),
        (PACK, "config_groups", {}, "names no quantized weights"),
        (
            PACK,
            "config_groups",
            {"a": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 0}}},
            "group_size",
        ),
    ],
)
def test_damaged_declarations(form: Format, key: str, value: Any, match: str, source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", "quantization_config", value={**form.config, key: value})
    with pytest.raises(CheckpointError, match=match):
        build(source, tmp_path / "package")
    assert not (tmp_path / "package").exists()
