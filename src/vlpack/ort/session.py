"""The stock onnxruntime and sessions on its CPU provider; importing this raises `PackageError` if it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlpack.errors import PackageError

try:
    import onnxruntime as ort
except ModuleNotFoundError:
    raise PackageError(
        "Running a package needs onnxruntime, which is not installed.", "Install it with pip install onnxruntime."
    ) from None

__all__ = ["cpu_session", "ort", "session_options"]


def session_options(threads: int) -> Any:
    """Make ``onnxruntime.SessionOptions`` with a number of threads; only errors are logged."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # otherwise idle threads keep spinning while other sessions need the cores
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def cpu_session(graph: Path, threads: int) -> Any:
    """Open a graph file on the CPU provider, as an ``onnxruntime.InferenceSession``."""
    options = session_options(threads)
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
