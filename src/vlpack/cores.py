"""How many cores this process may use: in containers and under taskset fewer than the machine has."""

from __future__ import annotations

import os
import sys


def available_cores() -> int:
    """At least 1."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1
