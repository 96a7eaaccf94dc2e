"""The progress of a build in a terminal: a bar of the bytes written, and the steps before and beside the writing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar


class BuildBar:
    """An observer of a build (`vlpack.builder.Progress`) that shows it as a bar.

    Args:
        bar: progress bar of rich.
        clock: function that returns the time in seconds.
    """

    def __init__(self, bar: Bar, clock: Callable[[], float] = time.monotonic) -> None:
        self._bar, self._clock = bar, clock
        self._task = bar.add_task("reading", total=None)
        self._phase, self._began, self._first, self._over = "", 0.0, 0, True

    def start(self, total: int) -> None:
        """Sets the number of bytes that will be written."""
        self._bar.update(self._task, total=total, description="writing")

    def advance(self, written: int, path: str) -> None:
        """Adds written bytes of the weight at ``path``; the path is shown unless another step is running."""
        if self._over:
            self._bar.update(self._task, advance=written, description=path[-40:].rjust(40))
        else:
            self._bar.update(self._task, advance=written)

    def say(self, text: str, done: int = 0, total: int = 0) -> None:
        """Shows the current step with its percentage and the time left, as far as ``total`` is known (0 if not)."""
        now = self._clock()
        if text != self._phase:
            self._phase, self._began, self._first = text, now, done
        self._over = done >= total
        if total:
            text += f", {100 * done // total}%"
        if total > done > self._first:
            left = round((now - self._began) * (total - done) / (done - self._first))
            text += f", {left // 60}:{left % 60:02} left"
        self._bar.update(self._task, description=text)


@contextmanager
def build_progress(console: Console) -> Iterator[BuildBar | None]:
    """A bar with bytes, rate and time left; None if the console is not a terminal."""
    if not console.is_terminal:
        yield None
        return
    times = (TransferSpeedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), *times)
    with Bar(*columns, console=console, transient=True) as bar:
        yield BuildBar(bar)
