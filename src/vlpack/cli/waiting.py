"""A line on the terminal with the current step and its seconds, drawn by a separate process.

The runtime holds Python's global interpreter lock while it loads a model or reads a prompt, so a thread of this process
could not draw meanwhile. The other process runs this file by its path: ``waiting.py TEXT`` draws on standard error
until its standard input ends, which happens even if the parent is killed. It imports nothing of vlpack, so that it
starts quickly.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

DELAY = 0.5
"""Seconds until the line is first drawn; a shorter wait needs none."""
INTERVAL = 0.2
"""Seconds from one drawing to the next."""


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows a step and its seconds on standard error, which must be a terminal, until the block is left."""
    try:
        drawing = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, what], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
    except (OSError, ValueError):  # no memory or no Python executable; the step itself matters more
        yield
        return
    try:
        yield
    finally:
        assert drawing.stdin is not None, "a pipe"
        with contextlib.suppress(OSError):
            drawing.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            drawing.wait(2)  # the line must be gone before anything else is written
        if drawing.poll() is None:
            drawing.kill()


def line(what: str, seconds: float, columns: int) -> str:
    """The line, cut to the terminal's width. It leaves the cursor at its beginning, where the next text replaces it."""
    width = max(columns - 1, 1)
    return f"\r{f'{what} ... {seconds:.0f} s'[:width].ljust(width)}\r"


def main() -> None:
    """Draws the line until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is handled by the parent, which ends this process
    started, ended = time.monotonic(), threading.Event()

    def listen() -> None:
        sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    drawn = False
    pause = DELAY
    with contextlib.suppress(OSError, ValueError):  # the terminal was closed
        while not ended.wait(pause):
            sys.stderr.write(line(sys.argv[1], time.monotonic() - started, os.get_terminal_size(2).columns))
            sys.stderr.flush()
            drawn, pause = True, INTERVAL
        if drawn:
            sys.stderr.write("\r" + " " * (os.get_terminal_size(2).columns - 1) + "\r")
            sys.stderr.flush()


if __name__ == "__main__":
    main()
