"""How much of the machine others used while something was measured: figures from a busy machine show that they are."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

STATISTICS = Path("/proc/stat")


def _busy() -> float:
    """Seconds that all cores have worked since the start, those that the hypervisor took included."""
    user, nice, system, _, _, *more = map(int, STATISTICS.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Others:
    """While it is entered; then ``cores`` is how many cores others kept busy on average, or None where nobody tells."""

    cores: float | None = None

    def __enter__(self) -> Others:
        if STATISTICS.is_file():
            self._begun = time.perf_counter(), _busy(), _own()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if STATISTICS.is_file():
            started, busy, own = self._begun
            others = (_busy() - busy) - (_own() - own)  # which ticks of 10 ms can make negative
            self.cores = max(0.0, round(others / (time.perf_counter() - started), 2))
