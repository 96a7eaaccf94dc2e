"""The packages in the cache, each with a small file beside it (its sidecar) that says how it was asked for.

The sidecar of the package ``NAME`` is ``NAME.json``. It is beside the package and not inside, because a package
consists of exactly the files that its manifest lists. Its modification time is the last use of the package, so that
noting a use never rewrites a file that another process may be changing. Sidecars are untrusted: one that is damaged, is
a link or disagrees with its name is treated as if it did not exist.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlpack.checkpoint.files import quote, read_json
from vlpack.errors import CheckpointError, OptionError
from vlpack.package import manifest as package_manifest
from vlpack.package.manifest import MANIFEST
from vlpack.store.place import packages_folder

MAIN = "main"
"""The branch that a Hub id without a revision means."""
OWN_BITS = "own_bits"
"""The option of a key for a quantized checkpoint that keeps its own bits, because no precision was given."""
SIDECAR_BYTES = 100_000
"""Largest sidecar that is read, in bytes."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WORD = re.compile(r"[a-z0-9]{1,20}")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*--[A-Za-z0-9][\w.-]*@[0-9a-f]{12}-[a-z0-9-]+", re.ASCII)
_MAX_NAME = 200


@dataclass(frozen=True)
class Key:
    """The properties that decide the bytes of a package in the cache.

    Args:
        repository: Hub repository of the checkpoint, ``org/name``.
        commit: commit of the repository, 40 hexadecimal digits.
        precision: fp32, fp16, int8 or int4.
        options: other options of the build that change the package, without those that have their defaults.
        format: version of the package's format.

    Raises:
        CheckpointError: the repository's name, the commit or the precision cannot be part of a folder's name.
    """

    repository: str
    commit: str
    precision: str
    options: Mapping[str, Any] = field(default_factory=dict)
    format: int = field(default_factory=lambda: package_manifest.FORMAT)

    def __post_init__(self) -> None:
        plain = (
            _REPOSITORY.fullmatch(self.repository)
            and ".." not in self.repository
            and _COMMIT.fullmatch(self.commit)
            and _WORD.fullmatch(self.precision)
        )
        if not plain or len(self.name) > _MAX_NAME:
            raise CheckpointError(
                f"{quote(self.repository)} at {quote(self.commit)} cannot be kept in the cache of packages.",
                "Build it into a folder of its own, with -o.",
            )

    @property
    def name(self) -> str:
        """The name of the package's folder, such as ``Qwen--Qwen3-VL-2B-Instruct@0123456789ab-int8``.

        Options are represented by a word, if there is one, and by a hash.
        """
        words = [self.precision]
        for name in ("execution_provider", "task"):
            value = self.options.get(name)
            if isinstance(value, str) and _WORD.fullmatch(value):
                words.append(value)
        if "calibrate" in self.options:
            words.append("calibrated")
        if OWN_BITS in self.options:
            words.append("own")
        if self.options:
            text = json.dumps(dict(self.options), sort_keys=True)
            words.append(hashlib.sha256(text.encode()).hexdigest()[:8])
        if self.format != 1:
            words.append(f"format{self.format}")
        return f"{self.repository.replace('/', '--')}@{self.commit[:12]}-{'-'.join(words)}"


@dataclass(frozen=True)
class Package:
    """A package in the cache.

    Args:
        folder: folder of the package.
        key: properties that decide its bytes.
        revisions: revision as it was asked for → time at which it meant this commit, in seconds since 1970.
        created: time of the build, in seconds since 1970.
        used: time of the last use, in seconds since 1970.
        source_bytes: size of the checkpoint's weights, in bytes.
    """

    folder: Path
    key: Key
    revisions: Mapping[str, float]
    created: float
    used: float
    source_bytes: int

    @property
    def name(self) -> str:
        """The name of the package in the cache."""
        return self.folder.name

    @property
    def bytes(self) -> int:
        """The size of the package's files, in bytes."""
        total = 0
        with suppress(OSError), os.scandir(self.folder) as files:
            for file in files:
                total += file.stat(follow_symlinks=False).st_size
        return total

    def note_use(self) -> None:
        """Records that the package is used now. A cache that cannot be written is no error."""
        with suppress(OSError):
            os.utime(sidecar(self.folder))


def sidecar(folder: Path) -> Path:
    """The path of the sidecar of the package at ``folder``."""
    return folder.with_name(f"{folder.name}.json")


def packages() -> list[Package]:
    """All packages in the cache, the last used first.

    Raises:
        OptionError: the cache's folder exists and cannot be read.
    """
    return sorted(_found(packages_folder()), key=lambda package: (-package.used, package.name))


def find(
    repository: str, revision: str | None, precision: str, options: Mapping[str, Any] | None = None
) -> Package | None:
    """The package that was built for a repository and revision, or None; the network is not used.

    If a branch has moved and packages of several of its commits are in the cache, it is the one of the last commit.

    Args:
        repository: Hub repository, ``org/name``.
        revision: branch, tag or commit, as it was asked for; None for the default branch.
        precision: fp32, fp16, int8 or int4.
        options: other options of the build that change the package, without those that have their defaults.
    """
    asked = revision or MAIN
    fitting = [
        package
        for package in packages()
        if (package.key.repository, package.key.precision) == (repository, precision)
        and dict(package.key.options) == dict(options or {})
        and package.key.format == package_manifest.FORMAT
        and (asked in package.revisions or asked == package.key.commit)
    ]
    return max(fitting, key=lambda package: package.revisions.get(asked, 0), default=None)


def find_default(
    repository: str, revision: str | None, precision: str, options: Mapping[str, Any] | None = None
) -> Package | None:
    """The package that was built for a repository and revision without a precision, or None, as `find` finds it.

    Args:
        repository: Hub repository, ``org/name``.
        revision: branch, tag or commit, as it was asked for; None for the default branch.
        precision: default precision of checkpoints that are not quantized.
        options: other options of the build, as for `find`.
    """
    for own in ("int4", "int8", "fp16"):
        package = find(repository, revision, own, {**(options or {}), OWN_BITS: True})
        if package is not None:
            return package
    package = find(repository, revision, precision, options)
    if package is not None and "imported" in package_manifest.read_manifest(package.folder):
        return None  # of a quantized checkpoint, with a precision that was given
    return package


def named(name: str) -> Package | None:
    """The package of this name in the cache, or None. A name that could lead out of the cache is never followed."""
    return read_package(packages_folder() / name) if is_name(name) else None


def is_name(text: str) -> bool:
    """Whether a text has the form of a package's name in the cache, which is always a plain file name."""
    return len(text) <= _MAX_NAME and _NAME.fullmatch(text) is not None


def read_package(folder: Path) -> Package | None:
    """The package at ``folder`` with what its sidecar says; None if there is no package or no usable sidecar."""
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode) or not stat.S_ISREG(os.lstat(folder / MANIFEST).st_mode):
            return None
        beside = sidecar(folder)
        status = os.lstat(beside)
        if not stat.S_ISREG(status.st_mode):
            return None
        content = read_json(beside, beside, limit=SIDECAR_BYTES, strict=True)
        package = _checked(folder, content, status.st_mtime)
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return None
    return package if package.key.name == folder.name else None


def write_sidecar(
    folder: Path, key: Key, revisions: Mapping[str, float], *, source_bytes: int = 0, created: float | None = None
) -> None:
    """Writes the sidecar of the package at ``folder``, as a whole: no reader ever sees half of it.

    Args:
        folder: folder of the package, which need not exist yet.
        key: properties that decide its bytes.
        revisions: revision as it was asked for → time at which it meant this commit, in seconds since 1970.
        source_bytes: size of the checkpoint's weights, in bytes.
        created: time of the build, in seconds since 1970; None for now.
    """
    content = {
        "repository": key.repository,
        "commit": key.commit,
        "precision": key.precision,
        "options": dict(key.options),
        "format": key.format,
        "revisions": dict(revisions),
        "created": time.time() if created is None else created,
        "source_bytes": source_bytes,
    }
    partial = folder.with_name(f".{folder.name}.json-{secrets.token_hex(4)}")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, sidecar(folder))
    finally:
        partial.unlink(missing_ok=True)


def _found(cache: Path) -> Iterator[Package]:
    try:
        names = os.listdir(cache)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OptionError(
            f"The cache of packages {cache} cannot be read: {error.strerror or error}.",
            "Set VLPACK_CACHE to another folder.",
        ) from None
    for name in names:
        package = read_package(cache / name) if is_name(name) else None
        if package is not None:
            yield package


def _checked(folder: Path, content: Mapping[str, Any], used: float) -> Package:
    """The package that an untrusted sidecar describes. Raises a ValueError, KeyError or TypeError if it is damaged."""
    repository, commit, precision = (_text(content[name]) for name in ("repository", "commit", "precision"))
    options, revisions = content["options"], content["revisions"]
    if not isinstance(options, dict) or not isinstance(revisions, dict):
        raise TypeError("options and revisions are objects")
    return Package(
        folder=folder,
        key=Key(repository, commit, precision, options, int(_number(content["format"]))),
        revisions={_text(revision): _number(when) for revision, when in revisions.items()},
        created=_number(content["created"]),
        used=used,
        source_bytes=int(_number(content["source_bytes"])),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _number(value: object) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not 0 <= value < 1e15
    ):
        raise ValueError("not a number")
    return float(value)
