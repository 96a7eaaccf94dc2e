"""A line on the terminal that says what is waited for and how long already, drawn by a process of its own.

The runtime holds Python's lock while it loads a model or reads a prompt, so no thread of this process could draw then.
The process is this file, run by its path: ``waiting.py TEXT`` draws on standard error until its standard input ends,
which it does even when the parent is killed. It imports nothing of vlpack, so that it starts soon.
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
"""Seconds after which a wait is worth a line."""
INTERVAL = 0.2
"""Seconds between two drawings."""


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show ``what`` and the seconds since now on standard error, which is a terminal, until the block is left."""
    try:
        drawing = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, what], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
    except (OSError, ValueError):  # no memory, no Python beside this program: what is waited for matters more
        yield
        return
    try:
        yield
    finally:
        assert drawing.stdin is not None, "a pipe"
        with contextlib.suppress(OSError):
            drawing.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            drawing.wait(2)  # so that the line is gone before something else is written
        if drawing.poll() is None:
            drawing.kill()


def line(what: str, seconds: float, columns: int) -> str:
    """The line, cut to a terminal's width, with the cursor back at its beginning for whoever writes next."""
    width = max(columns - 1, 1)
    return f"\r{f'{what} ... {seconds:.0f} s'[:width].ljust(width)}\r"


def main() -> None:
    """Draw until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is for the parent, which ends this process
    started, ended = time.monotonic(), threading.Event()

    def listen() -> None:
        sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    drawn = False
    pause = DELAY
    with contextlib.suppress(OSError, ValueError):  # the terminal is gone
        while not ended.wait(pause):
            sys.stderr.write(line(sys.argv[1], time.monotonic() - started, os.get_terminal_size(2).columns))
            sys.stderr.flush()
            drawn, pause = True, INTERVAL
        if drawn:
            sys.stderr.write("\r" + " " * (os.get_terminal_size(2).columns - 1) + "\r")
            sys.stderr.flush()


if __name__ == "__main__":
    main()
