"""Answers rows with the engine in this process: as many at a time as keep all slots busy, which also bounds memory."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from vlpack.bulk.form import Form
from vlpack.bulk.question import Question
from vlpack.bulk.row import Item, Task
from vlpack.bulk.shards import Row
from vlpack.engine import Engine, EngineStoppedError

PREPARING = 2
"""Number of rows whose images are decoded at a time."""

AHEAD, AHEAD_BYTES = 8, 64 * 2**20
"""Limits of the rows that are read ahead and ordered by the size of their images: number for each slot, and total size
in bytes."""


class EngineOptions(NamedTuple):
    """Options of the engine that do not change answers.

    Attributes:
        slots: number of rows that are answered at a time.
        context: number of tokens of prompt and answer together; None for what the model and memory allow.
        threads: number of threads; None for all cores.
    """

    slots: int = 8
    context: int | None = None
    threads: int | None = None


class Answerer:
    """An engine that answers rows. Use it as a context manager.

    Args:
        package: folder of the package.
        question: what is asked about every row.
        form: form of the rows.
        options: options of the engine.

    Raises:
        VlpackError: the package cannot be loaded, or an option does not fit it.
    """

    def __init__(self, package: str | os.PathLike[str], question: Question, form: Form, options: EngineOptions) -> None:
        self._form, self.window = form, options.slots + max(2, options.slots // 2)
        self.engine = Engine(
            package,
            slots=options.slots,
            context=options.context,
            threads=options.threads,
            stall=math.inf,  # nobody reads answers as they are generated, and prompts first give the highest throughput
            min_pixels=question.min_pixels,
            max_pixels=question.max_pixels,
        )
        self._pool = ThreadPoolExecutor(self.window, "vlpack-rows")
        self._preparing = threading.Semaphore(PREPARING)

    def close(self) -> None:
        """Interrupts the rows in progress and frees the engine's memory."""
        self.engine.close()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, task: Task) -> Future[Row]:
        """Starts to answer a row in another thread and returns a future, whose result is the row of the output."""
        return self._pool.submit(self._answer, task)

    def __call__(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Row]]:
        """Answers rows and yields each with its row of the output, as they are finished.

        Raises:
            VlpackError: the engine has failed.
        """
        running: dict[Future[Row], Task] = {}
        tasks = iter(tasks)
        more = True
        while more or running:
            while more and len(running) < self.window:
                task = next(tasks, None)
                if task is None:
                    more = False
                else:
                    running[self.submit(task)] = task
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()

    def _answer(self, task: Task) -> Row:
        try:
            with self._preparing:
                answer = self._form.begin(self.engine, task.item)
            return self._form.row(task, answer())
        except EngineStoppedError:
            raise
        except Exception as error:
            if self.engine.stopped:
                raise
            return self._form.failed(task, error)


def alike(tasks: Iterable[Task], area: Callable[[Item], int], count: int) -> Iterator[Task]:
    """Reorders rows, among the next few, so that those with images of similar size follow each other.

    Rows with the same image follow each other, too, so its features are computed only once.

    Args:
        tasks: rows in the order of the input.
        area: function that returns the area of a row's images.
        count: largest number of rows that are read ahead.
    """
    group: list[Task] = []
    size = 0
    for task in tasks:
        group.append(task)
        size += held_bytes(task.item)
        if len(group) >= count or size >= AHEAD_BYTES:
            yield from sorted(group, key=lambda task: (area(task.item), _images(task.item)))
            group, size = [], 0
    yield from sorted(group, key=lambda task: (area(task.item), _images(task.item)))


def _images(item: Item) -> int:
    """A hash of a row's images as the row gives them, by which rows with the same images are brought together."""
    columns = item.columns
    return hash(repr([item.images, columns.get("image"), columns.get("images")])) if columns else 0


def held_bytes(value: Any) -> int:
    """An estimate of the memory that the texts and images of a row take, in bytes."""
    if isinstance(value, Item):
        return held_bytes(value.columns) + held_bytes(list(value.images))
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(held_bytes, value.values()))
    return sum(map(held_bytes, value)) if isinstance(value, list | tuple) else 8
