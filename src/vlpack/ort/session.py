"""The stock onnxruntime and sessions on its CPU provider; importing this raises `PackageError` if it is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from vlpack.errors import PackageError
from vlpack.ort.kernels import library, opened, read_graph, use_kernels

try:
    import onnxruntime as ort
except ModuleNotFoundError:
    raise PackageError(
        "Running a package needs onnxruntime, which is not installed.", "Install it with pip install onnxruntime."
    ) from None

__all__ = ["cpu_session", "kernel_session", "ort", "session_options"]


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


def kernel_session(graph: Path, threads: int, edit: Callable[[onnx.ModelProto], None] | None = None) -> Any:
    """Opens a graph file on the CPU provider, with the operators of vlpack-kernels if that is installed.

    Args:
        graph: path of the graph.
        threads: number of threads of the session.
        edit: function that edits the graph in memory after the operators were replaced.

    Raises:
        PackageError: the graph cannot be read, or the installed library cannot be used.
    """
    options, available = session_options(threads), library()
    if available is None and edit is None:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    model = read_graph(graph)
    used = use_kernels(model, available)
    if used and available is not None:
        options.register_custom_ops_library(available.path)
    if edit is not None:
        edit(model)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    opened.update(used)
    return session
