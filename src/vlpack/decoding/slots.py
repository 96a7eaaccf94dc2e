"""The key/value cache of the engine: buffers for each layer's keys and values, whose rows are slots for requests.

GroupQueryAttention writes new keys in place if past and present are bound to the same memory. So a slot is a row of the
buffers, and a decoding step of several sequences is one call on a range of rows. Idle rows within the range are
computed, too: each gets one key after those that it holds, at the place that the next token overwrites anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlpack.decoding.graphs import Array, CachePort, Graphs
from vlpack.decoding.prefixes import SeenImage, Tokens, common_prefix
from vlpack.errors import OptionError, option
from vlpack.ort.session import ort
from vlpack.system import total_memory_bytes

FEW = 4096
"""Number of tokens of a slot if the user gives none and the system does not report how much memory it has."""


class Slot:
    """A row of the key/value cache, which holds one sequence.

    Attributes:
        row: index of the row, which changes when rows are exchanged.
        length: number of tokens whose keys and values it holds.
        images: images of the prompt that was put into it last; some may begin after ``length``.
        owner: request that uses it; None if it is free.
        used: number that grows with every use of any slot; the least recently used slot has the smallest.
    """

    def __init__(self, row: int, context: int) -> None:
        self.row, self.length, self.used = row, 0, 0
        self.images: Sequence[SeenImage] = ()
        self.owner: Any = None
        self._ids = np.zeros(context, np.int32)

    @property
    def held(self) -> Tokens:
        """The tokens whose keys and values the slot holds."""
        return Tokens(self._ids[: self.length], [image for image in self.images if image.start < self.length])

    def write(self, ids: Array) -> None:
        """Records that keys and values of these tokens were added."""
        self._ids[self.length : self.length + len(ids)] = ids
        self.length += len(ids)


class Slots:
    """The key/value cache with all its slots, allocated before the first request.

    Args:
        graphs: sessions of the package.
        count: number of slots.
        context: number of tokens that fit into a slot.
        beside: bytes that the rest of the package takes in memory.

    Attributes:
        bytes: size of all keys and values.

    Raises:
        OptionError: the cache and the package together exceed this machine's memory.
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
        # the system provides pages of zeros when they are first written, so unused parts take no memory
        self._buffers = [np.zeros((count, p.heads, context, p.channels), p.dtype) for p in graphs.cache]
        self._bindings: dict[tuple[int, int], Any] = {}
        self._by_row = [Slot(row, context) for row in range(count)]
        self._uses = 0

    def __len__(self) -> int:
        return len(self._by_row)

    @property
    def free(self) -> int:
        """The number of free slots."""
        return sum(slot.owner is None for slot in self._by_row)

    def rows(self, first: int, end: int) -> list[Slot]:
        """The slots of the rows from ``first`` to before ``end``."""
        return self._by_row[first:end]

    def binding(self, first: int, end: int) -> Any:
        """The I/O binding of a range of rows, whose keys and values are bound in place, without a copy."""
        if (first, end) not in self._bindings:
            binding = self._graphs.decoder.io_binding()
            for port, buffer in zip(self._graphs.cache, self._buffers, strict=True):
                value = ort.OrtValue.ortvalue_from_numpy(buffer[first:end])
                binding.bind_ortvalue_input(port.past, value)
                binding.bind_ortvalue_output(port.present, value)
            self._bindings[first, end] = binding
        return self._bindings[first, end]

    def take(self, owner: Any, tokens: Tokens) -> Slot | None:
        """Gives a free slot to ``owner``, filled with the longest prefix of ``tokens`` that any slot holds.

        The last token is never part of that prefix: it must be computed, because its logits are needed.

        Returns:
            the slot; None if all are in use.
        """
        idle = [slot for slot in self._by_row if slot.owner is None]
        if not idle:
            return None
        common, best = self._longest(tokens)
        # a slot is not reused if more than half of its tokens would be lost: its conversation may continue
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
        """Copies a longer prefix of ``tokens`` that another slot holds by now; returns the number of tokens gained."""
        before = slot.length
        common, best = self._longest(tokens)
        if best is not None and best is not slot and common > before:
            self._copy(best, slot, before, common)
            slot.write(tokens.ids[before:common])
        return slot.length - before

    def release(self, slot: Slot) -> None:
        """Frees the slot; its contents stay, because later prompts may begin in the same way."""
        # the keys of an answer's last token are not computed, so a step over this idle row has room for the key it adds
        slot.owner = None
        self.touch(slot)

    def touch(self, slot: Slot) -> None:
        """Marks the slot as the most recently used one."""
        self._uses += 1
        slot.used = self._uses

    def exchange(self, one: Slot, two: Slot) -> None:
        """Exchanges the rows of two slots, including their keys and values."""
        length = max(one.length, two.length)
        for buffer in self._buffers:
            kept = buffer[one.row, :, :length].copy()
            buffer[one.row, :, :length] = buffer[two.row, :, :length]
            buffer[two.row, :, :length] = kept
        one.row, two.row = two.row, one.row
        self._by_row[one.row], self._by_row[two.row] = one, two

    def _longest(self, tokens: Tokens) -> tuple[int, Slot | None]:
        """The length of the longest prefix of ``tokens``, without the last one, that a slot holds, and that slot."""
        most, best = 0, None
        for slot in self._by_row:
            common = min(common_prefix(slot.held, tokens), len(tokens.ids) - 1)
            # among equally long prefixes, free slots come first, then those with fewer other tokens
            if common > most or (common == most and best is not None and _before(slot, best)):
                most, best = common, slot
        return most, best

    def _copy(self, source: Slot, target: Slot, start: int, end: int) -> None:
        for buffer in self._buffers:
            buffer[target.row, :, start:end] = buffer[source.row, :, start:end]


def planned_bytes(cache: Sequence[CachePort], slots: int, context: int) -> int:
    """The bytes that the keys and values of ``slots`` slots with ``context`` tokens each take."""
    return slots * sum(port.row_bytes(context) for port in cache)


def default_context(cache: Sequence[CachePort], slots: int, longest: int) -> int:
    """The number of tokens per slot that the model's context and half of this machine's memory allow; at least 2."""
    there = total_memory_bytes()
    return max(2, min(longest, there // 2 // planned_bytes(cache, slots, 1) if there else FEW))


def _before(slot: Slot, other: Slot) -> bool:
    return (slot.owner is not None, slot.length) < (other.owner is not None, other.length)
