"""The package that a command is given: a folder, a Hub id, or the name of a package in the cache.

A Hub id whose package is not in the cache yet is built, after the user was asked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlpack.checkpoint.hub import hub_id, is_folder, is_hub_id, is_offline
from vlpack.cli import console
from vlpack.errors import OptionError
from vlpack.package.manifest import check_folder, read_manifest
from vlpack.tasks import AUTO, manifest_task

if TYPE_CHECKING:
    from vlpack.build_name import Costs
    from vlpack.store.packages import Key, Package


def package_folder(
    given: str, precision: str | None = None, *, task: str = AUTO, update: bool = False, yes: bool = False
) -> Path:
    """The folder of a package, which is checked before the libraries that run it are imported.

    Args:
        given: folder of a package; Hub id of a checkpoint, whose package is found in the cache or built there; or name
            of a package in the cache. A folder takes precedence.
        precision: precision of the package of a Hub id; None for int8, or a quantized checkpoint's own bits.
        task: task for which the package of a Hub id is built, or auto.
        update: whether to ask the Hub for the newest commit, instead of using the package that is there.
        yes: whether to download and build without asking.

    Raises:
        OptionError: ``precision`` or ``update`` is given without a Hub id, or a package has to be built and nobody can
            be asked.
        VlpackError: there is no package, or it cannot be built.
    """
    folder = _package_folder(given, precision, task, update=update, yes=yes)
    check_folder(folder)
    read_manifest(folder)
    return folder


def is_by_name(given: str) -> bool:
    """Whether a package is given by a Hub id, and not as a folder."""
    return is_hub_id(given) and not is_folder(given)


def _package_folder(given: str, precision: str | None, task: str, *, update: bool, yes: bool) -> Path:
    if not is_by_name(given):
        check_options(precision, update=update, what=given)
        if not is_folder(given):
            from vlpack.store.packages import named

            package = named(given)
            if package is not None:
                package.note_use()
                return package.folder
        return Path(given)
    if update and is_offline():
        raise OptionError("--update needs the network, which HF_HUB_OFFLINE forbids.", "Leave out one of them.")
    there = None if update else _find(given, precision and precision.lower(), task)
    if there is not None:
        there.note_use()
        return there.folder
    return _build(given, precision, task, yes=yes)


def _find(given: str, precision: str | None, task: str) -> Package | None:
    """The package of a Hub id in the cache: one that was built for the task, or that turned out to be for it."""
    from vlpack.store import packages

    find = packages.find_default if precision is None else packages.find
    repository, revision = hub_id(given)
    precision = precision or "int8"
    if task == AUTO:
        return find(repository, revision, precision)
    plain = find(repository, revision, precision)
    if plain is not None and manifest_task(plain.folder, read_manifest(plain.folder)) == task:
        return plain
    return find(repository, revision, precision, {"task": task})


def check_options(precision: str | None, *, update: bool, what: str) -> None:
    """Raises an OptionError if an option for Hub ids is given with something else."""
    for name, value in (("--precision", precision), ("--update", update)):
        if value:
            raise OptionError(
                f"{name} is for Hub ids, such as Qwen/Qwen3-VL-2B-Instruct, and {what} is none.",
                "The precision of a package is chosen when it is built." if name == "--precision" else None,
            )


def _build(given: str, precision: str | None, task: str, *, yes: bool) -> Path:
    """Builds the package of a Hub id, unless the cache has one of the commit that the Hub names now."""
    # imported late, because using a package that is there needs none of it
    from vlpack.build_name import Wanted, costs
    from vlpack.build_plan import BuildOptions
    from vlpack.builder import build_by_name
    from vlpack.cli.console_build import build_progress
    from vlpack.store.packages import named

    wanted = Wanted.read(given, BuildOptions(precision=precision, task=task))
    key, folder = wanted.resolve()
    if named(key.name) is None:
        _ask(_sentences(given, key, costs(wanted, key, folder)), yes=yes)
    with build_progress(console.err) as progress:
        result = build_by_name(wanted, key=key, progress=progress, tell=say)
    return result.folder


def say(text: str) -> None:
    """Prints a sentence on standard error, also if it is not a terminal."""
    console.err.print(console.escape(text))


def _ask(sentences: Sequence[str], *, yes: bool) -> None:
    """Says what a build downloads and stores, and asks whether to go on.

    Raises:
        OptionError: there is no terminal to ask at, and ``yes`` is false.
        typer.Exit: the answer is no.
    """
    if yes:
        for sentence in sentences if console.err.is_terminal else ():
            say(sentence)
        return
    if not (console.is_terminal(sys.stdin) and console.err.is_terminal):
        raise OptionError(" ".join(sentences), "Without a terminal nobody can be asked: add --yes to go on.")
    for sentence in sentences:
        say(sentence)
    console.err.print("Go on? \\[y/N] ", end="")
    try:
        answer = sys.stdin.readline()
    except UnicodeDecodeError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        say("Nothing was built.")
        raise typer.Exit(1)


def _sentences(given: str, key: Key, cost: Costs) -> list[str]:
    """What a user should know before a build."""
    from vlpack.store.packages import packages
    from vlpack.store.place import packages_folder

    there = [package for package in packages() if package.key.repository == key.repository]
    sentences = [f"There is no {key.precision} package of {given} at commit {key.commit[:12]} yet."]
    if there:
        sentences[0] += f" (There is {', '.join(package.name for package in there)}.)"
    if cost.download:
        sentences.append(
            f"{console.size(cost.download)} will be downloaded from {cost.address} into the Hugging Face cache "
            f"{cost.cache}, where they stay until you delete them."
        )
    else:
        sentences.append(f"Nothing has to be downloaded: the checkpoint is in the Hugging Face cache {cost.cache}.")
    sentences.append(
        f"The package takes about {console.size(cost.package)} in {packages_folder()}, "
        f"until `vlpack rm {key.name}`. Building it takes {_duration(cost.seconds)}."
    )
    return sentences


def _duration(seconds: float) -> str:
    """An approximate duration in words."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 60:
        return "less than a minute"
    minutes = round(seconds / 60)
    return f"about {minutes} minute{'s' * (minutes > 1)}"
