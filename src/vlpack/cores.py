"""How many cores this process may use: in containers and under taskset fewer than the machine has."""

from __future__ import annotations

import os
import sys

from vlpack.errors import OptionError


def available_cores() -> int:
    """At least 1."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def checked_threads(threads: int | None) -> int:
    """The runtime's threads: all cores where ``threads`` is None (its own default is half of them).

    Raises:
        OptionError: absurdly many, or none.
    """
    cores = available_cores()
    if threads is not None and not 1 <= threads <= max(64, 4 * cores):
        raise OptionError(f"threads is {threads}; this process may use {cores} cores.")
    return threads or cores
