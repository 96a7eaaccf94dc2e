"""How much memory this process has used at most, and how much there is."""

from __future__ import annotations

import sys


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """What this process has in memory now, pages of mapped files included, in bytes; the peak where nobody tells."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().rss)
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return peak_memory_bytes()


def total_memory_bytes() -> int:
    """Physical memory of this machine, in bytes; 0 where the system does not tell."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.virtual_memory().total)
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
