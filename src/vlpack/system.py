"""Facts about this process and machine: available cores, used memory and total memory."""

from __future__ import annotations

import os
import sys

from vlpack.errors import OptionError, option


def available_cores() -> int:
    """Number of cores that this process may use, at least 1."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def checked_threads(threads: int | None) -> int:
    """The runtime's number of threads: ``threads``, or all cores if it is None (its own default is half of them).

    Raises:
        OptionError: ``threads`` is less than 1, or more than 64 and four times the number of cores.
    """
    cores = available_cores()
    if threads is not None and not 1 <= threads <= max(64, 4 * cores):
        raise OptionError(
            f"{option('threads')} is {threads}; this process may use {cores} cores.",
            f"Leave out {option('threads')} to use all of them.",
        )
    return threads or cores


def own_process(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """A command that calls ``main`` of one of vlpack's modules in a new process, and the environment for it.

    The process imports modules from the same places as this one. Unlike with ``python -m``, the current folder is not
    among them, because a data set there may have a file with a module's name.

    Args:
        module: name of the module.
        arguments: arguments of the command.
    """
    program = f"import sys; sys.path[:] = filter(None, sys.path); from {module} import main; main()"
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return [sys.executable, "-c", program, *arguments], {**os.environ, "PYTHONPATH": paths}


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """Resident memory of this process now, in bytes, with pages of mapped files; the peak if it cannot be read."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().rss)
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return peak_memory_bytes()


def total_memory_bytes() -> int:
    """Physical memory of this machine, in bytes; 0 if the system does not report it."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.virtual_memory().total)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
