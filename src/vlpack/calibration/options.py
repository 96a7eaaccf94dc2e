"""Options of calibration and their checks, which read no checkpoint and do not import onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from vlpack.errors import OptionError, option

SELF = "self"
"""The calibration source for which the model generates the texts itself; any other source is the path of a file."""
BESIDE = "calibration"
"""Name of the folder of the temporary 8-bit package, within the folder of the package that is being built."""
BESIDE_4 = "calibration-4"
"""Name of the folder of the temporary 4-bit decoder with which the harm of 4 bits is measured."""


class ReportProgress(Protocol):
    """A function that receives the progress of a calibration."""

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        """Reports the current step, with ``done`` of ``total`` units; ``total`` is 0 where it is not known."""


def check_calibration(source: str | os.PathLike[str] | None, part: str) -> None:
    """Checks that calibration is possible with the other options of a build; does nothing if ``source`` is None.

    Raises:
        OptionError: the part has no decoder, or the file with the texts does not exist.
    """
    if source is None:
        return
    if part not in ("all", "text"):
        raise OptionError(
            f"{option('calibrate')} has no effect with {option('part', part)}, which has no decoder.",
            f"Leave {option('calibrate')} out.",
        )
    if source != SELF and not Path(source).expanduser().is_file():
        raise OptionError(
            f"There is no calibration file {source}.",
            "Give a file of plain text or a *.jsonl file of messages, or self to let the model write its own texts.",
        )


def check_bits(
    bits: float,
    precision: str | None,
    provider: str,
    calibrate: str | os.PathLike[str] | None,
    mixed: Mapping[str, str],
) -> None:
    """Checks that an average number of bits per weight can be combined with the other options of a build.

    Raises:
        OptionError: the average is out of range, or another option excludes it.
    """
    if not 4 < bits <= 9:
        raise OptionError(
            f"{option('bits', format(bits, 'g'))} is out of range; it must be above 4 and at most 9.",
            "It is the average bits per weight of 4-bit and 8-bit matrices, scales included.",
        )
    if calibrate is None:
        raise OptionError(
            f"{option('bits')} needs {option('calibrate')}, which measures where bits help most.",
            f"Add {option('calibrate', 'self')}, for example.",
        )
    if precision not in (None, "int4") or provider != "cpu":
        raise OptionError(
            f"{option('bits')} is for int4 on the CPU, not for {precision or 'int4'} on {provider}.",
            f"Leave {option('bits')} out, or choose {option('precision', 'int4')} and "
            f"{option('execution_provider', 'cpu')}.",
        )
    if "mixed_layers" in mixed:
        raise OptionError(
            f"{option('bits')} and {option('extra.matmul_mixed_precision', 'mixed_layers:…')} exclude each other.",
            "Give one of them.",
        )


def report_nothing(text: str, done: int = 0, total: int = 0) -> None:
    """A progress callback that does nothing."""
