"""What can be chosen about calibration, checked before anything is read; it needs no onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from vlpack.errors import OptionError, option

SELF = "self"
"""The model writes its texts; anything else is a file."""
BESIDE = "calibration"
"""The folder of the 8-bit package, in that of the package under construction."""
BESIDE_4 = "calibration-4"
"""That of the 4-bit package by which bits are spent."""


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
        raise OptionError(
            f"{option('calibrate')} has no effect with {option('part', part)}, which has no decoder.", "Leave it away."
        )
    if source != SELF and not Path(source).expanduser().is_file():
        raise OptionError(
            f"The calibration text {source} is no file.",
            "Give a file of plain text or *.jsonl of messages, or self: the model writes its own.",
        )


def check_bits(
    bits: float,
    precision: str | None,
    provider: str,
    calibrate: str | os.PathLike[str] | None,
    mixed: Mapping[str, str],
) -> None:
    """An average of bits per weight goes with this build.

    Raises:
        OptionError: it does not.
    """
    if not 4 < bits <= 9:
        raise OptionError(f"{option('bits')} is {bits:g}; an average of 4 and 8 bits with scales is between 4 and 9.")
    if calibrate is None:
        raise OptionError(
            f"{option('bits')} needs {option('calibrate')}, which measures where bits help most.",
            f"Add {option('calibrate', 'self')}, for example.",
        )
    if precision not in (None, "int4") or provider != "cpu":
        raise OptionError(
            f"{option('bits')} is for int4 on the CPU, not for {precision or 'other precisions'} for {provider}.",
            f"Leave {option('precision')} away, or {option('bits')}.",
        )
    if "mixed_layers" in mixed:
        raise OptionError(
            f"{option('bits')} and matmul_mixed_precision=mixed_layers exclude each other.", "Give one of them."
        )


def say_nothing(text: str, done: int = 0, total: int = 0) -> None:
    """Of a build that nobody looks at."""
