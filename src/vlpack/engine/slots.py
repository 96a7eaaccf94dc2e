"""The keys and values of all sequences: one buffer for each layer, whose rows are slots that requests take in turn.

GroupQueryAttention writes new keys into the buffer of the old ones where both are bound to the same memory, so a slot
is a row of the buffer and a step of several sequences is a call on a range of rows. Rows of the range that nobody
decodes are computed too: they write one key behind those that they hold, where the next one is written anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlpack.engine.graphs import Array, CachePort, Graphs
from vlpack.engine.prefixes import SeenImage, Tokens, common_prefix
from vlpack.errors import OptionError, option
from vlpack.ort.session import ort
from vlpack.system import total_memory_bytes

FEW = 4096
"""Tokens of a slot where neither the user nor the system says how many there is memory for."""


class Slot:
    """A row of the cache.

    Attributes:
        row: its index, which changes when rows are exchanged.
        length: how many tokens it holds keys and values of.
        images: those among them.
        owner: what uses it, None if nobody does.
        used: a number that grows with every use, so that the slot which was not used for longest has the least.
    """

    def __init__(self, row: int, context: int) -> None:
        self.row, self.length, self.used = row, 0, 0
        self.images: Sequence[SeenImage] = ()
        self.owner: Any = None
        self._ids = np.zeros(context, np.int32)

    @property
    def held(self) -> Tokens:
        """The tokens that it holds keys and values of."""
        return Tokens(self._ids[: self.length], [image for image in self.images if image.start < self.length])

    def write(self, ids: Array) -> None:
        """Note that keys and values of these tokens were added."""
        self._ids[self.length : self.length + len(ids)] = ids
        self.length += len(ids)


class Slots:
    """The cache, planned as a whole before the first request comes.

    Args:
        graphs: of the package.
        count: of the slots.
        context: tokens of each.
        beside: bytes that the rest of the package takes in memory.

    Attributes:
        bytes: of keys and values.

    Raises:
        OptionError: that does not fit this machine's memory.
    """

    def __init__(self, graphs: Graphs, count: int, context: int, beside: int = 0) -> None:
        self.bytes = planned_bytes(graphs.cache, count, context)
        there = total_memory_bytes()
        if there and self.bytes + beside > there:
            raise OptionError(
                f"Keys and values of {count} slots with {context} tokens each take {self.bytes / 1e9:.1f} GB, and the "
                f"package {beside / 1e9:.1f} GB; this machine has {there / 1e9:.1f} GB.",
                f"Give fewer {option('slots')} or a smaller {option('context')}.",
            )
        self.context, self._graphs = context, graphs
        # zeros that the system hands out when they are first written: what is never used takes no memory
        self._buffers = [np.zeros((count, p.heads, context, p.channels), p.dtype) for p in graphs.cache]
        self._bindings: dict[tuple[int, int], Any] = {}
        self._by_row = [Slot(row, context) for row in range(count)]
        self._uses = 0

    def __len__(self) -> int:
        return len(self._by_row)

    @property
    def free(self) -> int:
        """How many slots nobody uses."""
        return sum(slot.owner is None for slot in self._by_row)

    def rows(self, first: int, end: int) -> list[Slot]:
        """The slots of a range of rows."""
        return self._by_row[first:end]

    def binding(self, first: int, end: int) -> Any:
        """A range of rows as onnxruntime takes it, keys and values bound in place; nothing is copied."""
        if (first, end) not in self._bindings:
            binding = self._graphs.decoder.io_binding()
            for port, buffer in zip(self._graphs.cache, self._buffers, strict=True):
                value = ort.OrtValue.ortvalue_from_numpy(buffer[first:end])
                binding.bind_ortvalue_input(port.past, value)
                binding.bind_ortvalue_output(port.present, value)
            self._bindings[first, end] = binding
        return self._bindings[first, end]

    def take(self, owner: Any, tokens: Tokens) -> Slot | None:
        """A free slot, with as much of the beginning of ``tokens`` as any slot holds; None where all are in use.

        The last token is left to be computed, as its logits are wanted.
        """
        idle = [slot for slot in self._by_row if slot.owner is None]
        if not idle:
            return None
        common, best = self._longest(tokens)
        # where most of what a slot holds would be lost, another conversation may yet go on there
        if best is None or best.owner is not None or 2 * common < best.length:
            slot = min(idle, key=lambda slot: (slot.length > 0, slot.used, slot.row))
        else:
            slot = best
        if best is None:
            common = 0
        elif slot is not best:
            self._copy(best, slot, 0, common)
        slot.length, slot.images, slot.owner = common, tokens.images, owner
        slot._ids[:common] = tokens.ids[:common]
        self.touch(slot)
        return slot

    def catch_up(self, slot: Slot, tokens: Tokens) -> int:
        """Copy what another slot holds by now of the beginning of ``tokens``; returns how many tokens that gained."""
        before = slot.length
        common, best = self._longest(tokens)
        if best is not None and best is not slot and common > before:
            self._copy(best, slot, before, common)
            slot.write(tokens.ids[before:common])
        return slot.length - before

    def release(self, slot: Slot) -> None:
        """Let others use the slot; what it holds may still be the beginning of their prompts."""
        # an answer's last token has no keys yet, so there is room for the one that a step over this row writes
        slot.owner = None
        self.touch(slot)

    def touch(self, slot: Slot) -> None:
        """Note that the slot is in use now."""
        self._uses += 1
        slot.used = self._uses

    def exchange(self, one: Slot, two: Slot) -> None:
        """Give two slots each other's rows, with what they hold."""
        length = max(one.length, two.length)
        for buffer in self._buffers:
            kept = buffer[one.row, :, :length].copy()
            buffer[one.row, :, :length] = buffer[two.row, :, :length]
            buffer[two.row, :, :length] = kept
        one.row, two.row = two.row, one.row
        self._by_row[one.row], self._by_row[two.row] = one, two

    def _longest(self, tokens: Tokens) -> tuple[int, Slot | None]:
        """The longest beginning of ``tokens`` that a slot holds, their last one not counted."""
        most, best = 0, None
        for slot in self._by_row:
            common = min(common_prefix(slot.held, tokens), len(tokens.ids) - 1)
            # of equal ones a slot that nobody uses, and of these the one with least beside
            if common > most or (common == most and best is not None and _before(slot, best)):
                most, best = common, slot
        return most, best

    def _copy(self, source: Slot, target: Slot, start: int, end: int) -> None:
        for buffer in self._buffers:
            buffer[target.row, :, start:end] = buffer[source.row, :, start:end]


def planned_bytes(cache: Sequence[CachePort], slots: int, context: int) -> int:
    """What keys and values of so many slots take."""
    return slots * sum(port.row_bytes(context) for port in cache)


def default_context(cache: Sequence[CachePort], slots: int, longest: int) -> int:
    """The tokens of a slot that the model's context and half of this machine's memory allow, but no fewer than 2."""
    there = total_memory_bytes()
    return max(2, min(longest, there // 2 // planned_bytes(cache, slots, 1) if there else FEW))


def _before(slot: Slot, other: Slot) -> bool:
    return (slot.owner is not None, slot.length) < (other.owner is not None, other.length)
