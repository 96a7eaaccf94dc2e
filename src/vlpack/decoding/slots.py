"""The key/value cache: buffers for each layer's keys and values, whose rows are slots for sequences.

GroupQueryAttention writes new keys in place if past and present are bound to the same memory. So a slot is a row of the
buffers, and a decoding step of several sequences is one call on a range of rows. Idle rows within the range are
computed, too: each gets one key after those that it holds, where the next token is written anyway.

The keys and values of a prefix do not depend on the tokens after it, so any prefix in a slot can be continued. The
states of linear attention change with every token: a prompt can continue only from the end of a slot's tokens, or from
a snapshot. Snapshots are taken while a prompt is processed, after the numbers of tokens that `Slots.take` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlpack.decoding.graphs import Array, Graphs
from vlpack.decoding.memory import sparse_zeros
from vlpack.decoding.prefixes import SeenImage, Tokens, common_prefix
from vlpack.decoding.states import Snapshot, States
from vlpack.errors import OptionError, option
from vlpack.system import total_memory_bytes

FEW = 4096
"""Number of tokens of a slot if the user gives none and the size of the machine's memory is not known."""

SNAPSHOTS = 3
"""Largest number of snapshots of a slot."""

BACK = 16
"""Number of tokens before a prompt's end at which a snapshot is taken. A later turn of the conversation often differs
from the generation prompt on, because chat templates leave out the reasoning of earlier answers."""

WORTH = 64
"""Smallest number of tokens that a snapshot must save to be taken, because it costs one more call of the decoder."""


class Slot:
    """A row of the key/value cache, which holds one sequence.

    Attributes:
        row: index of the row, which changes when rows are exchanged.
        length: number of tokens whose keys and values it holds.
        images: images of the last prompt in it; some may begin after ``length``.
        snapshots: copies of its states after fewer tokens, sorted by the number of tokens.
        marks: numbers of tokens after which a snapshot is to be taken.
        owner: request that uses it; None if it is free.
        used: value of a counter of uses when it was last used; the least recently used slot has the smallest.
    """

    def __init__(self, row: int, context: int) -> None:
        self.row, self.length, self.used = row, 0, 0
        self.images: Sequence[SeenImage] = ()
        self.snapshots: list[Snapshot] = []
        self.marks: list[int] = []
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


class Prefix(NamedTuple):
    """The longest prefix of a prompt that a slot holds and from which a sequence can continue.

    Attributes:
        length: number of tokens.
        slot: slot that holds it; None if no slot holds any.
        snapshot: states after the prefix; None if the slot's current states are used, or if there are no states.
        shared: largest number of the prompt's first tokens that a slot holds, with or without states.
    """

    length: int = 0
    slot: Slot | None = None
    snapshot: Snapshot | None = None
    shared: int = 0


class Slots:
    """The key/value cache with all its slots, allocated before the first request.

    Args:
        graphs: sessions of the package.
        count: number of slots.
        context: number of tokens that fit into a slot.
        beside: memory that the rest of the package takes, in bytes.

    Attributes:
        bytes: size of all keys, values and states in bytes, with the largest number of snapshots.
        context: number of tokens that fit into a slot.

    Raises:
        OptionError: the cache and the package together exceed this machine's memory.
    """

    def __init__(self, graphs: Graphs, count: int, context: int, beside: int = 0) -> None:
        self.bytes = planned_bytes(graphs, count, context)
        there = total_memory_bytes()
        if there and self.bytes + beside > there:
            kinds = "Keys, values and states" if graphs.states else "Keys and values"
            raise OptionError(
                f"{kinds} of {count} slots with {context} tokens each take {self.bytes / 1e9:.1f} GB, and the "
                f"package {beside / 1e9:.1f} GB; this machine has {there / 1e9:.1f} GB.",
                f"Give fewer {option('slots')} or a smaller {option('context')}.",
            )
        self.context, self._graphs = context, graphs
        self._buffers = [sparse_zeros((count, p.heads, context, p.channels), p.dtype) for p in graphs.cache]
        self._states = States(graphs.states, count)
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
        """The slots of rows ``[first, end)``."""
        return self._by_row[first:end]

    def run(self, first: int, counts: Array, tokens: dict[str, Array], positions: Array, wanted: Array) -> Array:
        """Runs the decoder once on new tokens of the slots from row ``first`` on; the caller records them in the slots.

        Args:
            first: first row.
            counts: number of new tokens of each slot, ``[B]``.
            tokens: decoder inputs for the new tokens, as `Graphs.tokens` returns them.
            positions: positions of the new tokens, ``[3, N]``.
            wanted: indices of the tokens whose logits are returned, as in `Graphs.run`.

        Returns:
            Logits, fp32 ``[K, V]``.

        Raises:
            PackageError: onnxruntime fails.
        """
        end = first + len(counts)
        held = np.array([slot.length for slot in self.rows(first, end)])
        self._states.begin(first, counts)
        logits = self._graphs.run(self._binding(first, end), tokens, counts, held, positions, wanted)
        self._states.end(first, counts, held)
        return logits

    def _binding(self, first: int, end: int) -> Any:
        """The I/O binding of a range of rows, whose keys, values and states are bound in place, without a copy."""
        if (first, end) not in self._bindings:
            binding = self._graphs.decoder.io_binding()
            for port, buffer in zip(self._graphs.cache, self._buffers, strict=True):
                value = port.value(buffer[first:end])
                binding.bind_ortvalue_input(port.past, value)
                binding.bind_ortvalue_output(port.present, value)
            self._states.bind(binding, first, end)
            self._bindings[first, end] = binding
        return self._bindings[first, end]

    def take(self, owner: Any, tokens: Tokens) -> Slot | None:
        """Gives a free slot to a request, filled with the longest prefix of its tokens that can be continued.

        The last token is never part of that prefix: it must be computed, because its logits are needed.

        Args:
            owner: the request.
            tokens: tokens of its prompt.

        Returns:
            The slot; None if all are in use.
        """
        idle = [slot for slot in self._by_row if slot.owner is None]
        if not idle:
            return None
        found = self._longest(tokens)
        best = found.slot
        # a slot is not reused if more than half of its tokens would be lost: its conversation may continue
        if best is None or best.owner is not None or 2 * found.length < best.length:
            slot = min(idle, key=lambda slot: (slot.length > 0, slot.used, slot.row))
        else:
            slot = best
        self._fill(slot, found, 0)
        slot.length, slot.images, slot.owner = found.length, tokens.images, owner
        slot._ids[: found.length] = tokens.ids[: found.length]
        slot.marks = self._marks(found, len(tokens.ids)) if self._states else []
        self.touch(slot)
        return slot

    def catch_up(self, slot: Slot, tokens: Tokens) -> int:
        """Copies a longer prefix of a prompt that another slot has computed meanwhile.

        Args:
            slot: slot of the prompt.
            tokens: tokens of the prompt.

        Returns:
            The number of tokens that need no longer be computed.
        """
        before = slot.length
        found = self._longest(tokens)
        if found.slot is not slot and found.length > before:
            self._fill(slot, found, before)
            slot.write(tokens.ids[before : found.length])
        return slot.length - before

    def until(self, slot: Slot, most: int, size: int) -> int:
        """The index of the token at which the next chunk of a prompt ends.

        Args:
            slot: slot of the prompt, with the tokens that are already computed.
            most: number of tokens of a chunk; it ends earlier, or up to `BACK` tokens later, at a mark for a snapshot.
            size: number of tokens of the prompt.
        """
        mark = next((mark for mark in slot.marks if mark > slot.length), None)
        if mark is not None and mark - slot.length <= most + BACK:  # some more tokens in this chunk save a call
            return mark
        return min(size, slot.length + most)

    def wrote(self, slot: Slot, ids: Array) -> None:
        """Records that a chunk of a prompt was computed, and takes a snapshot if one is to be taken here."""
        slot.write(ids)
        if slot.length in slot.marks and self._states.knows(slot.row, slot.length):
            slot.snapshots.append(self._states.snapshot(slot.row))
            if len(slot.snapshots) > SNAPSHOTS:
                # the shortest one is likely to serve other conversations, and the longest ones this conversation
                del slot.snapshots[1]

    def release(self, slot: Slot) -> None:
        """Frees the slot; its contents stay, because later prompts may begin in the same way."""
        # the key of an answer's last token is not computed, so a step over this idle row has room for the key it writes
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
        self._states.exchange(one.row, two.row)
        one.row, two.row = two.row, one.row
        self._by_row[one.row], self._by_row[two.row] = one, two

    def _longest(self, tokens: Tokens) -> Prefix:
        """The longest prefix of ``tokens``, without the last one, that can be continued."""
        best, most = Prefix(), 0
        for slot in self._by_row:
            shared = min(common_prefix(slot.held, tokens), len(tokens.ids) - 1)
            most = max(most, shared)
            length, snapshot = self._continuable(slot, shared)
            # among equally long prefixes, free slots come first, then those with fewer other tokens
            if length > best.length or (length == best.length and best.slot is not None and _before(slot, best.slot)):
                best = Prefix(length, slot, snapshot)
        return best._replace(shared=most)

    def _continuable(self, slot: Slot, shared: int) -> tuple[int, Snapshot | None]:
        """The length of the longest prefix within the first ``shared`` tokens that a sequence can continue."""
        if not self._states:
            return shared, None
        if slot.length <= shared and self._states.knows(slot.row, slot.length):
            return slot.length, None
        known = [snapshot for snapshot in slot.snapshots if snapshot.length <= shared]
        found = max(known, key=lambda snapshot: snapshot.length, default=None)
        return (0, None) if found is None else (found.length, found)

    def _fill(self, slot: Slot, found: Prefix, start: int) -> None:
        """Makes a slot hold a prefix, of which it has the first ``start`` tokens already."""
        source = found.slot
        if source is not None and source is not slot:
            for buffer in self._buffers:
                buffer[slot.row, :, start : found.length] = buffer[source.row, :, start : found.length]
        if not self._states:
            return
        kept = [] if source is None else [one for one in source.snapshots if one.length <= found.length]
        if source is None or found.snapshot is not None:
            self._states.restore(slot.row, found.snapshot)
        elif source is not slot:
            self._states.copy(source.row, slot.row)
        slot.snapshots = kept

    def _marks(self, found: Prefix, size: int) -> list[int]:
        """The numbers of tokens of a prompt after which snapshots are to be taken.

        One is where the prompt begins to differ from another one, because a third prompt may differ there, too. The
        other is the last one that a later turn of the conversation is likely to share.

        Args:
            found: prefix of the prompt that a slot holds.
            size: number of tokens of the prompt.
        """
        end, marks = size - BACK, []
        if found.length + WORTH <= found.shared < end:
            marks.append(found.shared)
        if end - max(found.length, *marks, 0) >= WORTH:
            marks.append(end)
        return marks


def planned_bytes(graphs: Graphs, slots: int, context: int) -> int:
    """The size in bytes of ``slots`` slots with ``context`` tokens each: keys, values, states and snapshots."""
    states = (1 + SNAPSHOTS) * sum(port.row_bytes for port in graphs.states)
    return slots * (states + sum(port.row_bytes(context) for port in graphs.cache))


def default_context(graphs: Graphs, slots: int, longest: int) -> int:
    """The number of tokens per slot that the model's context and half of this machine's memory allow; at least 2."""
    there = total_memory_bytes()
    if not there:
        return max(2, min(longest, FEW))
    fixed = planned_bytes(graphs, slots, 0)
    return max(2, min(longest, (there // 2 - fixed) // (planned_bytes(graphs, slots, 1) - fixed)))


def _before(slot: Slot, other: Slot) -> bool:
    """Whether a slot is preferred to another one with an equally long prefix: free slots first, then shorter ones."""
    return (slot.owner is not None, slot.length) < (other.owner is not None, other.length)
