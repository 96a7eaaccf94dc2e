"""When each graph of a package finished: the runtime does not say, but its log tells the shapes of every output."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from vlpack.genai import og

_lock = threading.Lock()


class StageClock:
    """While it is entered, notes when the runtime logs an output; of several at once, only the first gets the log."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._listening = False

    def __enter__(self) -> StageClock:
        self._listening = _lock.acquire(blocking=False)
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
                # several calls for one stage (unequal images): the last counts
                self._times[line.split()[1]] = now

    def seconds_until(self, output: str, start: float) -> float:
        """From ``start`` to the last output of that name; 0 where there was none."""
        return max(0.0, self._times.get(output, start) - start)
