"""The tasks of models (generating text, embedding inputs, scoring documents), and errors for the wrong task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlpack.errors import OptionError, PackageError

GENERATE, EMBEDDING, RERANKER = "generate", "embedding", "reranker"
TASKS = (GENERATE, EMBEDDING, RERANKER)
AUTO = "auto"
"""The value of a build's option ``task`` that derives the task from the checkpoint."""


_USES = {
    GENERATE: ("generates text", "vlpack run PACKAGE", ".generate(…)"),
    EMBEDDING: ("embeds its inputs", "vlpack embed PACKAGE TEXT", ".embed([…])"),
    RERANKER: ("scores documents", "vlpack score PACKAGE QUERY DOCUMENT", ".score(query, documents)"),
}
_METHODS = ("generate", "stream", "embed", "score")


def check_task(task: str) -> None:
    """Raises an OptionError if ``task`` is not a value that a build accepts."""
    if task not in (AUTO, *TASKS):
        raise OptionError(f"Unknown task '{task}'.", f"Tasks are {', '.join((AUTO, *TASKS))}.")


class WrongTaskError(PackageError, AttributeError):
    """A package was used for another task than its own. Also an AttributeError, so that ``hasattr`` returns False."""


def check_package_task(folder: Path, manifest: dict[str, Any], wanted: str) -> None:
    """Raises a `WrongTaskError`, which says what to do instead, if a package is not for the task ``wanted``."""
    task = manifest_task(folder, manifest)
    if task != wanted:
        raise wrong_task(folder, task)


def manifest_task(folder: Path, manifest: dict[str, Any]) -> str:
    """The task in a package's manifest; ``generate`` in the first packages, which have no such entry.

    Raises:
        PackageError: this version of vlpack does not know the task.
    """
    task = manifest.get("task", GENERATE)
    if task not in TASKS:
        raise PackageError(f"{folder} is for the task {task!r}, which this vlpack does not know.", "Update vlpack.")
    return str(task)


def wrong_task(folder: Path, task: str) -> WrongTaskError:
    """The error for using a package of ``task`` for something else."""
    does, command, call = _USES[task]
    return WrongTaskError(
        f"{folder} is a package for the task {task}: it {does} and does nothing else.",
        f"On the command line: {command.replace('PACKAGE', str(folder))}; from Python: vlpack.load(…){call}.",
    )


class Loaded:
    """Base class of loaded packages. Methods of another task raise a `WrongTaskError` that names the right method."""

    folder: Path
    task: str

    def __getattr__(self, name: str) -> Any:
        if name in _METHODS:
            raise wrong_task(self.folder, self.task)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
