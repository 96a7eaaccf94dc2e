"""Keys and values take memory only where they were written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vlpack.decoding.memory import sparse_zeros

MIB = 1 << 20


def resident_bytes() -> int:
    """The memory of this process that is resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="other systems choose the size of pages themselves")
def test_a_few_values_take_little_memory() -> None:
    before = resident_bytes()
    array = sparse_zeros((64, MIB), np.float32)  # 256 MiB
    array[:, 0] = 1
    assert resident_bytes() - before < 16 * MIB
    array[:4] = 1
    assert resident_bytes() - before > 16 * MIB


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 3), (4, 0, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_it_is_an_array_of_zeros_that_can_be_written(shape: tuple[int, ...], dtype: type) -> None:
    array = sparse_zeros(shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert not array.any()
    array += 1
    assert array.sum() == array.size
