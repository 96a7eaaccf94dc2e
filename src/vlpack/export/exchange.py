"""Exchanges the names of two folders in one atomic step, where the system can: each name exists at every moment."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

_HERE = -100
"""``AT_FDCWD`` of fcntl.h: paths are relative to the current folder."""
_EXCHANGE = 2
"""``RENAME_EXCHANGE`` of linux/fs.h, which equals ``RENAME_SWAP`` of macOS' sys/stdio.h."""
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
"""Error numbers of a kernel, file system or sandbox that does not support the exchange."""


def exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two files or folders of one file system.

    Returns:
        Whether the names were exchanged; False if the system does not support it.

    Raises:
        OSError: the system supports it, but one of the two does not exist or may not be renamed.
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
    """The function renameat2(2) of Linux or renameatx_np(2) of macOS; None if the C library has neither."""
    name = {"linux": "renameat2", "darwin": "renameatx_np"}.get(sys.platform)
    try:
        call = getattr(ctypes.CDLL(None, use_errno=True), name) if name else None
    except (AttributeError, OSError):  # an old C library
        return None
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call
