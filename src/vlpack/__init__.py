"""Turns Qwen vision-language checkpoints into complete packages for the stock ONNX Runtime GenAI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlpack.version import __version__

__all__ = [
    "Answer",
    "BatchResult",
    "BuildResult",
    "Chat",
    "Embedder",
    "Engine",
    "ExtraOptions",
    "Model",
    "Prompt",
    "Reranker",
    "Sampling",
    "VideoOptions",
    "VlpackError",
    "__version__",
    "batch",
    "bench",
    "build",
    "inspect",
    "load",
    "verify",
]

if TYPE_CHECKING:
    from vlpack.builder import BuildResult, build
    from vlpack.bulk import BatchResult, batch
    from vlpack.engine import Engine
    from vlpack.errors import VlpackError
    from vlpack.evaluation.benchmark import bench
    from vlpack.inspection import inspect
    from vlpack.options import ExtraOptions
    from vlpack.preprocess import Prompt, VideoOptions
    from vlpack.runtime.answer import Answer
    from vlpack.runtime.chat import Chat
    from vlpack.runtime.load import load
    from vlpack.runtime.model import Model
    from vlpack.runtime.retrieval import Embedder, Reranker
    from vlpack.runtime.sampling import Sampling
    from vlpack.verification import verify

_WHERE = {
    "Answer": "runtime.answer",
    "BatchResult": "bulk",
    "BuildResult": "builder",
    "Chat": "runtime.chat",
    "Embedder": "runtime.retrieval",
    "Engine": "engine",
    "ExtraOptions": "options",
    "Model": "runtime.model",
    "Prompt": "preprocess",
    "Reranker": "runtime.retrieval",
    "Sampling": "runtime.sampling",
    "VideoOptions": "preprocess",
    "VlpackError": "errors",
    "batch": "bulk",
    "bench": "evaluation.benchmark",
    "build": "builder",
    "inspect": "inspection",
    "load": "runtime.load",
    "verify": "verification",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # lazily: building needs no runtime, running no onnxscript, and each takes a second to import
    if name not in _WHERE:
        raise AttributeError(f"module 'vlpack' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"vlpack.{_WHERE[name]}"), name)
