"""What can be chosen about calibration, checked before anything is read; it needs no onnxruntime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from vlpack.errors import OptionError

SELF = "self"
"""The model writes its texts; anything else is a file."""
BESIDE = "calibration"
"""The folder of the 8-bit package, in that of the package under construction."""


class Say(Protocol):
    """Told what is being done."""

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        """``done`` of ``total``, where that is known."""


def check_calibration(source: str | os.PathLike[str] | None, part: str) -> None:
    """Calibration goes with this build, if it is wanted.

    Raises:
        OptionError: it does not, or the file is missing.
    """
    if source is None:
        return
    if part not in ("all", "text"):
        raise OptionError(f"--calibrate has no effect with --part {part}, which has no decoder.", "Leave it away.")
    if source != SELF and not Path(source).expanduser().is_file():
        raise OptionError(
            f"The calibration text {source} is no file.",
            "Give a file of plain text or *.jsonl of messages, or self: the model writes its own.",
        )


def say_nothing(text: str, done: int = 0, total: int = 0) -> None:
    """Of a build that nobody looks at."""
