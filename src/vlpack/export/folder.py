"""The folder of a package under construction: it has its name only when it is complete.

Everything is written to a hidden sibling, ``.NAME.partial-…``, which is renamed at the end. An error removes it; what a
killed build left behind is removed by the next build to the same name. A build holds a lock on its folder, so that the
next one can tell the two apart (process ids cannot: they repeat, in containers at once).
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
    """Raises an OptionError where a package's path is not text in UTF-8, as the runtime opens none that is not."""
    try:
        os.path.realpath(output).encode()
    except UnicodeEncodeError:
        raise OptionError(
            f"The name {quote(str(output))}, or that of a folder it is in, is not text in UTF-8; the runtime could not "
            "open the package.",
            f"Choose another {option('output')}.",
        ) from None
    except (OSError, ValueError):  # which is told where the folder is made
        pass


def check_free(output: Path, *, force: bool) -> None:
    """The name of a package is free: nothing is there, or an empty folder, or, with ``force``, a package.

    Raises:
        OptionError: it is not, or the name cannot be a package's. Only a folder that holds a package and nothing else
            is ever replaced.
    """
    _check_text(output)
    while True:
        before = _identity(output)
        try:
            return _check_free(output, force=force)
        except (OptionError, OSError) as error:
            if _identity(output) != before:
                continue  # another build replaced it while it was looked at
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
            f"{output} exists.",
            f"Choose another {option('output')}, or replace the package with {option('force', True)}.",
        )
    try:
        known = {*read_manifest(output)["files"], MANIFEST}
    except PackageError as error:
        raise OptionError(f"{output} is not replaced: {error.message}", another) from None
    foreign = sorted(path.name for path in output.iterdir() if path.name not in known or path.is_dir())
    if foreign:
        raise OptionError(f"{output} is not replaced: {foreign[0]!r} in it is not the package's.", another)


@contextmanager
def output_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` when the block ends without an error.

    Args:
        output: the package's name; its parents are made where they are missing. A link is followed.
        force: replace a package that is already there. Anything else that is there is never replaced.

    Raises:
        OptionError: ``output`` exists, or its parent cannot be written.
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
            with suppress(OSError):  # somebody else uses it by now
                parent.rmdir()


def check_space(folder: Path, needed: int, where: Path | None = None) -> None:
    """Say before the work that the disk cannot hold it.

    Args:
        folder: of the package, for the message.
        needed: bytes.
        where: a folder on the disk, if ``folder`` is not there yet.

    Raises:
        VlpackError: fewer than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(where or folder).free
    if free < needed:
        raise VlpackError(
            f"Not enough space in {folder.parent}: the package takes {needed / 1e9:.2f} GB and "
            f"{free / 1e9:.2f} GB are free.",
            f"Free some space, or choose another {option('output')}.",
        )


def _new_partial(final: Path) -> tuple[Path, int | None]:
    """A new folder beside ``final``, and the lock on it.

    Until it is locked, another build may take it for a leftover and remove it, and one that fails may remove parents
    that both found missing: then a new one is made.
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
    """A descriptor that keeps ``folder`` locked until it is closed or its process dies; None where there are no locks.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: the folder is gone.
    """
    if os.name == "nt":
        return None  # folders cannot be opened there: no leftover is removed
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a network disk
    return descriptor


def _remove_leftovers(final: Path) -> None:
    ours = re.compile(rf"\.{re.escape(final.name)}\.partial-[0-9a-f]{{8}}(-old)?")
    for leftover in sorted(final.parent.iterdir()):
        if not ours.fullmatch(leftover.name) or not leftover.is_dir() or leftover.is_symlink():
            continue
        if leftover.name.endswith("-old") and leftover.with_name(leftover.name.removesuffix("-old")).exists():
            continue  # the package that a build is replacing right now, and would put back if it failed
        with suppress(FileNotFoundError, BlockingIOError):
            lock = _lock(leftover)
            if lock is not None:
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)


def _put_in_place(partial: Path, final: Path, *, force: bool) -> None:
    """Give the finished folder its name.

    Other builds may do the same at any point in between. A rename onto a folder that is not empty fails, so nothing is
    overwritten; with ``force`` the last one to come wins, and without it the first.
    """
    old = Path(f"{partial}-old")
    while True:
        check_free(final, force=force)
        try:
            if force and _exchanged(partial, final):
                return  # what was there goes with the partial folder, whose name it has
            _make_room(final, old, force=force)
            os.rename(partial, final)
        except BaseException as error:
            if not isinstance(error, OSError) or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                with suppress(OSError):
                    os.rename(old, final)
                raise
            shutil.rmtree(old, ignore_errors=True)  # another build was faster, also at replacing this one
        else:
            shutil.rmtree(old, ignore_errors=True)
            return


def _exchanged(partial: Path, final: Path) -> bool:
    with suppress(FileNotFoundError):  # nothing is there yet
        return exchange(partial, final)
    return False


def _make_room(final: Path, old: Path, *, force: bool) -> None:
    with suppress(FileNotFoundError):
        if force:
            os.rename(final, old)
        elif os.name == "nt":  # where a rename does not replace an empty folder
            os.rmdir(final)


def _readable(error: OSError, final: Path) -> VlpackError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return VlpackError(
            f"The disk is full: {final.parent} has no room for the package.",
            f"Nothing was left behind. Free some space, or choose another {option('output')}.",
        )
    return VlpackError(f"Cannot write the package {final}: {error.strerror or error}.", "Nothing was left behind.")
