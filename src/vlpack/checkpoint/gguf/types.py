"""The types of GGUF's tensors: the layout of their blocks of bytes, and how values are computed from a block.

A row of a quantized tensor is a sequence of blocks. Each type is described by a structured dtype of one block, and by a
function from an array of blocks to float32 values. Products and sums are those of ggml's ``ggml-quants.c``, in the same
order, so that the values are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FLOATS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    30: np.dtype(ml_dtypes.bfloat16),
}
"""The types whose values are stored one by one, by their numbers in the format."""

REFUSED: dict[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""Names of the types that are not read, for messages."""


@dataclass(frozen=True)
class BlockType:
    """A type whose values are stored in blocks.

    Args:
        name: name of the type, such as ``Q4_0``.
        bits: bits of a code.
        values: number of values in a block.
        block: dtype of a block.
        decode: function from blocks ``[..]`` to values, float32 ``[.., values]``.
        scales: names of the fields with the scales of a block, float16.
        has_grid: whether a value is ``(code - zero) · scale``, with one scale per block and the middle code as the
            zero point.
    """

    name: str
    bits: int
    values: int
    block: np.dtype[Any]
    decode: Callable[[Array], Array]
    scales: tuple[str, ...] = ("d",)
    has_grid: bool = False

    def blocks(self, rows: Array) -> Array:
        """The blocks of rows of bytes, ``[n, bytes]`` → ``[n, blocks]``."""
        return np.ascontiguousarray(rows).view(self.block)

    def dequantized(self, rows: Array) -> Array:
        """The values of rows of bytes, ``[n, bytes]`` → float32 ``[n, blocks · values]``."""
        blocks = self.blocks(rows)
        with np.errstate(over="ignore", invalid="ignore"):  # infinite scales are reported where they are checked
            return self.decode(blocks).reshape(len(rows), blocks.shape[1] * self.values)

    def codes(self, rows: Array) -> Array:
        """The unsigned codes of rows of bytes, uint8 ``[n, blocks · values]``; only for a type with a grid."""
        blocks = self.blocks(rows)
        codes = _halves(blocks["q"]) if self.bits == 4 else blocks["q"].view(np.uint8) ^ np.uint8(128)
        return codes.reshape(len(rows), -1)


def _fields(octets: Array, shifts: Sequence[int], mask: int) -> Array:
    """The bit fields at several places of each byte, ``[.., n]`` → ``[.., len(shifts), n]``."""
    fields: Array = (octets[..., None, :] >> np.array(shifts, np.uint8)[:, None]) & np.uint8(mask)
    return fields


def _halves(octets: Array) -> Array:
    """All low halves of bytes, then all high halves, ``[.., n]`` → ``[.., 2 · n]``."""
    return _fields(octets, (0, 4), 15).reshape(*octets.shape[:-1], -1)


def _wide(field: Array) -> Array:
    """A field of each block in float32, with an axis for the values of the block."""
    return field.astype(np.float32)[..., None]


def _q4_0(b: Array) -> Array:
    return _wide(b["d"]) * (_halves(b["q"]).astype(np.float32) - 8)


def _q4_1(b: Array) -> Array:
    return _wide(b["d"]) * _halves(b["q"]).astype(np.float32) + _wide(b["m"])


def _q5(b: Array) -> Array:
    """The 5-bit codes of Q5_0 and Q5_1 in float32, from the four low bits in ``q`` and the highest bits in ``h``."""
    high = np.unpackbits(b["h"], axis=-1, bitorder="little")
    codes: Array = _halves(b["q"]) | high << 4
    return codes.astype(np.float32)


def _q5_0(b: Array) -> Array:
    values: Array = _wide(b["d"]) * (_q5(b) - 16)
    return values


def _q5_1(b: Array) -> Array:
    return _wide(b["d"]) * _q5(b) + _wide(b["m"])


def _q8_0(b: Array) -> Array:
    return b["q"].astype(np.float32) * _wide(b["d"])


def _sub_blocks(b: Array, codes: Array, count: int) -> Array:
    """Codes in float32, grouped by the sub-blocks of each block: ``[.., count, 256 / count]``."""
    return codes.reshape(*b.shape, count, 256 // count).astype(np.float32)


def _pairs_of_bits(b: Array) -> Array:
    """The 2-bit codes of Q2_K and Q3_K."""
    return _fields(b["q"].reshape(*b.shape, 2, 32), (0, 2, 4, 6), 3)


def _q2_k(b: Array) -> Array:
    scale = _wide(b["d"]) * (b["s"] & 15).astype(np.float32)
    least = _wide(b["m"]) * (b["s"] >> 4).astype(np.float32)
    values: Array = scale[..., None] * _sub_blocks(b, _pairs_of_bits(b), 16) - least[..., None]
    return values


def _q3_k(b: Array) -> Array:
    low = _halves(b["s"][..., :8])
    high = _fields(b["s"][..., 8:], (0, 2, 4, 6), 3).reshape(*b.shape, 16)
    scale = _wide(b["d"]) * ((low | high << 4).astype(np.float32) - 32)
    clear = _fields(b["h"], range(8), 1) ^ 1  # a bit that is not set stands for -4
    codes = _sub_blocks(b, _pairs_of_bits(b), 16) - 4 * _sub_blocks(b, clear, 16)
    values: Array = scale[..., None] * codes
    return values


def _scales_and_minima(b: Array) -> tuple[Array, Array]:
    """Scales and minima of the eight sub-blocks of Q4_K and Q5_K, of 6 bits each in 12 bytes: float32 ``[.., 8]``."""
    first, second, third = (b["s"][..., place : place + 4] for place in (0, 4, 8))
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return _wide(b["d"]) * scales.astype(np.float32), _wide(b["m"]) * minima.astype(np.float32)


def _q4_k(b: Array) -> Array:
    scales, minima = _scales_and_minima(b)
    codes = _halves(b["q"].reshape(*b.shape, 4, 32))
    return scales[..., None] * _sub_blocks(b, codes, 8) - minima[..., None]


def _q5_k(b: Array) -> Array:
    scales, minima = _scales_and_minima(b)
    low = _halves(b["q"].reshape(*b.shape, 4, 32)).reshape(*b.shape, 8, 32)
    codes = low | _fields(b["h"], range(8), 1) << 4
    return scales[..., None] * _sub_blocks(b, codes, 8) - minima[..., None]


def _q6_k(b: Array) -> Array:
    low = _halves(b["q"].reshape(*b.shape, 2, 64)).reshape(*b.shape, 8, 32)
    high = _fields(b["h"].reshape(*b.shape, 2, 32), (0, 2, 4, 6), 3).reshape(*b.shape, 8, 32)
    scales = _wide(b["d"]) * b["s"].astype(np.float32)
    values: Array = scales[..., None] * (_sub_blocks(b, low | high << 4, 16) - 32)
    return values


def _block(*fields: tuple[str, str, int]) -> np.dtype[Any]:
    """The structured dtype of a block, from the name, dtype and size of each field."""
    return np.dtype([(name, kind) if size == 1 else (name, kind, (size,)) for name, kind, size in fields])


_D, _M = ("d", "<f2", 1), ("m", "<f2", 1)
"""The fields with the scale and the minimum (or the scale of minima) of a block."""
BLOCKS: dict[int, BlockType] = {
    2: BlockType("Q4_0", 4, 32, _block(_D, ("q", "u1", 16)), _q4_0, has_grid=True),
    3: BlockType("Q4_1", 4, 32, _block(_D, _M, ("q", "u1", 16)), _q4_1, ("d", "m")),
    6: BlockType("Q5_0", 5, 32, _block(_D, ("h", "u1", 4), ("q", "u1", 16)), _q5_0),
    7: BlockType("Q5_1", 5, 32, _block(_D, _M, ("h", "u1", 4), ("q", "u1", 16)), _q5_1, ("d", "m")),
    8: BlockType("Q8_0", 8, 32, _block(_D, ("q", "i1", 32)), _q8_0, has_grid=True),
    10: BlockType("Q2_K", 2, 256, _block(("s", "u1", 16), ("q", "u1", 64), _D, _M), _q2_k, ("d", "m")),
    11: BlockType("Q3_K", 3, 256, _block(("h", "u1", 32), ("q", "u1", 64), ("s", "u1", 12), _D), _q3_k),
    12: BlockType("Q4_K", 4, 256, _block(_D, _M, ("s", "u1", 12), ("q", "u1", 128)), _q4_k, ("d", "m")),
    13: BlockType(
        "Q5_K", 5, 256, _block(_D, _M, ("s", "u1", 12), ("h", "u1", 32), ("q", "u1", 128)), _q5_k, ("d", "m")
    ),
    14: BlockType("Q6_K", 6, 256, _block(("q", "u1", 128), ("h", "u1", 64), ("s", "i1", 16), _D), _q6_k),
}
"""The types whose values are stored in blocks, by their numbers in the format."""
READ = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K"
"""Names of the types that are read, for messages."""
