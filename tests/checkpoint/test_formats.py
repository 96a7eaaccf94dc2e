"""Quantized checkpoints of every format: their values, the codes that packages keep, and the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import quantized
from quantized import Format, Matrix, quantize
from tiny import Tiny
from vlpack.architectures import architecture_of
from vlpack.checkpoint.checkpoint import Checkpoint

FORMATS: dict[str, Format] = {
    "pack": quantized.compressed(),
    "pack-zeros": quantized.compressed(symmetric=False, dtype=np.float32),
    "pack-channel": quantized.compressed(group=-1),
    "pack-channel-zeros": quantized.compressed(group=-1, symmetric=False),
    "pack-int8": quantized.compressed(bits=8),
    "pack-int8-zeros": quantized.compressed(bits=8, symmetric=False),
    "pack-int8-channel": quantized.compressed(bits=8, group=-1),
    "pack-actorder": quantized.compressed(symmetric=False, actorder=True),
    "int-quantized": quantized.int_quantized(),
    "awq": quantized.awq(),
    "awq-channel": quantized.awq(group=-1),
    "gptq": quantized.gptq(),
    "gptq-zeros": quantized.gptq(symmetric=False),
    "gptq-v2": quantized.gptq(symmetric=False, version=2),
    "gptq-act": quantized.gptq(symmetric=False, desc_act=True),
    "gptq-8": quantized.gptq(bits=8, group=-1),
    "auto-round": quantized.auto_round(quantized.gptq(symmetric=False)),
    "auto-round-awq": quantized.auto_round(quantized.awq()),
    "fp8": quantized.fp8(),
    "fp8-bf16": quantized.fp8((32, 48), ml_dtypes.bfloat16),
    "fp8-exponents": quantized.fp8(dtype=np.uint8),
    "fp8-channel": quantized.fp8(None, ml_dtypes.bfloat16),
    "fp8-matrix": quantized.fp8_per_matrix(),
    "nf4": quantized.nf4(),
    "nf4-plain": quantized.nf4(nested=False),
    "int8": quantized.int8(),
}


@pytest.fixture(scope="module")
def copies(
    checkpoint: Callable[[Tiny], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Matrix]]]:
    """Returns the folder of a quantized copy of the tiny checkpoint and its matrices, by the format's name."""
    made: dict[str, tuple[Path, dict[str, Matrix]]] = {}

    def get(name: str) -> tuple[Path, dict[str, Matrix]]:
        if name not in made:
            folder = tmp_path_factory.mktemp("quantized") / name
            made[name] = (folder, quantize(checkpoint(Tiny()), folder, FORMATS[name]))
        return made[name]

    return get


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_exact(name: str, copies: Callable[[str], tuple[Path, dict[str, Matrix]]]) -> None:
    folder, matrices = copies(name)
    with Checkpoint.open(folder) as opened:
        _, checkpoint = architecture_of(opened)
        for tensor, matrix in matrices.items():
            rows = len(matrix.values)
            pieces = [checkpoint.rows(tensor, start, min(start + 13, rows)) for start in range(0, rows, 13)]
            assert np.array_equal(np.concatenate(pieces), matrix.values), tensor
            assert np.array_equal(checkpoint.read(tensor), matrix.values), tensor
