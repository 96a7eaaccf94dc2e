"""The stock onnxruntime, or a sentence where it is not installed, and sessions on its CPU provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlpack.errors import PackageError

try:
    import onnxruntime as ort
except ModuleNotFoundError:
    raise PackageError(
        "Running a package needs onnxruntime, which is not installed.", "pip install onnxruntime"
    ) from None

__all__ = ["cpu_session", "ort", "session_options"]


def session_options(threads: int) -> Any:
    """Options of a session, ``onnxruntime.SessionOptions``: so many threads, errors alone in the log."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # threads would go on waiting for work in a loop while others need the cores
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def cpu_session(graph: Path, threads: int) -> Any:
    """A graph on the CPU provider, ``onnxruntime.InferenceSession``."""
    options = session_options(threads)
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
