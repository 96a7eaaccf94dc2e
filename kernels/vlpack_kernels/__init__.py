"""Native operators for the onnxruntime sessions of vlpack, as a custom operator library.

vlpack imports this module by its name if it is installed. The operators have no Python interface: a graph can use them
(domain ``vlpack``) after ``SessionOptions.register_custom_ops_library(library())``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

__all__ = ["instruction_set", "interface", "library"]


def library() -> Path:
    """The path of the shared library."""
    return Path(__file__).with_name("kernels.so")


def interface() -> int:
    """The number of the operators' interface (their names, inputs, outputs and attributes), which vlpack checks."""
    return int(ctypes.CDLL(str(library())).VlpackKernelsInterface())


@cache
def instruction_set() -> str | None:
    """The instruction set whose kernels are used: ``avx512_bf16``, ``avx512`` (with VNNI) or ``avx2``.

    The environment variable ``VLPACK_KERNELS_ISA`` can choose one of those that the processor has.

    Returns:
        The name; None if the processor has none of them, so that the library cannot be used.
    """
    name = ctypes.CDLL(str(library())).VlpackKernelsInstructionSet
    name.restype = ctypes.c_char_p
    found = name()
    return None if found is None else str(found.decode())
