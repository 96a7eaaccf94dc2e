"""Memory for keys and values, which takes room only where it was written."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def sparse_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array of zeros whose memory the system provides in pages of 4 KiB, each when it is first written.

    `numpy.zeros` asks Linux for pages of 2 MiB. A slot has many pieces of about that size, one for each layer and head,
    so the first tokens of a prompt would already take the memory of the whole slot, and the time to clear it.

    Args:
        shape: shape of the array.
        dtype: type of its values.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size == 0 or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
