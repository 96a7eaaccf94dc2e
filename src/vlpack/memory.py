"""How much memory this process has used at most."""

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
