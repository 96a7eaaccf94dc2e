"""Answers the rows of a batch in this process, or in several processes on this machine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from vlpack.bulk.answering import AHEAD, Answerer, alike
from vlpack.bulk.assignment import Assignment
from vlpack.bulk.output import Output
from vlpack.bulk.progress import BatchResult, Meter
from vlpack.bulk.row import Task
from vlpack.bulk.shards import Row, format_of
from vlpack.bulk.workers import Workers

SHARD_ROWS = 1000
"""Number of rows of a shard if the user gives none."""


class Answers(Protocol):
    """The interface of what answers rows: an engine in this process, or several processes."""

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Row]]:
        """Yields each row with its row of the output, as they are finished."""
        ...


class _Run:
    """A run, which takes rows from the input and puts their answers into the output.

    Attributes:
        tasks: rows that are not in the output yet, in the order of the input.
        meter: counts of the run.
    """

    def __init__(self, given: Assignment, output: Output) -> None:
        self._given, self._output, self._ids = given, output, given.ids()
        total = given.source.total
        if given.limit is not None and total is not None:
            total = min(total, given.limit)
        self.meter = Meter(output, total, given.output, given.report)
        self.tasks = self._pending()

    def _pending(self) -> Iterator[Task]:
        """Yields the rows that must be answered, and takes over those that are in the journal."""
        place = found = 0
        for item in itertools.islice(self._given.source.items(), self._given.limit):
            found += 1
            key, checked = self._ids(item)
            if self._output.done(key):
                continue
            if not self._output.keep(place, key):
                yield Task(place, key, checked)
            place += 1
        self.meter.result.total = found

    def answer(self, answers: Answers, tasks: Iterator[Task]) -> None:
        """Answers all rows, and stops early when too many have failed."""
        given, form = self._given, self._given.form
        self.meter.start()
        for task, row in answers(alike(tasks, form.area, AHEAD * given.setting.options.slots * given.workers)):
            self._output.add(task.place, row)
            self.meter.add(1, form.layout.failed(row), form.tokens(row))
            if self.meter.too_many(given.max_errors):
                return


def answer_here(given: Assignment) -> BatchResult:
    """Answers the rows on this machine.

    Raises:
        VlpackError: the input cannot be read, the package cannot be loaded, or the output cannot be written.
    """
    output = Output(
        Path(given.output),
        given.form.layout,
        format_of(given.format, given.source.types),
        given.identity,
        given.record,
        shard_rows=given.shard_rows or SHARD_ROWS,
        retry_errors=given.retry_errors,
    )
    with output:
        run = _Run(given, output)
        started = time.perf_counter()
        first = next(run.tasks, None)  # nothing is loaded if nothing is left to do
        if first is not None:
            with _answering(given) as answers:
                run.meter.result.load_seconds = round(time.perf_counter() - started, 3)
                run.answer(answers, itertools.chain([first], run.tasks))
        output.finish()
        return run.meter.tell(last=True)


def _answering(given: Assignment) -> AbstractContextManager[Answers]:
    """The object that answers the rows: an engine in this process, or several processes."""
    setting = given.setting
    if given.workers > 1:
        return Workers(setting, given.workers, given.form)
    return Answerer(setting.package, setting.question, given.form, setting.options)
