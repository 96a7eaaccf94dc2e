"""How much of the machine was used while something was measured, by it and by others.

Figures from a busy machine, and of a process that somebody stopped for a while, show that they are.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

STATISTICS = Path("/proc/stat")


def _busy() -> float | None:
    """Seconds that all cores have worked since the start, those that the hypervisor took included."""
    if not STATISTICS.is_file():
        return None
    user, nice, system, _, _, *more = map(int, STATISTICS.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Others:
    """While it is entered; then how many cores others, and this process with its children, kept busy on average.

    Args:
        cores: of others; None where nobody tells.
        own: of this process and of children that have ended. Near 0 it has waited, or was stopped.
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
        if busy is not None and now is not None:  # which ticks of 10 ms can make a little less than nothing
            self.cores = max(0.0, round((now - busy - worked) / seconds, 2))
