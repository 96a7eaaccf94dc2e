"""The formats' own libraries as judges of how quantized weights are read; each test is skipped without its library.

What the libraries pack is read, and what the tests pack by hand (`quantized`) is given to the libraries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import quantized
from quantized import Format
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats import unpacked

NAME = "model.layers.0.mlp.up_proj.weight"


def weight(rows: int = 64, cols: int = 192) -> np.ndarray:
    return np.random.default_rng(5).normal(0, 0.05, (rows, cols)).astype(np.float32)


@contextmanager
def written(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[Checkpoint]:
    """A checkpoint with these torch tensors of one module, presented as if it were not quantized."""
    from safetensors.torch import save_file

    stem = NAME.removesuffix("weight")
    save_file({stem + end: tensor.contiguous() for end, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    with Checkpoint.open(folder) as opened:
        opened.config["quantization_config"] = dict(config)
        yield unpacked(opened)


def torch_tensors(form: Format, matrix: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """The tensors that a test packs by hand, for torch, and their values."""
    import torch

    packed = form.pack(matrix)
    kinds = {ml_dtypes.bfloat16: (np.uint16, torch.bfloat16), ml_dtypes.float8_e4m3fn: (np.uint8, torch.float8_e4m3fn)}
    tensors = {}
    for end, tensor in packed.tensors.items():
        view, dtype = kinds.get(tensor.dtype.type, (tensor.dtype, None))
        plain = torch.from_numpy(np.array(tensor).view(view).copy())
        tensors[end] = plain if dtype is None else plain.view(dtype)
    return tensors, packed.values


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, 64), (8, None)])
def test_compressed_tensors(bits: int, group: int | None, symmetric: bool, tmp_path: Path) -> None:
    import torch

    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if group else "channel"
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    matrix = quantized.rounded(weight(), bits, group or 192, symmetric, np.float32)
    signed = (matrix.zeros.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
    state = {"weight": torch.from_numpy(weight()), "weight_scale": torch.from_numpy(matrix.scales)}
    state = Compressor.compress({**state, "weight_zero_point": torch.from_numpy(signed)}, scheme)
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": {"weights": args}},
    }
    with written(tmp_path, config, state) as checkpoint:
        assert np.array_equal(checkpoint.read(NAME), Compressor.decompress(dict(state), scheme)["weight"].numpy())
    by_hand, values = torch_tensors(quantized.compressed(bits, group or -1, symmetric, np.float32), weight())
    assert np.array_equal(Compressor.decompress(by_hand, scheme)["weight"].numpy(), values)


def test_awq_as_compressed_tensors_converts_it() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensors, values = torch_tensors(quantized.awq(), weight())
    stem = NAME.removesuffix("weight")
    converted = AutoAWQConverter(group_size=32).process({stem + end: tensor for end, tensor in tensors.items()})
    state = {name.removeprefix(stem): tensor for name, tensor in converted.items()}
    state["weight_scale"] = state["weight_scale"].float()
    args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    assert np.array_equal(Compressor.decompress(state, scheme)["weight"].numpy(), values)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bitsandbytes_4_bits(kind: str, nested: bool, dtype: str, tmp_path: Path) -> None:
    import torch

    functional = pytest.importorskip("bitsandbytes.functional")
    given = torch.from_numpy(weight(96, 320)).to(getattr(torch, dtype))
    packed, state = functional.quantize_4bit(given, quant_type=kind, compress_statistics=nested)
    tensors = {"weight": packed, **{f"weight.{end}": part for end, part in state.as_dict(packed=True).items()}}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    with written(tmp_path, config, tensors) as checkpoint:
        assert np.array_equal(checkpoint.read(NAME), functional.dequantize_4bit(packed, state).float().numpy())


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    import torch

    functional = pytest.importorskip("bitsandbytes.functional")
    codes, peaks, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight()).half())
    with written(
        tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"weight": codes, "SCB": peaks}
    ) as checkpoint:
        assert np.array_equal(checkpoint.read(NAME), functional.int8_vectorwise_dequant(codes, peaks).numpy())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint8])
def test_fp8_as_transformers_reads_it(dtype: Any) -> None:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, values = torch_tensors(quantized.fp8((32, 64), dtype), weight())
    read = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.float32)
    assert np.array_equal(read.numpy(), values)


@pytest.mark.parametrize(("rows", "cols"), [(64, 96), (80, 72)])
def test_fp8_of_all_experts_as_transformers_packs_them(rows: int, cols: int, tmp_path: Path) -> None:
    """transformers stores the experts of Qwen3-VL-MoE in one tensor, whose scales are in one tensor too."""
    import torch
    from transformers.integrations import finegrained_fp8

    settings = SimpleNamespace(weight_block_size=(32, 32), scale_fmt="float")
    quantizer = finegrained_fp8.Fp8Quantize(SimpleNamespace(quantization_config=settings))
    given = torch.from_numpy(np.stack([weight(rows, cols) * (1 + expert) for expert in range(3)]))
    whole = torch.nn.functional.pad(given, (0, -cols % 32, 0, -rows % 32))  # it packs whole blocks alone
    packed = quantizer._quantize_one("gate_up_proj", whole)
    packed["gate_up_proj"] = packed["gate_up_proj"][:, :rows, :cols].contiguous()
    scales = packed["gate_up_proj_scale_inv"]
    assert scales.shape == (3, -(-rows // 32), -(-cols // 32))
    wanted = finegrained_fp8._dequantize_fp8_weight(packed["gate_up_proj"], scales, [32, 32], torch.float32).numpy()
    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    name = "model.layers.0.mlp.up_proj.gate_up_proj"
    with written(tmp_path, config, packed) as checkpoint:
        assert np.array_equal(checkpoint.read(name), wanted)
        flat = wanted.reshape(-1, cols)
        assert np.array_equal(checkpoint.rows(name, 50, 2 * rows + 7, width=cols), flat[50 : 2 * rows + 7])
