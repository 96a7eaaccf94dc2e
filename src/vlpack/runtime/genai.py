"""The stock onnxruntime-genai, or a sentence where it is not installed: building and inspecting do without it."""

from vlpack.errors import PackageError

try:
    import onnxruntime_genai as og
except ModuleNotFoundError:
    raise PackageError(
        "Running a package needs onnxruntime-genai, which is not installed.",
        "pip install 'onnxruntime-genai>=0.18' (its wheels are for Python 3.11 and newer).",
    ) from None

__all__ = ["og"]
