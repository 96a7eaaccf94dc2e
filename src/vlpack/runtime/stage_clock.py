"""When each graph of a package finished: the runtime does not say, but its log tells the shapes of every output."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from vlpack.runtime.genai import og

_lock = threading.Lock()


class StageClock:
    """While it is entered, notes when the runtime logs an output; of several at once, only the first gets the log.

    The log is the process's: a callback that the program has set itself is gone afterwards, as the runtime tells nobody
    which one it had.

    Args:
        wanted: without it, nothing is touched and nothing measured.
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
                # several calls for one stage (unequal images): the last counts
                self._times[line.split()[1]] = now

    def seconds_until(self, output: str, start: float) -> float | None:
        """From ``start`` to the last output of that name; None where none was heard."""
        return self._times[output] - start if output in self._times else None
