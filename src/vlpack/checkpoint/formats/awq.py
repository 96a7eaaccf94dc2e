"""AWQ's layout ``gemm``: 4-bit codes packed along the rows of the weight, interleaved within each 32-bit word.

A weight ``X.weight`` [N, K] is stored as ``X.qweight`` int32 [K, N / 8], ``X.qzeros`` int32 [G, N / 8] and ``X.scales``
[G, N], for G groups of adjacent columns. Source: AutoAWQ 0.2.9, ``awq/modules/linear/gemm.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats.columns import ColumnPacked
from vlpack.checkpoint.formats.detect import Declared
from vlpack.checkpoint.formats.packed import DAMAGED, FLOATS, Packed, nibbles, stored
from vlpack.errors import CheckpointError

Array = npt.NDArray[Any]

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""For each of the eight rows of the weight that a word holds: the index of its 4-bit code in the word."""
_OF = "the format AWQ gemm"
"""Name of the format in error messages."""


class AwqWeight(ColumnPacked):
    """A weight in AWQ's layout ``gemm``.

    Args:
        base: the checkpoint.
        module: name of the module.
        group_size: declared number of columns that share a scale; -1 for one scale per row.

    Raises:
        CheckpointError: a tensor is missing, or its type or shape does not fit the format.
    """

    label = "AWQ"
    bits = 4

    def __init__(self, base: Checkpoint, module: str, group_size: int) -> None:
        self.qweight, self.qzeros, self.scale = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
        packed = stored(base, self.qweight, ["int32"], of=_OF)
        if len(packed.shape) != 2 or 0 in packed.shape:
            raise CheckpointError(f"{packed.file}: the tensor {self.qweight} has the shape {list(packed.shape)}; "
                                  f"in {_OF} it has two dimensions.", DAMAGED)  # fmt: skip
        cols, rows = packed.shape[0], packed.shape[1] * 8
        size = cols if group_size == -1 else group_size
        if cols % size:
            raise CheckpointError(
                f"{packed.file}: the tensor {self.qweight} has {cols} rows, which groups of {size} do not divide.",
                DAMAGED,
            )
        self.groups = cols // size
        stored(base, self.qzeros, ["int32"], (self.groups, rows // 8), of=_OF)
        stored(base, self.scale, FLOATS, (self.groups, rows), of=_OF)
        super().__init__(base, f"{module}.weight", (rows, cols), (self.qweight, self.qzeros, self.scale))

    def zero_table(self, start: int, stop: int) -> Array:
        return _columns(self.base.read(self.qzeros), start, stop)

    def unpack(self, words: Array, start: int, stop: int) -> Array:
        return np.asarray(_columns(words, start, stop).T)


def _columns(words: Array, start: int, stop: int) -> Array:
    """Unpacks columns ``[start, stop)`` of the codes in words ``[k, N / 8]``: uint8 ``[k, stop - start]``."""
    low = start // 8
    codes = nibbles(words[:, low : -(-stop // 8)]).reshape(len(words), -1, 8)
    ordered: Array = codes[:, :, PLACES].reshape(len(words), -1)[:, start - 8 * low : stop - 8 * low]
    return ordered


def find(base: Checkpoint, declared: Declared) -> dict[str, Packed]:
    """The weights of a checkpoint in AWQ's layout, by name."""
    modules = [name.removesuffix(".qweight") for name in base.tensors if name.endswith(".qweight")]
    weights = [AwqWeight(base, module, declared.group_size) for module in modules]
    return {weight.name: weight for weight in weights}
