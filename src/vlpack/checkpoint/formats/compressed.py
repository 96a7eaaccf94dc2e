"""The integer formats of compressed-tensors (llm-compressor): ``pack-quantized`` and ``int-quantized``.

A weight ``X.weight`` [N, K] is stored as ``X.weight_packed`` int32 [N, K · bits / 32] with ``X.weight_shape``, or as
``X.weight`` int8 [N, K]; with ``X.weight_scale`` [N, G] or [1], perhaps ``X.weight_zero_point``, packed along N or int8
[N, G], and perhaps ``X.weight_g_idx`` [K], the group of each column. Packed codes and zero points are unsigned: half
their range was added to the signed ones. Source: compressed-tensors 0.20, ``compressors/pack_quantized``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats.detect import Declared, Scheme
from vlpack.checkpoint.formats.gptq import group_order
from vlpack.checkpoint.formats.packed import DAMAGED, FLOATS, Grid, Gridded, Packed, codes_in, is_half, stored
from vlpack.errors import CheckpointError

Array = npt.NDArray[Any]

_OF = "the format compressed-tensors"
"""Name of the format in error messages."""


class CompressedWeight(Gridded):
    """A weight of 4-bit or 8-bit integers in one of the formats of compressed-tensors.

    Args:
        base: the checkpoint.
        module: name of the module.
        packed: whether codes are packed into words.
        schemes: the declared schemes; the tensors must fit one of them.

    Raises:
        CheckpointError: a tensor is missing, or does not fit the format or any scheme.
    """

    def __init__(self, base: Checkpoint, module: str, packed: bool, schemes: tuple[Scheme, ...]) -> None:
        self.packed = packed
        self.code = f"{module}.weight_packed" if packed else f"{module}.weight"
        self.scale, self.zero = f"{module}.weight_scale", f"{module}.weight_zero_point"
        parts = [self.code, self.scale]
        if packed:
            parts.append(f"{module}.weight_shape")
            shape, self.bits = _packed_shape(base, module)
        else:
            shape, self.bits = stored(base, self.code, ["int8"], of=_OF).shape, 8
        where = base.tensors[self.code].file
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{where}: {module} has the shape {list(shape)}; only matrices are read.", DAMAGED)
        rows, cols = shape
        scales = stored(base, self.scale, FLOATS, of=_OF)
        self.groups = scales.shape[1] if len(scales.shape) == 2 else 1
        self.whole = scales.shape in ((), (1,)) and rows != 1  # one scale for the whole matrix
        scheme = _fitting(schemes, self.bits if packed else None, scales.shape, (rows, cols))
        if scheme is None:
            raise CheckpointError(
                f"{where}: the tensors of {module} have {self.bits} bits and scales of the shape "
                f"{list(scales.shape)}, which fits no entry of config_groups.",
                DAMAGED,
            )
        super().__init__(base, f"{module}.weight", (rows, cols), parts)
        self.label = "compressed-tensors pack-quantized" if packed else "compressed-tensors int-quantized"
        self.symmetric = self.zero not in base.tensors
        if self.symmetric and not scheme.symmetric:
            raise CheckpointError(f"{where}: {module} has no weight_zero_point, which its scheme needs.", DAMAGED)
        if not self.symmetric:
            self.parts = (*self.parts, self.zero)
            self._check_zeros()
        if f"{module}.weight_g_idx" in base.tensors:
            self.parts = (*self.parts, f"{module}.weight_g_idx")
            if (base.read(f"{module}.weight_g_idx") != -1).all():  # -1 stands for groups in the order of the columns
                self.order = group_order(base, f"{module}.weight_g_idx", cols, self.groups, _OF)
        if self.order is not None:
            self.obstacle = "its groups are permuted (actorder)"

    @property
    def grid(self) -> Grid | None:
        if self.obstacle:
            return None
        half = is_half(self.base, self.scale)
        return Grid(self.bits, self.group, self.symmetric, half, rounded_inputs=not self.packed)

    def codes(self, start: int, stop: int) -> Array:
        stored_rows = self.base.rows(self.code, start, stop)
        if self.packed:
            return codes_in(stored_rows, self.bits)[:, : self.cols]
        return np.asarray(stored_rows.view(np.uint8) ^ np.uint8(128))

    def scales(self, start: int, stop: int) -> Array:
        if self.whole:
            return np.full((stop - start, 1), self.base.read(self.scale).reshape(-1)[0], np.float32)
        scales: Array = self.base.rows(self.scale, start, stop, width=self.groups).astype(np.float32)
        return scales

    def zeros(self, start: int, stop: int) -> Array:
        if self.symmetric:
            return np.full((stop - start, self.groups), 1 << (self.bits - 1), np.uint8)
        if self.base.tensors[self.zero].dtype == np.int8:
            signed = np.broadcast_to(self.base.read(self.zero).reshape(-1, self.groups), (self.count, self.groups))
            return np.asarray(signed[start:stop].astype(np.int16) + (1 << (self.bits - 1)), np.uint8)
        per_word = 32 // self.bits
        low = start // per_word
        words = self.base.rows(self.zero, low, -(-stop // per_word))
        return np.asarray(codes_in(words.T, self.bits).T[start - low * per_word : stop - low * per_word])

    def _check_zeros(self) -> None:
        rows, groups = self.count, self.groups
        zero = stored(self.base, self.zero, ["int8", "int32"] if self.packed else ["int8"], of=_OF)
        wanted = {(rows, groups)} | ({(rows,), (1,), ()} if groups == 1 else set())
        if zero.dtype == np.int32:
            wanted = {(-(-rows * self.bits // 32), groups)}
        if zero.shape not in wanted:
            raise CheckpointError(
                f"{zero.file}: the tensor {self.zero} has the shape {list(zero.shape)}; in {_OF} it must be "
                f"{list(next(iter(wanted)))}.",
                DAMAGED,
            )
        if zero.dtype == np.int8 and self.bits == 4:
            values = self.base.read(self.zero)
            if values.size and (values.min() < -8 or values.max() > 7):
                raise CheckpointError(f"{zero.file}: the tensor {self.zero} has values outside of 4 bits.", DAMAGED)


def _packed_shape(base: Checkpoint, module: str) -> tuple[tuple[int, ...], int]:
    """The shape ``[N, K]`` and the bits of a packed weight, from its ``weight_shape`` and its number of words."""
    packed = stored(base, f"{module}.weight_packed", ["int32"], of=_OF)
    stored(base, f"{module}.weight_shape", ["int64", "int32"], (2,), of=_OF)
    rows, cols = (int(size) for size in base.read(f"{module}.weight_shape"))
    for bits in (4, 8):
        if rows > 0 and cols > 0 and packed.shape == (rows, -(-cols * bits // 32)):
            return (rows, cols), bits
    raise CheckpointError(
        f"{packed.file}: the tensor {module}.weight_packed has the shape {list(packed.shape)}, which does not fit "
        f"{module}.weight_shape, {rows} × {cols}.",
        DAMAGED,
    )


def _fitting(
    schemes: tuple[Scheme, ...], bits: int | None, scales: tuple[int, ...], shape: tuple[int, int]
) -> Scheme | None:
    """The first integer scheme that fits a weight's bits and the shape of its scales; symmetric ones are tried first.

    Args:
        schemes: the declared schemes.
        bits: bits of a code; None if the tensors do not show them.
        scales: shape of the scales.
        shape: shape ``(N, K)`` of the weight.

    Returns:
        The scheme; None if none fits.
    """
    rows, cols = shape
    for scheme in sorted(schemes, key=lambda scheme: not scheme.symmetric):
        fits = {
            "tensor": scales in ((), (1,)),
            "channel": scales in ((rows,), (rows, 1)),
            "group": scheme.group_size > 0
            and cols % scheme.group_size == 0
            and scales == (rows, cols // max(scheme.group_size, 1)),
            "block": False,
        }[scheme.strategy]
        if scheme.kind == "int" and fits and bits in (None, scheme.bits):
            return scheme
    return None


def find(base: Checkpoint, declared: Declared) -> dict[str, Packed]:
    """The integer weights of a checkpoint in the formats of compressed-tensors, by name.

    Raises:
        CheckpointError: the tensors of a weight do not fit the format or its declaration.
    """
    weights: dict[str, Packed] = {}
    for name, tensor in base.tensors.items():
        module, _, end = name.rpartition(".")
        if end == "weight_packed":
            weights[f"{module}.weight"] = CompressedWeight(base, module, True, declared.schemes)
        elif end == "weight" and tensor.dtype == np.int8 and f"{module}.weight_scale" in base.tensors:
            weights[name] = CompressedWeight(base, module, False, declared.schemes)
    return weights
