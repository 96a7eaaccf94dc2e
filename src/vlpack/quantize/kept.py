"""Matrices of a quantized checkpoint that keep their codes: which storage holds them, and how they are read.

A kept matrix is neither balanced nor rotated, because both would change its values. Its storage is a rule of the policy
like any other. The rules are written into a package's manifest, so they can be read without the quantized checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats import Grid, Packed
from vlpack.checkpoint.rows import Alternating, Part, Rows, Source, Stacked
from vlpack.errors import CheckpointError
from vlpack.quantize.storage import Blocks, ChannelInt8, Storage

Array = npt.NDArray[Any]

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 16
"""Largest and smallest number of values that share a scale in a kernel's blocks."""
CHANNEL_ROLES = ("text.linear", "vision.linear", "vision.output")
"""Roles of weights that can be stored in 8 bits with one scale per channel."""


@dataclass(frozen=True)
class KeptRows:
    """The codes, scales and zero points of a matrix whose rows come from one or more quantized tensors.

    Args:
        source: the rows of the matrix in the checkpoint.
        checkpoint: the quantized checkpoint.
    """

    source: Rows
    checkpoint: Checkpoint

    def codes(self, start: int, stop: int) -> Array:
        """Unsigned codes of rows ``[start, stop)``, uint8 ``[stop - start, K]``."""
        return self.source.read(_View(self.checkpoint, "codes"), start, stop)

    def scales(self, start: int, stop: int) -> Array:
        """Scales of rows ``[start, stop)``, float32 ``[stop - start, G]``."""
        return self.source.read(_View(self.checkpoint, "scales"), start, stop)

    def zeros(self, start: int, stop: int) -> Array:
        """Zero points of rows ``[start, stop)``, uint8 ``[stop - start, G]``."""
        return self.source.read(_View(self.checkpoint, "zeros"), start, stop)


class _View:
    """A view of a checkpoint whose tensors are the codes, scales or zero points of its quantized tensors.

    Args:
        checkpoint: the quantized checkpoint.
        what: ``codes``, ``scales`` or ``zeros``.
    """

    def __init__(self, checkpoint: Checkpoint, what: str) -> None:
        self._checkpoint, self._what = checkpoint, what

    def rows(self, name: str, start: int, stop: int, *, width: int | None = None) -> Array:
        packed = self._checkpoint.packed(name)
        if packed is None:
            raise CheckpointError(f"{self._checkpoint.folder}: the tensor {name} is not quantized.")
        rows: Array = getattr(packed, self._what)(start, stop)
        return rows


def common_grid(source: Rows, checkpoint: Checkpoint) -> tuple[Grid | None, str]:
    """The grid that all rows of a matrix share, or the reason why they share none.

    Args:
        source: the rows of the matrix.
        checkpoint: the quantized checkpoint.

    Returns:
        The grid or None, and the reason, which is empty if there is a grid or if no tensor of the matrix is quantized.
    """
    names = [tensor.name for tensor in source.tensors()]
    packed: list[Packed | None] = [checkpoint.packed(name) for name in names]
    there = [one for one in packed if one is not None]
    if not there:
        return None, ""
    if len(there) < len(packed):
        return None, "only some of its parts are quantized"
    grids: dict[Grid, None] = {}
    for one in there:
        grid = one.grid
        if grid is None:
            return None, one.obstacle
        grids[replace(grid, symmetric=True, half=True)] = None
    if len(grids) > 1:
        return None, "its parts have different grids"
    if not _reads_rows(source):
        return None, "its rows are columns of the checkpoint's tensor"
    found = [one.grid for one in there if one.grid is not None]
    return replace(found[0], symmetric=all(grid.symmetric for grid in found), half=all(grid.half for grid in found)), ""


def _reads_rows(source: Rows) -> bool:
    """Whether each row of a matrix is a row of one of the checkpoint's tensors, and not a column."""
    match source:
        case Source():
            return True
        case Part():
            return _reads_rows(source.whole)
        case Stacked():
            return all(map(_reads_rows, source.parts))
        case Alternating():
            return _reads_rows(source.first) and _reads_rows(source.second)
        case _:
            return False


def kept_storage(
    grid: Grid, cols: int, chosen: Storage, role: str, provider: str, bits: Iterable[int]
) -> tuple[Blocks | ChannelInt8 | None, str]:
    """The storage that holds a matrix's codes unchanged, or the reason why there is none.

    Args:
        grid: the matrix's grid.
        cols: its number of columns.
        chosen: the storage that the policy gives it.
        role: its role.
        provider: execution provider of the package.
        bits: numbers of bits that are kept even if the policy's storage has another number.

    Returns:
        The storage and an empty text, or None and the reason.
    """
    if not isinstance(chosen, Blocks | ChannelInt8):
        return None, f"the precision stores it in {chosen.label}"
    own = chosen.bits if isinstance(chosen, Blocks) else 8
    whole = grid.group == cols
    # a group that is larger than a block becomes several blocks with the same scale
    size = cols if whole and cols % SMALLEST_BLOCK == 0 else LARGEST_BLOCK // 2 if whole else grid.group
    block = min(size & -size, LARGEST_BLOCK)
    dtype = chosen.dtype if isinstance(chosen, Blocks) else "float32"
    obstacles = {
        f"it has {grid.bits} bits there and {own} here": grid.bits not in (own, *bits),
        f"{provider} multiplies only 4-bit codes": provider != "cpu" and grid.bits != 4,
        # rounding 8-bit weights again, with rotation, loses less than rounding inputs that are not rotated
        # (docs/results.md)
        "8 bits with rotation are nearer to the checkpoint, whose inputs are not rounded": grid.bits == 8
        and not grid.rounded_inputs,
        f"groups of {grid.group} columns do not fit the kernel's blocks": block < SMALLEST_BLOCK
        or (role == "text.expert" and cols % block != 0),
        f"its scales would lose digits in float16, which {provider} needs": dtype == "float16" and not grid.half,
    }
    for why, hinders in obstacles.items():
        if hinders:
            return None, why
    if whole and grid.bits == 8 and grid.symmetric and role in CHANNEL_ROLES and provider == "cpu":
        return ChannelInt8(not isinstance(chosen, ChannelInt8) or chosen.signed, kept=True), ""
    level = chosen.accuracy_level if isinstance(chosen, Blocks) else 4
    return Blocks(grid.bits, block, grid.symmetric, dtype, level, kept=True), ""


def holds(storage: Storage, source: Rows, checkpoint: Checkpoint) -> bool:
    """Whether a matrix of a checkpoint still has the grid that a storage of kept codes was made for."""
    grid, _ = common_grid(source, checkpoint)
    if grid is None or not isinstance(storage, Blocks | ChannelInt8):
        return False
    if isinstance(storage, ChannelInt8):
        return (grid.bits, grid.symmetric, grid.group) == (8, True, source.cols)
    fits = grid.group == source.cols or grid.group % storage.block_size == 0
    return (grid.bits, grid.symmetric) == (storage.bits, storage.symmetric) and fits


def as_rule(modules: str, layers: Sequence[int] | None, storage: Blocks | ChannelInt8) -> dict[str, Any]:
    """The rule for the storage of kept matrices as JSON-like data, for the manifest.

    Args:
        modules: pattern of the paths of the matrices.
        layers: indices of their layers; None if they are in no layer.
        storage: their storage.
    """
    rule: dict[str, Any] = {"modules": modules, "layers": None if layers is None else list(layers)}
    if isinstance(storage, ChannelInt8):
        return {**rule, "bits": 8, "signed": storage.signed}
    blocks = {"block_size": storage.block_size, "symmetric": storage.symmetric}
    return {**rule, "bits": storage.bits, **blocks, "accuracy_level": storage.accuracy_level}


def storage_of(rule: Mapping[str, Any], dtype: str) -> Blocks | ChannelInt8:
    """The storage in a rule that `as_rule` made.

    Args:
        rule: the rule.
        dtype: dtype of the activations.
    """
    if "block_size" not in rule:
        return ChannelInt8(rule["signed"], kept=True)
    bits, size, symmetric, level = (rule[key] for key in ("bits", "block_size", "symmetric", "accuracy_level"))
    return Blocks(bits, size, symmetric, dtype, level, kept=True)
