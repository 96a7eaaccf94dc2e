"""The pages of a PDF as images, rendered by PDFium in a separate process with limits of memory and time."""

from __future__ import annotations

import subprocess
import sys

from vlpack.errors import InputError, VlpackError
from vlpack.preprocess import pdf_worker

SECONDS = 60.0
"""Largest number of seconds for rendering pages."""


class MissingPdfiumError(VlpackError):
    """pypdfium2, which renders PDFs, is not installed."""


def render(data: bytes, first: int, count: int, name: str = "The PDF") -> list[str]:
    """Renders pages of a PDF.

    Args:
        data: bytes of the PDF.
        first: index of the first page, from 0.
        count: largest number of pages.
        name: name of the PDF in error messages.

    Returns:
        a ``data:`` URI of a JPEG image for each page.

    Raises:
        InputError: the PDF is damaged or protected, or rendering it exceeds the limits.
        MissingPdfiumError: pypdfium2 is not installed.
    """
    return _run(data, [str(first), str(count)], name).split()


def page_count(data: bytes, name: str = "The PDF") -> int:
    """The number of pages of a PDF; raises as `render` does."""
    return int(_run(data, ["count"], name))


def _run(data: bytes, arguments: list[str], name: str) -> str:
    command = [sys.executable, "-I", pdf_worker.__file__, *arguments]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(f"{name} was not rendered within {SECONDS:g} seconds.") from None
    if done.returncode == pdf_worker.MISSING:
        raise MissingPdfiumError("PDFs need pypdfium2, which is not installed.", "pip install 'vlpack[batch]'")
    if done.returncode:
        raise InputError(f"{name} is damaged, protected, or needs too much memory.")
    return done.stdout.decode("ascii")
