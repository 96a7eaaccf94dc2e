"""What the processor can do at most, measured by ``peak.c``, which is compiled with ``cc``."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

KINDS = ("int8", "bfloat16", "fp32", "reading")
"""Multiplications of three kinds, and reading from memory."""


class Peaks:
    """The compiled loops, for a processor with AVX-512 and VNNI."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, made = str(Path(__file__).with_name("peak.c")), f"{folder}/peak.so"
            command = ["cc", "-O2", "-march=native", "-shared", "-fPIC", "-pthread", source, "-o", made]
            subprocess.run(command, check=True)
            self._rate = ctypes.CDLL(made).rate
        self._rate.restype = ctypes.c_double

    def rate(self, kind: str, threads: int, rounds: int = 1) -> float:
        """10⁹ multiplications, or bytes that are read, a second by all threads together; the best of some rounds.

        It is 0 if the processor has no multiplications of this kind.
        """
        return max(self._rate(kind.encode(), threads) for _ in range(rounds))
