"""Adds packages to the cache and removes them, in one process at a time.

Every package has a lock, a file in ``.locks``. A build holds it from before its first byte until the package is
complete, so a second process that wants the same package waits and then finds it. The system releases the lock of a
process that is killed; what such a process has written is removed by the next one that changes the cache.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vlpack.checkpoint.files import quote
from vlpack.errors import OptionError, PackageError
from vlpack.package.manifest import read_manifest, unlisted_files
from vlpack.store.packages import MAIN, Key, Package, is_name, named, packages, read_package, sidecar, write_sidecar
from vlpack.store.place import VARIABLE, packages_folder

_LOCKS = ".locks"
_LEFTOVER = re.compile(r"\.(?P<name>.+?)\.(partial-[0-9a-f]{8}(-old)?|removed-[0-9a-f]{8}|json-[0-9a-f]{8})")


@dataclass(frozen=True)
class Place:
    """The place of a package in the cache, while this process holds its lock.

    Args:
        folder: folder of the package.
        package: the package that is there already; None if it has to be built.
        key: properties that decide the package's bytes.
        revision: revision as it was asked for.
    """

    folder: Path
    package: Package | None
    key: Key
    revision: str

    def note_revision(self) -> Package | None:
        """Records that the revision means this commit now, and returns the package that is there."""
        if self.package is None:
            return None
        write_sidecar(
            self.folder,
            self.key,
            {**self.package.revisions, self.revision: time.time()},
            source_bytes=self.package.source_bytes,
            created=self.package.created,
        )
        return read_package(self.folder)

    @contextmanager
    def building(self) -> Iterator[Callable[[int], None]]:
        """Records how the package was asked for, around the build that writes it.

        The sidecar is written first: a sidecar without a package is ignored, but a package without a sidecar would
        remain in the cache forever.

        Yields:
            A function that takes the size of the checkpoint's weights in bytes, to be called after the build.
        """
        before = {} if self.package is None else self.package.revisions
        revisions = {**before, self.revision: time.time()}
        write_sidecar(self.folder, self.key, revisions)
        try:
            yield lambda count: write_sidecar(self.folder, self.key, revisions, source_bytes=count)
        except BaseException:
            if self.package is None:
                sidecar(self.folder).unlink(missing_ok=True)
            raise


@contextmanager
def reserve(key: Key, revision: str | None, tell: Callable[[str], None]) -> Iterator[Place]:
    """Holds the lock of a package while the block runs; waits if another process has it.

    Args:
        key: properties that decide the package's bytes.
        revision: branch, tag or commit as it was asked for; None for the default branch.
        tell: function that receives a sentence if another process has the lock, before this one waits.

    Raises:
        OptionError: the cache cannot be written.
    """
    cache = _writable()
    folder = cache / key.name
    with _locked(cache, key.name, tell):
        remove_leftovers(cache, key.name)
        if folder.is_symlink():
            raise OptionError(f"{folder} is a link, and packages are not written through links.", "Remove the link.")
        yield Place(folder, read_package(folder), key, revision or MAIN)


def remove(name: str) -> tuple[str, int]:
    """Removes a package from the cache.

    Processes that use it go on: on Linux and macOS, files that are open remain until they are closed. On Windows the
    folder cannot be renamed while its files are open, and nothing is removed.

    Args:
        name: name of the package, or the Hub id of a repository of which there is only one package.

    Returns:
        The name of the package, and the size of its files in bytes.

    Raises:
        OptionError: there is no package of this name, it is being built, it contains files that are not its own, or it
            cannot be removed.
    """
    package = named(name) or _only(name)
    cache = _writable()
    with _locked(cache, package.name, None):
        if read_package(package.folder) is None:
            raise OptionError(f"{package.name} was removed by another process.")
        _refuse_foreign_files(package)
        size = package.bytes
        gone = cache / f".{package.name}.removed-{secrets.token_hex(4)}"
        try:
            os.rename(package.folder, gone)
            sidecar(package.folder).unlink(missing_ok=True)
        except OSError as error:
            raise OptionError(
                f"{package.name} cannot be removed: {error.strerror or error}.",
                "If a program is using it, end that program first." if os.name == "nt" else None,
            ) from None
        shutil.rmtree(gone, ignore_errors=True)
        remove_leftovers(cache, package.name)
    return package.name, size


def remove_leftovers(cache: Path, held: str) -> None:
    """Removes what killed processes have left in the cache: folders of unfinished packages, and stray sidecars.

    Args:
        cache: folder of the packages.
        held: name of the package whose lock this process holds; for others, only what no process has locked is removed.
    """
    from filelock import FileLock, Timeout

    for path in sorted(cache.iterdir()):
        leftover = _LEFTOVER.fullmatch(path.name)
        name = leftover["name"] if leftover else path.name.removesuffix(".json")
        if not is_name(name) or not _is_leftover(path):
            continue
        if name == held:
            _discard(path)
            continue
        with suppress(Timeout, OSError), FileLock(_lock_file(cache, name), timeout=0):
            if _is_leftover(path):  # still so, now that nothing changes it
                _discard(path)


def _is_leftover(path: Path) -> bool:
    """Whether a path in the cache is an unfinished or removed package, or a sidecar without a package."""
    stray = path.suffix == ".json" and not path.with_suffix("").exists()
    return stray or _LEFTOVER.fullmatch(path.name) is not None


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _only(name: str) -> Package:
    """The only package of a repository that is given as ``org/name``, as ``org/name@revision``, or by a name."""
    repository, _, revision = name.partition("@")
    fitting = [
        package
        for package in packages()
        if package.key.repository == repository
        and (not revision or revision in package.revisions or revision == package.key.commit)
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise OptionError(
            f"There are {len(fitting)} packages of {quote(name)} in the cache.",
            "Give the name of one: " + ", ".join(package.name for package in fitting) + ".",
        )
    raise OptionError(f"There is no package {quote(name)} in the cache.", "`vlpack list` shows the names.")


def _refuse_foreign_files(package: Package) -> None:
    try:
        foreign = unlisted_files(package.folder, read_manifest(package.folder))
    except PackageError:  # damaged, or of another version's format: the names of its files are not known
        return
    if foreign:
        raise OptionError(
            f"{package.name} is not removed: {package.folder} contains {foreign[0]!r}, which is not a file of the "
            "package.",
            "Move it elsewhere first.",
        )


def _writable() -> Path:
    """The cache's folder, created if necessary, with all links on its way resolved."""
    folder = packages_folder()
    try:
        (folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        return folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"The cache of packages {folder} cannot be written: {reason}.",
            f"Set {VARIABLE} to a folder that you can write, or build into a folder of your choice with -o.",
        ) from None


def _lock_file(cache: Path, name: str) -> Path:
    return cache / _LOCKS / f"{name}.lock"


@contextmanager
def _locked(cache: Path, name: str, tell: Callable[[str], None] | None) -> Iterator[None]:
    """Holds the lock of a package. Without ``tell``, a lock that another process has is an OptionError."""
    from filelock import FileLock, Timeout

    lock = FileLock(_lock_file(cache, name))
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if tell is None:
                raise OptionError(
                    f"{name} is being built by another process.", "Wait until it is finished, or end that process."
                ) from None
            tell(f"Another process is building {name}; waiting until it is finished.")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"The package cannot be locked in the cache {cache}: {reason}.",
            f"Set {VARIABLE} to a folder on a local disk that you can write.",
        ) from None
    try:
        yield
    finally:
        lock.release()
