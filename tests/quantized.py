"""Quantized copies of tiny checkpoints, packed here in each format, and the values that they stand for.

Values are computed here from codes, scales and zero points before these are packed, so they do not depend on how vlpack
unpacks them. The layouts were compared with the formats' own libraries (`tests/checkpoint/test_formats_libraries.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""For each 4-bit code of a word in AWQ's layout: the index of its row of the weight among the word's eight."""
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""The codebook of bitsandbytes' nf4."""


@dataclass
class Matrix:
    """A quantized matrix: the tensors that store it, its values, and its codes if it has a grid.

    Args:
        tensors: stored tensors, by the end of their names.
        values: the values that they stand for, float32 ``[N, K]``.
        codes: unsigned codes ``[N, K]``.
        scales: scales ``[N, G]``, float32.
        zeros: zero points ``[N, G]``.
    """

    tensors: dict[str, np.ndarray]
    values: np.ndarray
    codes: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scales: np.ndarray = field(default_factory=lambda: np.zeros(0))
    zeros: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Format:
    """A format of quantized checkpoints: its declaration in config.json, and the function that packs a matrix."""

    config: dict[str, Any]
    pack: Callable[[np.ndarray], Matrix]


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes packed into int32 words along the last axis, low bits first; the last word is padded with zeros."""
    per_word = 32 // bits
    padded = np.pad(codes.astype(np.uint64), [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_word)])
    parts = padded.reshape(*codes.shape[:-1], -1, per_word) << (np.arange(per_word, dtype=np.uint64) * np.uint64(bits))
    return parts.sum(axis=-1).astype(np.uint32).view(np.int32)


def rounded(
    weight: np.ndarray, bits: int, group: int, symmetric: bool, dtype: Any, order: np.ndarray | None = None
) -> Matrix:
    """A matrix rounded to the nearest codes of a grid: codes, scales, zero points and values, but no packed tensors."""
    rows, cols = weight.shape
    groups = cols // group
    order = np.arange(cols) // group if order is None else order
    levels, middle = (1 << bits) - 1, 1 << (bits - 1)
    scales, zeros = np.ones((rows, groups), np.float32), np.full((rows, groups), middle)
    for index in range(groups):
        own = weight[:, order == index]
        if symmetric:
            scales[:, index] = np.abs(own).max(axis=1) / (middle - 0.5)
        else:
            low, high = np.minimum(own.min(axis=1), 0), np.maximum(own.max(axis=1), 0)
            scales[:, index] = (high - low) / levels
            zeros[:, index] = np.clip(np.rint(-low / scales[:, index]), 1, levels)
    scales = scales.astype(dtype).astype(np.float32)
    codes = np.clip(np.rint(weight / scales[:, order]) + zeros[:, order], 0, levels).astype(np.uint8)
    values = (codes.astype(np.float32) - zeros[:, order].astype(np.float32)) * scales[:, order]
    return Matrix({}, values, codes, scales, zeros.astype(np.uint8))


def compressed(
    bits: int = 4, group: int = 32, symmetric: bool = True, dtype: Any = ml_dtypes.bfloat16, actorder: bool = False
) -> Format:
    """The format ``pack-quantized`` of compressed-tensors; a group of -1 stands for one scale per row."""

    def pack(weight: np.ndarray) -> Matrix:
        size = weight.shape[1] if group == -1 else group
        order = np.random.default_rng(0).permutation(weight.shape[1]) // size if actorder else None
        matrix = rounded(weight, bits, size, symmetric, dtype, order)
        matrix.tensors = {
            "weight_packed": words(matrix.codes, bits),
            "weight_scale": matrix.scales.astype(dtype),
            "weight_shape": np.array(weight.shape, np.int64),
        }
        if not symmetric:
            matrix.tensors["weight_zero_point"] = words(matrix.zeros.T, bits).T
        if order is not None:
            matrix.tensors["weight_g_idx"] = order.astype(np.int32)
        return matrix

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    weights |= {"strategy": "channel", "group_size": None} if group == -1 else {}
    weights["actorder"] = "group" if actorder else None
    return Format(_compressed_config("pack-quantized", weights), pack)


def int_quantized() -> Format:
    """The format ``int-quantized`` of compressed-tensors: int8 with a scale per row (w8a8)."""

    def pack(weight: np.ndarray) -> Matrix:
        matrix = rounded(weight, 8, weight.shape[1], True, ml_dtypes.bfloat16)
        signed = (matrix.codes.astype(np.int16) - 128).astype(np.int8)
        matrix.tensors = {"weight": signed, "weight_scale": matrix.scales.astype(ml_dtypes.bfloat16)}
        return matrix

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    return Format(_compressed_config("int-quantized", weights), pack)


def _compressed_config(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*visual.*"],
    }


def awq(group: int = 32) -> Format:
    """AWQ's layout ``gemm``."""

    def pack(weight: np.ndarray) -> Matrix:
        matrix = rounded(weight, 4, weight.shape[1] if group == -1 else group, False, np.float16)

        def ordered(codes: np.ndarray) -> np.ndarray:
            turned = codes.T.reshape(codes.shape[1], -1, 8)[:, :, AWQ_ORDER]
            return words(turned.reshape(codes.shape[1], -1), 4)

        matrix.tensors = {
            "qweight": ordered(matrix.codes),
            "qzeros": ordered(matrix.zeros),
            "scales": matrix.scales.T.astype(np.float16),
        }
        return matrix

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Format({**config, "modules_to_not_convert": ["visual"]}, pack)


def gptq(bits: int = 4, group: int = 32, symmetric: bool = True, desc_act: bool = False, version: int = 1) -> Format:
    """GPTQ's layout, in the first or second version."""

    def pack(weight: np.ndarray) -> Matrix:
        cols = weight.shape[1]
        size = cols if group == -1 else group
        order = np.random.default_rng(1).permutation(cols) // size if desc_act else np.arange(cols) // size
        matrix = rounded(weight, bits, size, symmetric, np.float16, order)
        stored = matrix.zeros.T.astype(np.int64) - (1 if version == 1 else 0)
        matrix.tensors = {
            "qweight": words(matrix.codes, bits).T,
            "qzeros": words(stored, bits),
            "scales": matrix.scales.T.astype(np.float16),
            "g_idx": order.astype(np.int32),
        }
        return matrix

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act, "sym": symmetric}
    return Format({**config, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}, pack)


def auto_round(layout: Format) -> Format:
    """AutoRound's declaration of the layout of `awq` or `gptq`."""
    packing = "auto_round:auto_awq" if layout.config["quant_method"] == "awq" else "auto_round:auto_gptq"
    config = {name: layout.config[name] for name in ("bits", "group_size")}
    return Format({**config, "quant_method": "auto-round", "packing_format": packing, "data_type": "int"}, layout.pack)


def fp8(block: tuple[int, int] | None = (64, 64), dtype: Any = np.float32) -> Format:
    """FP8 with scales for blocks, or for rows (by compressed-tensors) if ``block`` is None."""

    def pack(weight: np.ndarray) -> Matrix:
        rows, cols = weight.shape
        height, width = block or (1, cols)
        down, across = -(-rows // height), -(-cols // width)
        peaks = np.zeros((down, across), np.float32)
        for i in range(down):
            for j in range(across):
                peaks[i, j] = np.abs(weight[i * height : (i + 1) * height, j * width : (j + 1) * width]).max()
        if dtype is np.uint8:
            stored: np.ndarray = (np.ceil(np.log2(peaks / 448)) + 127).astype(np.uint8)
            scales = np.exp2(stored.astype(np.float32) - 127)
        else:
            stored = (peaks / 448).astype(dtype)
            scales = stored.astype(np.float32)
        each = np.repeat(np.repeat(scales, height, axis=0), width, axis=1)[:rows, :cols]
        codes = np.clip(weight / each, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        name = "weight_scale" if block is None else "weight_scale_inv"
        return Matrix({"weight": codes, name: stored}, codes.astype(np.float32) * each)

    if block is None:
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
        return Format(_compressed_config("float-quantized", weights), pack)
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return Format({**config, "modules_to_not_convert": ["lm_head", "model.visual"]}, pack)


def fp8_per_matrix() -> Format:
    """FP8 with one scale for a matrix and one for its inputs, as ModelOpt writes it."""

    def pack(weight: np.ndarray) -> Matrix:
        scale = np.float32(np.abs(weight).max() / 448)
        codes = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
        tensors = {"weight": codes, "weight_scale": np.array(scale), "input_scale": np.array(1, np.float32)}
        return Matrix(tensors, codes.astype(np.float32) * scale)

    return Format({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, pack)


def nf4(nested: bool = True) -> Format:
    """bitsandbytes' nf4 in blocks of 64, with or without double quantization."""

    def pack(weight: np.ndarray) -> Matrix:
        book = np.array(NF4, np.float32)
        blocks = weight.reshape(-1, 64)
        absmax = np.abs(blocks).max(axis=1)
        codes = np.abs(blocks[:, :, None] / absmax[:, None, None] - book).argmin(axis=2).astype(np.uint8)
        flat = codes.reshape(-1)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        tensors = {"weight": (flat[0::2] << 4 | flat[1::2])[:, None], "weight.quant_map": book}
        if nested:
            map8, offset = np.linspace(-1, 1, 256, dtype=np.float32), np.float32(absmax.mean())
            outer = np.array(
                [np.abs(piece - offset).max() for piece in np.array_split(absmax, range(256, len(absmax), 256))]
            )
            outer = outer.astype(np.float32)
            each = np.repeat(outer, 256)[: len(absmax)]
            small = np.abs(((absmax - offset) / each)[:, None] - map8).argmin(axis=1).astype(np.uint8)
            absmax = map8[small] * each + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
            tensors |= {"weight.nested_absmax": outer, "weight.nested_quant_map": map8, "weight.absmax": small}
        else:
            tensors["weight.absmax"] = absmax.astype(np.float32)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors["weight.quant_state.bitsandbytes__nf4"] = text
        values = book[codes] * absmax[:, None].astype(np.float32)
        return Matrix(tensors, values.astype(ml_dtypes.bfloat16).astype(np.float32).reshape(weight.shape))

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
    return Format({**config, "llm_int8_skip_modules": ["lm_head", "visual"]}, pack)


def int8() -> Format:
    """bitsandbytes' int8 (LLM.int8)."""

    def pack(weight: np.ndarray) -> Matrix:
        peaks = np.abs(weight).max(axis=1).astype(np.float32)
        signed = np.rint(weight * (127 / peaks[:, None])).astype(np.int8)
        inverse = np.float32(7.874015718698502e-3)
        values = signed.astype(np.float32) * peaks[:, None] * inverse
        codes = (signed.astype(np.int16) + 128).astype(np.uint8)
        tensors = {"weight": signed, "SCB": peaks, "weight_format": np.array(0, np.uint8)}
        return Matrix(tensors, values, codes, peaks[:, None] * inverse, np.full((len(peaks), 1), 128, np.uint8))

    return Format({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, pack)


def in_decoder(name: str) -> bool:
    """Whether a tensor is a matrix of the decoder's layers, which the formats quantize."""
    return name.endswith("proj.weight") and "visual" not in name


def quantize(source: Path, folder: Path, form: Format, chosen: Callable[[str], bool] = in_decoder) -> dict[str, Matrix]:
    """Writes a quantized copy of a checkpoint, and beside it a float32 copy with the values of its codes.

    Args:
        source: the checkpoint, in one file of float32.
        folder: folder of the quantized copy; the other copy has the suffix ``-values``.
        form: the format.
        chosen: function that returns, for the name of a tensor, whether it is quantized.

    Returns:
        The quantized matrices, by tensor name.
    """
    from safetensors.numpy import load_file, save_file

    values = folder.with_name(f"{folder.name}-values")
    for copy in (folder, values):
        shutil.copytree(source, copy)
    tensors = load_file(source / "model.safetensors")
    done = {name: form.pack(weight) for name, weight in tensors.items() if chosen(name)}
    stored = {name: weight for name, weight in tensors.items() if name not in done}
    for name, matrix in done.items():
        for end, tensor in matrix.tensors.items():
            stored[name.removesuffix("weight") + end] = np.ascontiguousarray(tensor)
    plain = {name: done[name].values if name in done else weight for name, weight in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, values / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = form.config
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return done
