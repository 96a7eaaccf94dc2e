"""Which channels of a model can be rescaled, or rotated within the weights, without changing what it computes.

Modules list their own in a method ``channels()``; `vlpack.export.graph` turns them into what is done to each weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnxscript import nn

from vlpack.layers.linear import Linear, Stored


@dataclass(frozen=True)
class NormChannels:
    """A norm's outputs, which only ``readers`` multiply.

    Args:
        norm: with a parameter ``weight``, perhaps also ``bias``.
        readers: all modules that are given the norm's output.
        repeats: how often the channels come side by side in a reader's input (patches that are joined).
    """

    norm: nn.Module
    readers: Sequence[Stored]
    repeats: int = 1


@dataclass(frozen=True)
class RowChannels:
    """Rows of one matrix, which reach another by operations that are linear in them.

    Args:
        producer: the matrix, with its bias.
        first: the first of its rows that is a channel.
        reader: the only matrix that multiplies them.
        shape: see `vlpack.quantize.transforms.Channels`.
        mixes: blocks of ``shape[2]`` channels may be rotated in producer and reader, as what lies between treats all
            channels of a block alike.
    """

    producer: Linear
    first: int
    reader: Stored
    shape: tuple[int, int, int]
    mixes: bool = False


def readers_of(module: Any) -> Sequence[Stored]:
    """The matrices that multiply the input of an attention or feed-forward module, which says so by ``readers``."""
    readers: Sequence[Stored] = module.readers
    return readers


def value_channels(qkv: Linear, output: Stored, queries: int, keys: int, size: int) -> RowChannels:
    """Attention's values, from the last rows of a joint projection to the output projection.

    Attention weighs whole heads of values, so that each may be multiplied by any matrix if the output projection is
    multiplied by its inverse. ``queries // keys`` query heads share a value head.
    """
    return RowChannels(qkv, qkv.rows - keys * size, output, (keys, queries // keys, size), mixes=True)
