"""FP8 weights (E4M3) with scales per block, per row or per matrix, as Qwen, compressed-tensors and ModelOpt store them.

A weight ``X.weight`` float8_e4m3fn [N, K] has scales ``X.weight_scale_inv`` or ``X.weight_scale``: [⌈N / a⌉, ⌈K / b⌉]
for blocks of a × b, [N, 1] or [N] per row, [1] or [] per matrix. Scales of the type uint8 are exponents:
2 ** (byte - 127). Experts in one tensor have names without ``.weight``, and one more axis in front. Source:
transformers 5.24, ``integrations/finegrained_fp8.py``.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats.detect import Declared
from vlpack.checkpoint.formats.packed import DAMAGED, FLOATS, Packed, check_scales, stored
from vlpack.errors import CheckpointError

Array = npt.NDArray[Any]

LARGEST = 448.0
"""Largest value of E4M3."""
EXPONENTS = ("uint8", "float8_e8m0fnu")
"""Types of scales that are powers of two."""
VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""The E4M3 value of each byte, float32 ``[256]``; looking values up is faster than converting them."""
_OF = "FP8"
"""Name of the format in error messages."""


class Fp8Weight(Packed):
    """An FP8 weight with scales.

    Args:
        base: the checkpoint.
        name: name of the weight.
        scale: name of its scales.
        extents: accepted extents of a scale: ``tensor``, ``channel``, or numbers of rows and columns.

    Raises:
        CheckpointError: the shape of the weight or of the scales does not fit.
    """

    label = "FP8"
    obstacle = "FP8 values lie on no grid of integers"

    def __init__(self, base: Checkpoint, name: str, scale: str, extents: tuple[str | tuple[int, int], ...]) -> None:
        shape = base.tensors[name].shape
        if len(shape) not in (2, 3) or 0 in shape:
            raise CheckpointError(f"{base.tensors[name].file}: the tensor {name} has the shape {list(shape)}; an FP8 "
                                  "weight is a matrix, or one for each expert.", DAMAGED)  # fmt: skip
        super().__init__(base, name, shape, [name, scale])
        self.scale = scale
        *experts, rows, cols = shape
        places: dict[tuple[int, ...], tuple[int, int]] = {}
        for extent in extents:
            if extent == "tensor":
                places |= {tuple(one): (rows, cols) for one in ([*experts], [*experts, 1], [*experts, 1, 1])}
            elif extent == "channel":
                places |= {tuple(one): (1, cols) for one in ([*experts, rows], [*experts, rows, 1])}
            elif not isinstance(extent, str):
                height, width = extent
                blocks = (*experts, -(-rows // height), -(-cols // width))
                places[blocks] = (height, width)
        found = stored(base, scale, (*FLOATS, *EXPONENTS), *places, of=_OF)
        self.block = places[found.shape]

    def rows(self, start: int, stop: int) -> Array:
        values: Array = VALUES[self.base.rows(self.name, start, stop, width=self.cols).view(np.uint8)]
        height, width = self.block
        scales = self._scales()
        per_expert = self.shape[-2]
        expert, row = np.divmod(np.arange(start, stop), per_expert)
        each = scales[expert, row // height]  # [rows, ⌈K / width⌉]
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for infinite values
            values *= np.repeat(each, width, axis=1)[:, : self.cols] if each.shape[1] > 1 else each
        return values

    def check(self) -> None:
        scales = self._scales()
        check_scales(self, scales.reshape(len(scales), -1), LARGEST)

    def _scales(self) -> Array:
        """The scales, float32 ``[experts, ⌈N / a⌉, ⌈K / b⌉]``, for one expert if the weight is a matrix."""
        scales = self.base.read(self.scale)
        height, width = self.block
        shape = (-(-self.shape[-2] // height), -(-self.cols // width))
        if scales.dtype == np.uint8:
            with np.errstate(over="ignore"):
                scales = np.exp2(scales.astype(np.float32) - np.float32(127))
        return scales.astype(np.float32).reshape(-1, *shape)


def find(base: Checkpoint, declared: Declared) -> dict[str, Packed]:
    """The FP8 weights of a checkpoint, by name.

    Raises:
        CheckpointError: a weight has no scales, or scales of a shape that is not declared.
    """
    extents: tuple[str | tuple[int, int], ...] = ("tensor", "channel")
    if declared.block is not None:
        extents = (declared.block,)
    elif declared.schemes:
        floats = [scheme for scheme in declared.schemes if scheme.kind == "float"]
        blocks = [(1, one.group_size) for one in floats if one.strategy == "group"]
        blocks += [one.block for one in floats if one.block is not None]
        extents = (*{one.strategy for one in floats if one.strategy in ("tensor", "channel")}, *blocks)
    weights: dict[str, Packed] = {}
    for name, tensor in base.tensors.items():
        if tensor.dtype.name.startswith("float8_e5m2") or tensor.dtype.name == "float8_e4m3fnuz":
            raise CheckpointError(f"{tensor.file}: the tensor {name} is of type {tensor.dtype}; FP8 weights are read "
                                  "as float8_e4m3fn only.", DAMAGED)  # fmt: skip
        if tensor.dtype.name != "float8_e4m3fn" or name.endswith(("_scale", "_scale_inv")):
            continue
        scale = next((name + end for end in ("_scale_inv", "_scale") if name + end in base.tensors), None)
        if scale is None:
            raise CheckpointError(f"{tensor.file}: the FP8 tensor {name} has no scales {name}_scale_inv or "
                                  f"{name}_scale.", DAMAGED)  # fmt: skip
        weights[name] = Fp8Weight(base, name, scale, extents)
    return weights
