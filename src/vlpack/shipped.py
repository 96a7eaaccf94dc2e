"""Files that ship with vlpack: the small trained checkpoint, its images, and the example for the stock runtime."""

from __future__ import annotations

from pathlib import Path

from vlpack.errors import VlpackError


def examples_folder() -> Path:
    """The folder of the examples, which is beside the installed package or in the repository.

    Raises:
        VlpackError: they were not installed.
    """
    package = Path(__file__).parent
    for folder in (package / "examples", package.parents[1] / "examples"):
        if (folder / "digits-qwen3-vl" / "config.json").is_file():
            return folder
    raise VlpackError("The examples of vlpack are not installed.", "Install vlpack again, or run from its repository.")


def stock_runtime_example() -> str:
    """The program that runs a package with onnxruntime-genai alone: ``examples/stock_runtime.py`` as text."""
    return (examples_folder() / "stock_runtime.py").read_text(encoding="utf-8")
