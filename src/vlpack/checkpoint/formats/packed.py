"""A quantized weight of a checkpoint: its stored tensors, its values, and its grid of codes if it has one.

Values are computed in fp32, as the formats' own libraries do when they load a model in fp32. A product of a code and
a scale in 16 bits is exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.files import quote
from vlpack.checkpoint.safetensors import TensorInfo
from vlpack.errors import CheckpointError

Array = npt.NDArray[Any]

FLOATS = ("float16", "bfloat16", "float32")
"""Types that scales may have."""
DAMAGED = "The config and the weights do not belong together, or the checkpoint is damaged; download it again."
"""Hint of errors about tensors that do not fit the declaration."""


@dataclass(frozen=True)
class Grid:
    """The grid of a weight ``[N, K]``: ``value = (code - zero) · scale``, with unsigned codes of ``bits`` bits.

    Args:
        bits: bits of a code, 4 or 8.
        group: number of adjacent columns that share a scale and a zero point; K if there is one for each row.
        symmetric: whether all zero points are the middle code ``2 ** (bits - 1)``.
        half: whether every scale is exact in float16.
        rounded_inputs: whether the original model also quantizes the inputs of the weight to 8 bits (w8a8).
    """

    bits: int
    group: int
    symmetric: bool
    half: bool
    rounded_inputs: bool = False


class Packed(ABC):
    """A quantized weight of a checkpoint ``base``, read by rows.

    Args:
        base: the checkpoint with the stored tensors.
        name: name of the weight in an unquantized checkpoint, such as ``model.layers.0.mlp.up_proj.weight``.
        shape: its shape in an unquantized checkpoint; the last axis has size K, and the others count rows.
        parts: names of the stored tensors that it consists of.

    Attributes:
        label: name of the format for users.
        obstacle: reason why the weight has no grid that can be stored as it is; empty if it has one.
    """

    label = ""
    obstacle = ""

    def __init__(self, base: Checkpoint, name: str, shape: Sequence[int], parts: Sequence[str]) -> None:
        self.base, self.name, self.shape, self.parts = base, name, tuple(shape), tuple(parts)

    @property
    def cols(self) -> int:
        """Number of columns K."""
        return self.shape[-1]

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(np.prod(self.shape[:-1]))

    @property
    def info(self) -> TensorInfo:
        """The entry of the dequantized weight for a table of tensors: float32, with no bytes of its own in a file."""
        stored = self.base.tensors[self.parts[0]]
        return TensorInfo(self.name, np.dtype(np.float32), self.shape, stored.file, 0, 4 * int(np.prod(self.shape)))

    @property
    def grid(self) -> Grid | None:
        """The grid; None if the weight has none that can be stored as it is."""
        return None

    @abstractmethod
    def rows(self, start: int, stop: int) -> Array:
        """The values of rows ``[start, stop)``, float32 ``[stop - start, K]``."""

    def codes(self, start: int, stop: int) -> Array:
        """The codes of rows ``[start, stop)``, uint8 ``[stop - start, K]``; only for a weight with a grid."""
        raise NotImplementedError

    def scales(self, start: int, stop: int) -> Array:
        """The scales of rows ``[start, stop)``, float32 ``[stop - start, groups]``; only for a weight with a grid."""
        raise NotImplementedError

    def zeros(self, start: int, stop: int) -> Array:
        """The zero points of rows ``[start, stop)``, uint8 ``[stop - start, groups]``; only if there is a grid."""
        raise NotImplementedError

    @abstractmethod
    def check(self) -> None:
        """Reads the small tensors, such as scales, and checks their values.

        Raises:
            CheckpointError: a value is NaN, infinite or out of range.
        """


class Gridded(Packed):
    """A weight with codes, scales and zero points, which subclasses read.

    Attributes:
        bits: bits of a code.
        groups: number of groups G of a row; column k belongs to group ``k // (K / G)`` unless ``order`` says otherwise.
        order: group of each column, ``[K]``; None for adjacent columns.
    """

    bits: int
    groups: int
    order: Array | None = None

    @property
    def group(self) -> int:
        """Number of columns of a group."""
        return self.cols // self.groups

    def rows(self, start: int, stop: int) -> Array:
        values = self.codes(start, stop).astype(np.float32)
        scales, zeros = self.scales(start, stop), self.zeros(start, stop).astype(np.float32)
        if self.order is not None:
            values -= zeros[:, self.order]
            with np.errstate(over="ignore", invalid="ignore"):
                values *= scales[:, self.order]
            return values
        grouped = values.reshape(stop - start, self.groups, self.group)
        grouped -= zeros[:, :, None]
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for infinite values
            grouped *= scales[:, :, None]
        return values

    def check(self) -> None:
        for start in range(0, self.count, step := max(1, (1 << 22) // self.groups)):
            scales = self.scales(start, min(start + step, self.count))
            check_scales(self, scales, (1 << self.bits) - 1, start)


def check_scales(weight: Packed, scales: Array, largest: float, first_row: int = 0) -> None:
    """Checks that scales, and their products with values up to ``largest``, are finite.

    Args:
        weight: the weight, for messages.
        scales: scales ``[rows, groups]``.
        largest: largest magnitude that a scale is multiplied by.
        first_row: index of the first row, for messages.

    Raises:
        CheckpointError: a scale or a product is NaN or infinite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        bad = ~np.isfinite(scales * np.float32(largest))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise CheckpointError(
            f"{weight.base.tensors[weight.parts[0]].file}: the scale {scales[row, column]} of {weight.name}, at row "
            f"{first_row + row}, group {column}, is not usable: its products are not finite.",
            "The checkpoint is damaged; download or save it again.",
        )


def stored(base: Checkpoint, name: str, dtypes: Sequence[str], *shapes: Sequence[int], of: str) -> TensorInfo:
    """Checks the type and shape of a stored tensor, and returns its entry.

    Args:
        base: the checkpoint.
        name: name of the tensor.
        dtypes: the types that it may have.
        shapes: the shapes that it may have; any if none is given.
        of: name of the format, for the error.

    Raises:
        CheckpointError: the tensor is missing, or has another type or shape.
    """
    tensor = base.tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{base.folder} has no tensor {quote(name)}, which {of} needs.", DAMAGED)
    if tensor.dtype.name not in dtypes:
        raise CheckpointError(
            f"{tensor.file}: the tensor {quote(name)} is of type {tensor.dtype}; in {of} it is {' or '.join(dtypes)}.",
            DAMAGED,
        )
    if shapes and tensor.shape not in [tuple(shape) for shape in shapes]:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(
            f"{tensor.file}: the tensor {quote(name)} has the shape {list(tensor.shape)}; in {of} it must be {wanted}.",
            DAMAGED,
        )
    return tensor


def is_half(base: Checkpoint, name: str) -> bool:
    """Whether the dtype of the stored tensor ``name`` is float16."""
    return base.tensors[name].dtype == np.float16


def nibbles(words: Array) -> Array:
    """The eight 4-bit codes of each word ``[.., n]`` of 32 bits, low bits first: uint8 ``[.., 8 · n]``."""
    octets = octets_of(words)
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)


def octets_of(words: Array) -> Array:
    """The four bytes of each word ``[.., n]`` of 32 bits, low bits first: uint8 ``[.., 4 · n]``."""
    octets: Array = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    return octets


def codes_in(words: Array, bits: int) -> Array:
    """The codes of ``bits`` (4 or 8) bits in words ``[.., n]`` of 32 bits, low bits first: uint8."""
    return nibbles(words) if bits == 4 else octets_of(words)
