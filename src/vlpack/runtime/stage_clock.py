"""Measures when each graph of a package finishes, from the runtime's log.

The runtime has no interface for this, but logs the shape of every output when it is computed.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from vlpack.runtime.genai import og

_lock = threading.Lock()


class StageClock:
    """A context manager that records when the runtime logs each output.

    A process has only one log callback. If several clocks run at once, only the first one measures. A callback that the
    program has set before is lost, because the runtime does not return it.

    Args:
        wanted: whether to measure; if not, the log is left alone.
    """

    def __init__(self, wanted: bool) -> None:
        self._times: dict[str, float] = {}
        self._wanted, self._listening = wanted, False

    def __enter__(self) -> StageClock:
        self._listening = self._wanted and _lock.acquire(blocking=False)
        if self._listening:
            og.set_log_callback(self._hear)
            og.set_log_options(enabled=True, ansi_tags=False, model_output_shapes=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listening:
            og.set_log_options(enabled=False, model_output_shapes=False)
            og.set_log_callback(None)
            _lock.release()

    def _hear(self, message: str) -> None:
        now = time.perf_counter()
        for line in message.splitlines():
            if line.startswith("Name: "):
                # a stage may run several times (images of different sizes): keep the last time
                self._times[line.split()[1]] = now

    def seconds_until(self, output: str, start: float) -> float | None:
        """Seconds from ``start`` to the last output with this name; None if no such output was logged."""
        return self._times[output] - start if output in self._times else None
