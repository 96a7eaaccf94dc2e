"""The channels of a model that can be rescaled, or rotated within the weights, without changing what it computes.

A module lists its channels in a method ``channels()``; `vlpack.export.graph` derives from them the transform of each
weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnxscript import nn

from vlpack.layers.linear import Linear, Stored


@dataclass(frozen=True)
class NormChannels:
    """The output channels of a norm, which only the matrices ``readers`` read.

    Args:
        norm: the norm module, with a parameter ``weight`` and perhaps a ``bias``.
        readers: all modules that take the norm's output.
        repeats: number of times that the channels occur side by side in a reader's input (joined patches).
    """

    norm: nn.Module
    readers: Sequence[Stored]
    repeats: int = 1


@dataclass(frozen=True)
class RowChannels:
    """Rows of one matrix whose outputs reach another matrix through operations that are linear in them.

    Args:
        producer: the matrix with the rows, and its bias.
        first: index of the first row that is a channel.
        reader: the only matrix that multiplies the channels.
        shape: the channels' arrangement, as in `vlpack.quantize.transforms.Channels`.
        mixes: whether blocks of ``shape[2]`` channels may be rotated in producer and reader, because the operations
            between them treat all channels of a block alike.
    """

    producer: Linear
    first: int
    reader: Stored
    shape: tuple[int, int, int]
    mixes: bool = False


def readers_of(module: Any) -> Sequence[Stored]:
    """The matrices that multiply the input of an attention or feed-forward module: its attribute ``readers``."""
    readers: Sequence[Stored] = module.readers
    return readers


def value_channels(qkv: Linear, output: Stored, queries: int, keys: int, size: int) -> RowChannels:
    """The channels of attention's values: from the last rows of the joint projection ``qkv`` to the output projection.

    Attention multiplies a whole value head by one weight, so the head may be multiplied by any matrix if the output
    projection is multiplied by the inverse. ``queries // keys`` query heads share a value head.
    """
    return RowChannels(qkv, qkv.rows - keys * size, output, (keys, queries // keys, size), mixes=True)
