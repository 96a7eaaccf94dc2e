"""GPTQ's layout: codes packed along the columns of the weight, in groups of columns that ``desc_act`` may permute.

A weight ``X.weight`` [N, K] is stored as ``X.qweight`` int32 [K · bits / 32, N], ``X.qzeros`` int32 [G, N · bits / 32],
``X.scales`` [G, N] and perhaps ``X.g_idx`` int32 [K], the group of each column. The first version of the format stores
zero points less 1. Source: GPTQModel 7.7, ``gptqmodel/nn_modules/qlinear`` and ``gptqmodel/utils/model_dequant.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats.columns import ColumnPacked
from vlpack.checkpoint.formats.detect import Declared
from vlpack.checkpoint.formats.packed import DAMAGED, FLOATS, Packed, codes_in, stored
from vlpack.errors import CheckpointError

Array = npt.NDArray[Any]

BITS = (4, 8)
"""Numbers of bits of a code that are read."""
_OF = "the format GPTQ"
"""Name of the format in error messages."""


class GptqWeight(ColumnPacked):
    """A weight in GPTQ's layout.

    Args:
        base: the checkpoint.
        module: name of the module.
        first_version: whether stored zero points are smaller by 1.
        sizes: declared bits and group size; None if they can differ from module to module.

    Raises:
        CheckpointError: a tensor is missing, or does not fit the format or the declaration.
    """

    label = "GPTQ"

    def __init__(self, base: Checkpoint, module: str, first_version: bool, sizes: tuple[int, int] | None) -> None:
        self.qweight, self.qzeros, self.scale = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
        self.first_version = first_version
        packed = stored(base, self.qweight, ["int32"], of=_OF)
        zeros, scales = stored(base, self.qzeros, ["int32"], of=_OF), stored(base, self.scale, FLOATS, of=_OF)
        shapes = (packed.shape, zeros.shape, scales.shape)
        if any(len(shape) != 2 or 0 in shape for shape in shapes):
            raise CheckpointError(
                f"{packed.file}: the tensors of {module} have the shapes {', '.join(map(str, map(list, shapes)))}; "
                f"in {_OF} they have two dimensions.",
                DAMAGED,
            )
        rows, self.groups = packed.shape[1], scales.shape[0]
        self.bits = zeros.shape[1] * 32 // rows
        if self.bits not in BITS or (sizes is not None and self.bits != sizes[0]):
            wanted = "4 or 8" if sizes is None else sizes[0]
            raise CheckpointError(
                f"{packed.file}: the tensors of {module} have {self.bits} bits per weight, and not {wanted}.", DAMAGED
            )
        cols = packed.shape[0] * 32 // self.bits
        stored(base, self.scale, FLOATS, (self.groups, rows), of=_OF)
        stored(base, self.qzeros, ["int32"], (self.groups, rows * self.bits // 32), of=_OF)
        size = -1 if sizes is None else sizes[1]
        if cols % self.groups or (sizes is not None and self.groups != (1 if size == -1 else -(-cols // size))):
            raise CheckpointError(
                f"{packed.file}: {module} has {self.groups} groups of its {cols} columns, which does not fit the "
                f"group size {size}.",
                DAMAGED,
            )
        parts = [self.qweight, self.qzeros, self.scale]
        super().__init__(base, f"{module}.weight", (rows, cols), parts)
        if f"{module}.g_idx" in base.tensors:
            self.parts = (*self.parts, f"{module}.g_idx")
            self.order = group_order(base, f"{module}.g_idx", cols, self.groups, _OF)
        if self.order is not None:
            self.obstacle = "its groups are permuted (desc_act)"

    def zero_table(self, start: int, stop: int) -> Array:
        zeros = codes_in(self.base.read(self.qzeros), self.bits)[:, start:stop]
        # 0 is stored as the largest code, which is -1 in these bits
        return (zeros + np.uint8(1)) & np.uint8((1 << self.bits) - 1) if self.first_version else zeros

    def unpack(self, words: Array, start: int, stop: int) -> Array:
        return codes_in(words[:, start:stop].T, self.bits)


def group_order(base: Checkpoint, name: str, cols: int, groups: int, of: str) -> Array | None:
    """The group of each column, int64 ``[K]``, from a checkpoint's tensor; None if groups have adjacent columns.

    Args:
        base: the checkpoint.
        name: name of the tensor.
        cols: number of columns K.
        groups: number of groups.
        of: name of the format, for errors.

    Raises:
        CheckpointError: the tensor is missing or has another type or shape, or it names a group that does not exist.
    """
    tensor = stored(base, name, ["int32", "int64"], (cols,), of=of)
    order = base.read(name).astype(np.int64)
    if order.min() < 0 or order.max() >= groups:
        bad = order.min() if order.min() < 0 else order.max()
        raise CheckpointError(f"{tensor.file}: the tensor {name} names the group {bad} of {groups} groups.", DAMAGED)
    return None if (order == np.arange(cols) // (cols // groups)).all() else order


def find(base: Checkpoint, declared: Declared) -> dict[str, Packed]:
    """The weights of a checkpoint in GPTQ's layout, by name."""
    modules = [name.removesuffix(".qweight") for name in base.tensors if name.endswith(".qweight")]
    sizes = None if declared.varies else (declared.bits, declared.group_size)
    weights = [GptqWeight(base, module, declared.first_version, sizes) for module in modules]
    return {weight.name: weight for weight in weights}
