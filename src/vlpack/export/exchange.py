"""Two folders change names in one step, where the system can do so: no moment is without either."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

_HERE = -100
"""AT_FDCWD of fcntl.h: paths are relative to the current folder."""
_EXCHANGE = 2
"""RENAME_EXCHANGE of linux/fs.h, which is also RENAME_SWAP of macOS' sys/stdio.h."""
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
"""What a kernel, a file system or a sandbox says that does not know it."""


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders of one file system.

    Returns:
        Whether it was done; not where this system cannot do it.

    Raises:
        OSError: it can, and one of them is not there or must not be renamed.
    """
    call = _system_call()
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@cache
def _system_call() -> Any:
    """renameat2(2) of Linux, renameatx_np(2) of macOS; None without either."""
    name = {"linux": "renameat2", "darwin": "renameatx_np"}.get(sys.platform)
    try:
        call = getattr(ctypes.CDLL(None, use_errno=True), name) if name else None
    except (AttributeError, OSError):  # an old C library
        return None
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call
