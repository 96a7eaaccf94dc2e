"""Batches that are shared by several threads: prompts of all callers are computed together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from vlpack.preprocess import Prompt


class _Job:
    """The prompts of one caller and the results that have been computed for them."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.waiting = dict.fromkeys(range(len(prompts)))
        self.rows: dict[int, Any] = {}
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.rows) == len(self.prompts)


class SharedBatches:
    """Computes prompts for callers in any number of threads, one batch at a time.

    It has no thread of its own: a waiting caller computes the next batch, for itself and for others. Callers take
    turns, so that a single prompt does not wait for all prompts of a caller with thousands.

    Args:
        forward: function that computes a batch and returns one row for each prompt.
        batches: function that groups prompts by their lengths into batches of indices.
    """

    def __init__(
        self,
        forward: Callable[[Sequence[Prompt]], Iterable[Any]],
        batches: Callable[[Sequence[int]], Iterator[list[int]]],
    ) -> None:
        self._forward, self._batches = forward, batches
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._busy = False

    def __call__(self, prompts: Sequence[Prompt]) -> list[Any]:
        """Computes prompts and returns one row for each; blocks.

        Raises:
            Exception: the exception of ``forward`` for one of these prompts.
        """
        job = _Job(prompts)
        with self._changed:
            self._jobs.append(job)
        try:
            while True:
                with self._changed:
                    while self._busy and not job.done:
                        self._changed.wait(0.5)  # on Windows, Ctrl+C does not interrupt a wait without a timeout
                    if job.done:
                        break
                    self._busy, batch = True, self._next()
                self._compute(batch)
        finally:
            with self._changed:
                if job in self._jobs:
                    self._jobs.remove(job)
        if job.error is not None:
            raise job.error
        return [job.rows[index] for index in range(len(prompts))]

    def _next(self) -> list[tuple[_Job, int]]:
        """The next batch: it has the longest prompt of the caller whose turn it is, and others' prompts fill it."""
        waiting = [(job, index) for job in self._jobs for index in job.waiting]
        first = self._jobs[0]
        lengths = [job.prompts[index].input_ids.shape[1] for job, index in waiting]
        longest = max(range(len(first.waiting)), key=lambda place: lengths[place])
        batch = next(batch for batch in self._batches(lengths) if longest in batch)
        taken = [waiting[place] for place in batch]
        for job, index in taken:
            del job.waiting[index]
        self._jobs.remove(first)
        self._jobs.extend([first] if first.waiting else [])
        for job in [job for job in self._jobs if not job.waiting]:
            self._jobs.remove(job)
        return taken

    def _compute(self, batch: list[tuple[_Job, int]]) -> None:
        """Computes a batch; if it fails, computes each caller's part separately, so that only one caller fails."""
        parts, missing = [batch], dict.fromkeys(batch)
        try:
            while parts:
                part = parts.pop()
                try:
                    rows = self._forward([job.prompts[index] for job, index in part])
                except Exception as error:
                    jobs = list(dict.fromkeys(job for job, _ in part))
                    if len(jobs) > 1:
                        parts += [[each for each in part if each[0] is job] for job in jobs]
                        continue
                    jobs[0].error = error
                else:
                    for (job, index), row in zip(part, rows, strict=True):
                        job.rows[index] = row
                for each in part:
                    del missing[each]
        finally:
            with self._changed:
                for (
                    job,
                    index,
                ) in missing:  # interrupted: other threads compute theirs
                    job.waiting[index] = None
                    if job not in self._jobs:
                        self._jobs.append(job)
                for job in [job for job in self._jobs if job.done]:
                    self._jobs.remove(job)
                self._busy = False
                self._changed.notify_all()
