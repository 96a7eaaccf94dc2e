"""Imports onnxruntime-genai as ``og``, with a clear error if it is not installed.

Building and inspecting packages work without it.
"""

from vlpack.errors import PackageError

try:
    import onnxruntime_genai as og
except ModuleNotFoundError:
    raise PackageError(
        "Running a package needs onnxruntime-genai, which is not installed.",
        "Run pip install 'onnxruntime-genai>=0.18' (its wheels are for Python 3.11 and newer).",
    ) from None

__all__ = ["og"]
