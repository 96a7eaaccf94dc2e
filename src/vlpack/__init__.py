"""Qwen vision-language checkpoints to complete packages for the stock ONNX Runtime GenAI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Answer", "BuildResult", "ExtraOptions", "Model", "Sampling", "VlpackError", "build", "inspect", "load"]

if TYPE_CHECKING:
    from vlpack.builder import BuildResult, build
    from vlpack.errors import VlpackError
    from vlpack.inspection import inspect
    from vlpack.options import ExtraOptions
    from vlpack.runtime import Answer, Model, Sampling, load

_WHERE = {
    "Answer": "runtime",
    "BuildResult": "builder",
    "ExtraOptions": "options",
    "Model": "runtime",
    "Sampling": "runtime",
    "VlpackError": "errors",
    "build": "builder",
    "inspect": "inspection",
    "load": "runtime",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # lazily: building needs no runtime, running no onnxscript, and each takes a second to import
    if name not in _WHERE:
        raise AttributeError(f"module 'vlpack' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"vlpack.{_WHERE[name]}"), name)
