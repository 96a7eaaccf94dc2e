"""Measures how many cores this process and other programs used during a measurement.

With these figures, results from a busy machine, or of a process that was stopped for a while, can be recognized.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

STATISTICS = Path("/proc/stat")


def _busy() -> float | None:
    """Seconds that all cores have worked since the start, including time that the hypervisor took."""
    if not STATISTICS.is_file():
        return None
    user, nice, system, _, _, *more = map(int, STATISTICS.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Others:
    """A context manager that measures the average numbers of busy cores between its entry and its exit.

    Args:
        cores: number of cores that other programs kept busy; None if the system does not report it.
        own: number of cores that this process and its finished children kept busy; near 0 if it waited or was stopped.
    """

    def __init__(self) -> None:
        self.cores: float | None = None
        self.own = 0.0

    def __enter__(self) -> Others:
        self._begun = time.perf_counter(), _busy(), _own()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        started, busy, own = self._begun
        seconds, worked, now = time.perf_counter() - started, _own() - own, _busy()
        self.own = round(worked / seconds, 2)
        if busy is not None and now is not None:  # the resolution of 10 ms could make the difference slightly negative
            self.cores = max(0.0, round((now - busy - worked) / seconds, 2))
