"""The scheduler, which runs in the engine's thread: continuous batching with chunked prefill.

Requests join and leave between decoding steps, and prompts are processed in chunks between those steps.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from vlpack.decoding.graphs import Array, Graphs
from vlpack.decoding.slots import Slots
from vlpack.engine.counters import Counters
from vlpack.engine.drafting import StepCost
from vlpack.engine.looking import Looking
from vlpack.engine.parts import SHORT, Part, short_ends
from vlpack.engine.queue import FairQueue
from vlpack.engine.request import Request
from vlpack.errors import PackageError, VlpackError
from vlpack.preprocess import Prompt

LARGEST_CHUNK, SMALLEST_CHUNK = 512, SHORT
"""Bounds of the number of a prompt's tokens that are processed in one call. Larger calls are slower per token, because
attention computes all scores of a call; smaller calls take as long as the smallest, because they read all weights."""

PATIENCE = 4.0
"""Longest time of a chunk, in decoding steps, while other requests decode and prompts get half of the time. In that
time about fifty tokens are processed, and reading the weights is a quarter of the work."""

WASTE = 16
"""Number of idle rows that steps have computed before two rows are exchanged, so that the active ones lie together."""


class EngineStoppedError(VlpackError):
    """The engine was closed or has failed, so that it answers no request any more."""


class Scheduler:
    """Runs requests on the slots of the cache until it is closed.

    Args:
        graphs: sessions of the package.
        slots: slots of the cache.
        queue: queue of requests that wait for a slot.
        see: function that computes the features of a prompt's images; None if the package takes no images.
        stall: largest factor by which the average time per token of running answers may grow while prompts are
            processed.

    Attributes:
        counters: counts of what was computed.
    """

    def __init__(
        self, graphs: Graphs, slots: Slots, queue: FairQueue, see: Callable[[Prompt], Array] | None, stall: float = 4.0
    ) -> None:
        self._graphs, self._slots, self._queue, self._stall = graphs, slots, queue, stall
        self.counters = Counters()
        self._prefilling: deque[Request] = deque()
        self._decoding: list[Request] = []
        self._cancelled: list[Request] = []
        self._changed = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._chunk, self._step_seconds, self._waste = SMALLEST_CHUNK, 0.0, 0
        self._cost = StepCost()
        self._owed = 0.0  # seconds for which steps must run before the next chunk, to balance the time that chunks took
        self._looking = Looking(see, self._wake, at_once=stall == math.inf)
        self._masking = ThreadPoolExecutor(1, "vlpack-masks")
        self._thread = threading.Thread(target=self._run, name="vlpack-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        with self._changed:
            return len(self._queue)

    @property
    def stopped(self) -> bool:
        """Whether the scheduler was closed or has failed."""
        return self._closing

    def submit(self, requests: Sequence[Request], wait: bool = False) -> None:
        """Puts requests into the queue, all or none.

        Args:
            requests: requests to queue.
            wait: whether to wait for room in the queue if it is full.

        Raises:
            QueueFullError: the queue is full, and ``wait`` is false.
            VlpackError: the engine was closed.
        """
        with self._changed:
            while wait and not self._closing and self._queue and not self._queue.takes(len(requests)):
                self._changed.wait(0.5)
            if self._failure is not None:
                raise EngineStoppedError(
                    f"The engine has failed: {self._failure}", "Make a new one."
                ) from self._failure
            if self._closing:
                raise EngineStoppedError("The engine was closed.", "Make a new one.")
            self._queue.put(requests)
            for request in requests:
                request.handle.on_cancel = partial(self.cancel, request)
            self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """Ends a request before the next step; does nothing if it has ended already."""
        with self._changed:
            if request.cancelled or request.handle.done:
                return
            request.cancelled = True
            waited = self._queue.remove(request)
            if not waited:
                self._cancelled.append(request)
                self._changed.notify_all()
        if waited:
            request.close()

    def close(self) -> None:
        """Interrupts all requests and ends the engine's thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._turn():
                pass
        except BaseException as failure:  # an internal error must reach every waiting caller
            error = failure
        with self._changed:
            self._closing, self._failure = True, error
            left = [*self._decoding, *self._prefilling]
            while len(self._queue):
                left.append(self._queue.pop())
        for request in left:
            request.close(error)
        self._looking.close()
        self._masking.shutdown(wait=False, cancel_futures=True)

    def _turn(self) -> bool:
        """Runs one decoding step and at most one chunk of a prompt; returns False when the engine is closed."""
        with self._changed:
            while not (self._closing or self._cancelled or self._decoding or self._ready() or self._may_admit()):
                self._changed.wait(0.5)
            if self._closing:
                return False
            cancelled, self._cancelled = self._cancelled, []
        for request in cancelled:
            if request.slot is not None and not request.handle.done:
                self._leave(request)
        self._admit()
        if self._decoding:
            self._step()
        ready = self._ready()
        if ready is not None and (self._owed <= 0 or not self._decoding):
            self._prefill(ready)
        return True

    def _may_admit(self) -> bool:
        return bool(len(self._queue) and self._slots.free)

    def _ready(self) -> Request | None:
        """The next request whose prompt can be processed now, because its image features are computed."""
        return next((r for r in self._prefilling if r.features is None or r.features.done()), None)

    def _admit(self) -> None:
        """Gives the free slots to the next requests of the queue."""
        while True:
            with self._changed:
                if not self._may_admit():
                    return
                request = self._queue.pop()
                self._changed.notify_all()  # wakes threads that wait for room in the queue
                self._prefilling.append(request)
            request.slot = self._slots.take(request, request.tokens)
            assert request.slot is not None, "one was free"
            self._reused(request, request.slot.length)
            if request.prompt.has_images:
                self._looking.start(request, request.slot.length)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _prefill(self, request: Request) -> None:
        """Processes one chunk of a prompt; with its last chunk, the short ends of other prompts, too."""
        slot = request.slot
        assert slot is not None, "it was admitted"
        self._reused(request, self._slots.catch_up(slot, request.tokens))
        most = self._chunk if self._limited else LARGEST_CHUNK
        parts = [Part(request, slot.length, self._slots.until(slot, most, len(request.tokens.ids)))]
        short = parts[0].size <= SHORT or not self._graphs.states  # a linear layer computes all rows up to the longest
        if self._graphs.packed and short and parts[0].last and request.features is None:
            parts += short_ends(parts[0], self._prefilling, most - parts[0].size, self._slots.context)
        parts.sort(key=lambda part: part.request.slot.row if part.request.slot is not None else 0)
        slots = [part.request.slot for part in parts if part.request.slot is not None]
        for part in parts:
            self._prefilling.remove(part.request)
            if part.last:
                self._start_mask(part.request)
        first = slots[0].row
        counts = np.zeros(slots[-1].row + 1 - first, np.int64)
        counts[[slot.row - first for slot in slots]] = [part.size for part in parts]
        try:
            features = parts[0].features() if len(parts) == 1 else None
            began = time.perf_counter()
            ids = np.concatenate([part.request.tokens.ids[part.start : part.end] for part in parts])
            logits = self._slots.run(
                first,
                counts,
                self._graphs.tokens(ids[None], features),
                np.concatenate([part.request.positions[:, part.start : part.end] for part in parts], axis=1),
                np.cumsum([part.size for part in parts]) - 1,
            )
            seconds = time.perf_counter() - began
        except Exception as error:
            for part in parts:
                self._leave(part.request, error)
            return
        self._adapt(len(ids), seconds)
        self.counters.chunks += 1
        self.counters.prompt_tokens += len(ids)
        for part, values in zip(parts, logits, strict=True):
            self._shown(part, values, seconds)

    def _shown(self, part: Part, logits: Array, seconds: float) -> None:
        """Continues after a part of a prompt was processed: with its next part, or with the answer's first token."""
        request = part.request
        stats, slot = request.answer.stats, request.slot
        assert slot is not None, "it was admitted"
        self._slots.wrote(slot, request.tokens.ids[part.start : part.end])
        stats.prefill_seconds = (stats.prefill_seconds or 0.0) + seconds
        if not part.last:
            self._prefilling.append(request)  # after the others, so that a short prompt is finished soon
            return
        request.features = None
        try:
            self._choose(request, logits)
        except Exception as error:  # this request's grammar failed on its first token
            self._leave(request, error)
        if not request.handle.done:
            self._decoding.append(request)
            if request.drafter is not None:
                request.drafter.stake = self._cost.stake()

    def _step(self) -> None:
        """Computes the next token of every answer that has begun."""
        self._gather()
        slots = [request.slot for request in self._decoding if request.slot is not None]
        first, end = min(slot.row for slot in slots), max(slot.row for slot in slots) + 1
        requests = sorted(self._decoding, key=lambda request: request.slot.row if request.slot is not None else 0)
        price, drafts = self._drafts(requests)
        counts = np.zeros(end - first, np.int64)
        for request, draft in zip(requests, drafts, strict=True):
            self._start_mask(request)
            assert request.slot is not None, "it decodes"
            counts[request.slot.row - first] = 1 + len(draft)
        new = [[request.answer.tokens[-1], *draft] for request, draft in zip(requests, drafts, strict=True)]
        ids = np.array([token for tokens in new for token in tokens], np.int32)
        positions = [r.position + np.arange(len(tokens)) for r, tokens in zip(requests, new, strict=True)]
        began = time.perf_counter()
        try:
            logits = self._slots.run(
                first,
                counts,
                self._graphs.tokens(ids[None]),
                np.tile(np.concatenate(positions), (3, 1)),
                np.arange(len(ids)),
            )
        except PackageError as error:
            for slot in self._slots.rows(
                first, end
            ):  # also slots of prompts in progress: what the failed call left in them is unknown
                slot.length = 0
                if slot.owner is not None:
                    self._leave(slot.owner, error)
            return
        seconds = time.perf_counter() - began
        self._step_seconds = 0.8 * self._step_seconds + 0.2 * seconds if self._step_seconds else seconds
        self._owed = max(0.0, self._owed - seconds)
        if len(ids) > len(requests):
            price = self._cost.paid(len(requests), len(ids) - len(requests), seconds)
        self._cost.observe(len(ids), seconds)
        self.counters.steps += 1
        idle = end - first - len(slots)
        self.counters.idle_rows += idle
        self._waste += idle
        place = 0
        for request, tokens in zip(requests, new, strict=True):
            self._judge(request, tokens, logits[place : place + len(tokens)], price)
            place += len(tokens)

    def _drafts(self, requests: Sequence[Request]) -> tuple[float, list[list[int]]]:
        """The price of a draft token, in tokens, and the draft tokens of each request."""
        price = self._cost.price(len(requests))
        room = self._slots.context - 1 - max(request.slot.length for request in requests if request.slot is not None)
        most = min(room, self._cost.longest(len(requests)))
        return price, [request.draft(price, most) for request in requests]

    def _judge(self, request: Request, tokens: Sequence[int], logits: Array, price: float) -> None:
        """Chooses the tokens that follow an answer's last token and its draft tokens, until a draft token is rejected.

        Args:
            request: request whose answer is continued.
            tokens: the answer's last token, and the draft tokens.
            logits: logits after each of ``tokens``, ``[tokens, V]``.
            price: cost of a draft token, in tokens.
        """
        slot, right = request.slot, 0
        assert slot is not None, "it decodes"
        try:
            for place, token in enumerate(tokens):
                slot.write(np.array([token], np.int32))
                over = self._choose(request, logits[place])
                if over or place + 1 == len(tokens) or request.answer.tokens[-1] != tokens[place + 1]:
                    break
                right += 1
                self._start_mask(request)
        except Exception as error:  # this request's grammar failed
            self._leave(request, error)
        if len(tokens) > 1:
            assert request.drafter is not None, "it made the draft tokens"
            request.drafter.judge(len(tokens) - 1, right, price)
            self.counters.drafted_tokens += len(tokens) - 1
            self.counters.accepted_tokens += right

    def _gather(self) -> None:
        """Moves the last active row into the first gap between active rows, if steps have computed many idle rows."""
        if self._waste < WASTE:
            return
        self._waste = 0
        taken = sorted(request.slot.row for request in self._decoding if request.slot is not None)
        gap = next((row for row in range(taken[0], taken[-1]) if row not in taken), None)
        if gap is not None:
            one, two = self._slots.rows(gap, gap + 1)[0], self._slots.rows(taken[-1], taken[-1] + 1)[0]
            self._slots.exchange(one, two)

    def _start_mask(self, request: Request) -> None:
        """Starts to compute the mask of allowed tokens in another thread, while the graph runs."""
        if request.constraint is not None:
            request.mask = self._masking.submit(request.constraint.allowed)

    def _choose(self, request: Request, logits: Array) -> bool:
        """Chooses an answer's next token and ends the answer if it is finished; returns whether it is."""
        self.counters.answer_tokens += 1
        over = request.choose(logits)
        if over:
            self._leave(request)
        return over

    def _leave(self, request: Request, error: BaseException | None = None) -> None:
        """Frees the slot of a request and ends it."""
        if request in self._decoding:
            self._decoding.remove(request)
        if request in self._prefilling:
            self._prefilling.remove(request)
        if request.features is not None:
            request.features.cancel()
        if request.slot is not None:
            self._slots.release(request.slot)
            request.slot = None
        request.close(error)

    def _reused(self, request: Request, tokens: int) -> None:
        request.answer.stats.reused_tokens += tokens
        self.counters.reused_tokens += tokens

    @property
    def _limited(self) -> bool:
        """Whether running answers limit the time for prompts."""
        return bool(self._decoding) and self._stall != math.inf

    def _adapt(self, tokens: int, seconds: float) -> None:
        """Chooses the size of the next chunk, and for how long steps run before it, while answers are running.

        Args:
            tokens: number of tokens of the chunk that was just processed.
            seconds: time that it took.
        """
        if not self._limited or not self._step_seconds:
            self._owed = 0.0
            return
        # prompts get half of the time, and more if more prompts wait than answers are running
        share = max(1.0, min((1 + len(self._prefilling)) / len(self._decoding), self._stall - 1))
        self._owed += seconds / share
        longest = PATIENCE * share * self._step_seconds
        if seconds > longest:
            self._chunk = max(SMALLEST_CHUNK, min(self._chunk, tokens) // 2)
        elif (
            tokens == self._chunk and 2 * seconds - self._step_seconds < longest
        ):  # a chunk twice as large still reads the weights only once, so it takes less than twice the time
            self._chunk = min(LARGEST_CHUNK, 2 * self._chunk)
