"""The folder of a package under construction: it has its name only when it is complete.

Everything is written to a hidden sibling, ``.NAME.partial-PID``, which is renamed at the end. An error removes it; what
a killed build left behind is removed by the next build to the same name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlpack.errors import OptionError, VlpackError
from vlpack.package.manifest import MANIFEST


@contextmanager
def output_folder(final: Path, *, force: bool) -> Iterator[Path]:
    """A folder to write into, which becomes ``final`` when the block ends without an error.

    Args:
        final: the package's name; its parents are made where they are missing.
        force: replace a package that is already there. Anything else that is there is never replaced.

    Raises:
        OptionError: ``final`` exists, or its parent cannot be written.
        VlpackError: the disk is full.
    """
    final = Path(os.path.abspath(final))
    _check_free(final, force)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
        partial.mkdir()
    except OSError as error:
        raise OptionError(f"Cannot write to {final.parent}: {error.strerror or error}.") from None
    try:
        yield partial
        _put_in_place(partial, final)
    except OSError as error:
        raise _readable(error, final) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Say before the work that the disk cannot hold it.

    Raises:
        VlpackError: fewer than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise VlpackError(
            f"Not enough space in {folder.parent}: the package takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free.",
            "Free some space or choose another output with -o.",
        )


def _check_free(final: Path, force: bool) -> None:
    if not os.path.lexists(final):
        return
    empty = final.is_dir() and not final.is_symlink() and not any(final.iterdir())
    if empty:
        return
    if not (final / MANIFEST).is_file():
        raise OptionError(f"{final} exists and is not a vlpack package.", "Choose another name with -o.")
    if not force:
        raise OptionError(f"{final} exists.", "Choose another name with -o, or replace the package with --force.")


def _remove_leftovers(final: Path) -> None:
    for leftover in final.parent.glob(f".{glob_escape(final.name)}.partial-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def glob_escape(name: str) -> str:
    """``name`` as a glob pattern that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # no harmless probe; a leftover of a dead build only costs space
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _put_in_place(partial: Path, final: Path) -> None:
    if not os.path.lexists(final):
        os.rename(partial, final)
        return
    old = final.with_name(f".{final.name}.partial-old-{os.getpid()}")
    os.rename(final, old)
    try:
        os.rename(partial, final)
    except OSError:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _readable(error: OSError, final: Path) -> VlpackError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return VlpackError(
            f"The disk is full: {final.parent} has no room for the package.",
            "Nothing was left behind. Free some space or choose another output with -o.",
        )
    return VlpackError(f"Cannot write the package {final}: {error.strerror or error}.", "Nothing was left behind.")
