"""The progress and the result of a batch: counts, speeds, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

PROGRESS_SECONDS = 0.5
"""Shortest time in seconds between two reports of the progress."""


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        rows: number of rows in the output, including those of earlier runs.
        total: number of rows of the input; None if it is not known yet.
        answered: number of rows that this run has finished.
        errors: number of rows in the output that failed.
        seconds: time in seconds since this run began to answer rows.
        rows_per_minute: number of rows that this run finishes in a minute.
        tokens_per_second: number of tokens of answers that this run generates in a second.
        seconds_left: estimated time in seconds until all rows are finished; None if it is not known.
    """

    rows: int = 0
    total: int | None = None
    answered: int = 0
    errors: int = 0
    seconds: float = 0.0
    rows_per_minute: float = 0.0
    tokens_per_second: float = 0.0
    seconds_left: float | None = None


@dataclass
class BatchResult(Progress):
    """The result of a run.

    Attributes:
        output: folder of the output.
        before: number of rows that earlier runs had finished.
        failed: number of rows that failed in this run.
        stopped: whether the run stopped early, because too many rows failed.
        load_seconds: time for loading the package, in seconds.
    """

    output: str = ""
    before: int = 0
    failed: int = 0
    stopped: bool = False
    load_seconds: float = 0.0


class Counts(Protocol):
    """The interface of an output as far as its counts go.

    Attributes:
        rows: number of rows in the output.
        errors: number of them that failed.
    """

    @property
    def rows(self) -> int:
        """The number of rows in the output."""
        ...

    @property
    def errors(self) -> int:
        """The number of these rows that failed."""
        ...


class Meter:
    """Counts what a run does, and reports it.

    Args:
        counts: the output.
        total: number of rows of the input; None if it is not known yet.
        folder: folder of the output.
        report: function that is called with the progress; None for no reports.

    Attributes:
        result: the result so far.
    """

    def __init__(
        self, counts: Counts, total: int | None, folder: str, report: Callable[[Progress], object] | None
    ) -> None:
        self._counts, self._report, self._reported, self._tokens = counts, report, 0.0, 0
        self.result = BatchResult(counts.rows, total, errors=counts.errors, output=folder, before=counts.rows)
        self.start()

    def start(self) -> None:
        """Begins to measure the time."""
        self._began = time.perf_counter()

    def add(self, rows: int, failed: int, tokens: int) -> None:
        """Counts finished rows, how many of them failed, and the tokens of their answers; reports now and then."""
        self.result.answered += rows
        self.result.failed += failed
        self._tokens += tokens
        self.tell()

    def too_many(self, most: int | None) -> bool:
        """Whether more rows have failed than may; if so, the run is marked as stopped."""
        self.result.stopped = most is not None and self.result.failed > most
        return self.result.stopped

    def tell(self, *, last: bool = False) -> BatchResult:
        """Updates the result and reports it, if the last report is old enough or this is the last one."""
        now, result = time.perf_counter(), self.result
        if not last and now - self._reported < PROGRESS_SECONDS:
            return result
        self._reported = now
        result.rows, result.errors = self._counts.rows, self._counts.errors
        result.seconds = round(now - self._began, 3)
        if result.answered and result.seconds:
            result.rows_per_minute = round(60 * result.answered / result.seconds, 2)
            result.tokens_per_second = round(self._tokens / result.seconds, 2)
            if result.total is not None:
                result.seconds_left = round(max(0, result.total - result.rows) * result.seconds / result.answered, 1)
        if last:
            result.seconds_left = None if result.stopped else 0.0
        if self._report is not None:
            self._report(result)
        return result


def as_json(result: Progress) -> dict[str, Any]:
    """A result or progress as JSON-like data."""
    return asdict(result)
