"""Quantized matrices of GGUF files: each row is a sequence of blocks, which hold codes together with their scales.

Q4_0 and Q8_0 have a grid, ``(code - zero) · scale`` in blocks of 32 with scales in float16. A value of the other types
is a sum of products of several numbers, which no kernel can represent. `vlpack.checkpoint.gguf` reads the files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats.detect import Declared
from vlpack.checkpoint.formats.packed import Grid, Gridded, Packed, check_scales
from vlpack.checkpoint.gguf import Gguf
from vlpack.checkpoint.gguf.types import BlockType

Array = npt.NDArray[Any]

_SLAB = 1 << 22
"""Number of values whose scales are checked at a time."""


class GgufWeight(Gridded):
    """A matrix of a GGUF file that is stored in blocks of one type.

    Args:
        base: the checkpoint.
        name: name of the weight.
        kind: type of its blocks.
    """

    def __init__(self, base: Checkpoint, name: str, kind: BlockType) -> None:
        rows, octets = base.tensors[name].shape
        self.kind, self.bits, self.label = kind, kind.bits, f"GGUF {kind.name}"
        super().__init__(base, name, (rows, octets // kind.block.itemsize * kind.values), (name,))
        self.groups = self.cols // kind.values
        if not kind.has_grid:
            self.obstacle = f"{kind.name} is not a grid of codes with one scale per block"

    @property
    def grid(self) -> Grid | None:
        if not self.kind.has_grid:
            return None
        # llama.cpp rounds the inputs of these types to 8 bits, in blocks of the same size
        return Grid(self.bits, self.kind.values, symmetric=True, half=True, rounded_inputs=True)

    def rows(self, start: int, stop: int) -> Array:
        return self.kind.dequantized(self.base.rows(self.name, start, stop))

    def codes(self, start: int, stop: int) -> Array:
        return self.kind.codes(self.base.rows(self.name, start, stop))

    def scales(self, start: int, stop: int) -> Array:
        blocks = self.kind.blocks(self.base.rows(self.name, start, stop))
        return np.concatenate([blocks[name] for name in self.kind.scales], axis=1).astype(np.float32)

    def zeros(self, start: int, stop: int) -> Array:
        return np.full((stop - start, self.groups), 1 << (self.bits - 1), np.uint8)

    def check(self) -> None:
        # scales of 16 bits and codes of at most 8 have products far below the largest float32
        for start in range(0, self.count, step := max(1, _SLAB // self.cols)):
            check_scales(self, self.scales(start, min(start + step, self.count)), 1.0, start)


def find(base: Checkpoint, declared: Declared) -> dict[str, Packed]:
    """The matrices of a GGUF file that are stored in blocks, by name."""
    blocks = base.blocks if isinstance(base, Gguf) else {}
    return {name: GgufWeight(base, name, kind) for name, kind in blocks.items()}
