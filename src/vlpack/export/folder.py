"""The output folder of a build, which appears under its final name only when the package is complete.

All files are written to a hidden sibling, ``.NAME.partial-…``, which is renamed at the end. An error removes it; the
next build removes what a killed build left. Every build holds a lock on its partial folder, so that a running build can
be distinguished from a killed one. (Process ids are not enough: they are reused, and repeat in containers.)
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlpack.checkpoint.files import quote
from vlpack.errors import OptionError, PackageError, VlpackError, option
from vlpack.export.exchange import exchange
from vlpack.package.manifest import MANIFEST, read_manifest

if os.name != "nt":
    import fcntl


def _check_text(output: Path) -> None:
    """Raises an OptionError if a package's path is not valid UTF-8, because the runtime cannot open such paths."""
    try:
        os.path.realpath(output).encode()
    except UnicodeEncodeError:
        raise OptionError(
            f"The path {quote(str(output))} is not valid UTF-8; the runtime could not open the package.",
            f"Choose another {option('output')}.",
        ) from None
    except (OSError, ValueError):  # reported when the folder is created
        pass


def check_free(output: Path, *, force: bool) -> None:
    """Checks that a package may be written to ``output``: it is free, an empty folder, or with ``force`` a package.

    Raises:
        OptionError: the output exists and must not be replaced, or the path is not usable. Only a folder that contains
            a package and nothing else is ever replaced.
    """
    _check_text(output)
    while True:
        before = _identity(output)
        try:
            return _check_free(output, force=force)
        except (OptionError, OSError) as error:
            if _identity(output) != before:
                continue  # another build replaced it during the check
            if isinstance(error, OSError):
                raise OptionError(f"{output} cannot be read: {error.strerror or error}.") from None
            raise


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError, ValueError):
        status = os.stat(path)
        return status.st_ino, status.st_ctime_ns
    return None


def _check_free(output: Path, *, force: bool) -> None:
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    another = f"Choose another {option('output')}."
    if not (output / MANIFEST).is_file():
        raise OptionError(f"{output} exists and is not a vlpack package.", another)
    if not force:
        raise OptionError(
            f"{output} already exists.",
            f"Choose another {option('output')}, or replace the package with {option('force', True)}.",
        )
    try:
        known = {*read_manifest(output)["files"], MANIFEST}
    except PackageError as error:
        raise OptionError(f"{output} is not replaced: {error.message}", another) from None
    foreign = sorted(path.name for path in output.iterdir() if path.name not in known or path.is_dir())
    if foreign:
        raise OptionError(
            f"{output} is not replaced: it contains {foreign[0]!r}, which is not a file of the package.", another
        )


@contextmanager
def output_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yields a new folder to write into, which is renamed to ``output`` if the block ends without an error.

    Args:
        output: final path of the package; missing parent folders are created, and a link is followed.
        force: whether to replace an existing package. Nothing else is ever replaced.

    Raises:
        OptionError: ``output`` already exists, or its parent folder cannot be written.
        VlpackError: the disk is full.
    """
    try:
        final = Path(os.path.realpath(output))
        check_free(final, force=force)
        new_parents = [parent for parent in final.parents if not parent.exists()]
        partial, lock = _new_partial(final)
    except (OSError, ValueError) as error:
        raise OptionError(f"Cannot write to {output}: {getattr(error, 'strerror', None) or error}.") from None
    try:
        yield partial
        _put_in_place(partial, final, force=force)
        new_parents = []
    except OSError as error:
        raise _readable(error, final) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for parent in new_parents:
            with suppress(OSError):  # another program uses it by now
                parent.rmdir()


def check_space(folder: Path, needed: int, where: Path | None = None) -> None:
    """Checks before a build that the disk has room for the package.

    Args:
        folder: the package's folder, for the message.
        needed: size of the package in bytes.
        where: an existing folder on the same disk, if ``folder`` does not exist yet.

    Raises:
        VlpackError: fewer than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(where or folder).free
    if free < needed:
        raise VlpackError(
            f"Not enough space in {folder.parent}: the package takes {needed / 1e9:.2f} GB and "
            f"{free / 1e9:.2f} GB are free.",
            f"Free some space or choose another {option('output')}.",
        )


def _new_partial(final: Path) -> tuple[Path, int | None]:
    """Creates the partial folder beside ``final`` and locks it.

    Before it is locked, another build may mistake it for a leftover and remove it, or a failing build may remove the
    parents that both created: then it is created again.
    """
    attempts = 20
    while True:
        attempts -= 1
        partial = final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(final)
            partial.mkdir()
            lock = _lock(partial)
        except (FileNotFoundError, BlockingIOError):
            if not attempts:
                raise
            continue
        if partial.is_dir() or not attempts:
            return partial, lock
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Locks a folder until the returned descriptor is closed or the process ends; None if locks are not supported.

    Raises:
        BlockingIOError: another process holds the lock.
        FileNotFoundError: the folder does not exist any more.
    """
    if os.name == "nt":
        return None  # Windows cannot open folders, so there are no locks and no leftover is removed
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # some network file systems have no locks
    return descriptor


def _remove_leftovers(final: Path) -> None:
    ours = re.compile(rf"\.{re.escape(final.name)}\.partial-[0-9a-f]{{8}}(-old)?")
    for leftover in sorted(final.parent.iterdir()):
        if not ours.fullmatch(leftover.name) or not leftover.is_dir() or leftover.is_symlink():
            continue
        if leftover.name.endswith("-old") and leftover.with_name(leftover.name.removesuffix("-old")).exists():
            continue  # a running build is replacing this package, and puts it back if it fails
        with suppress(FileNotFoundError, BlockingIOError):
            lock = _lock(leftover)
            if lock is not None:
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)


def _put_in_place(partial: Path, final: Path, *, force: bool) -> None:
    """Renames the finished folder to its final name.

    Other builds may do the same at any moment. Renaming onto a folder that is not empty fails, so nothing is
    overwritten; with ``force`` the last build wins, without it the first.
    """
    old = Path(f"{partial}-old")
    while True:
        check_free(final, force=force)
        try:
            if force and _exchanged(partial, final):
                return  # the old package now has the partial folder's name and is removed with it
            _make_room(final, old, force=force)
            os.rename(partial, final)
        except BaseException as error:
            if not isinstance(error, OSError) or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                with suppress(OSError):
                    os.rename(old, final)
                raise
            shutil.rmtree(old, ignore_errors=True)  # another build wrote or replaced the package first
        else:
            shutil.rmtree(old, ignore_errors=True)
            return


def _exchanged(partial: Path, final: Path) -> bool:
    with suppress(FileNotFoundError):  # there is no package yet
        return exchange(partial, final)
    return False


def _make_room(final: Path, old: Path, *, force: bool) -> None:
    with suppress(FileNotFoundError):
        if force:
            os.rename(final, old)
        elif os.name == "nt":  # on Windows, a rename does not replace an empty folder
            os.rmdir(final)


def _readable(error: OSError, final: Path) -> VlpackError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return VlpackError(
            f"The disk is full: {final.parent} has no room for the package.",
            f"Nothing was left behind. Free some space or choose another {option('output')}.",
        )
    return VlpackError(f"Cannot write the package {final}: {error.strerror or error}.", "Nothing was left behind.")
