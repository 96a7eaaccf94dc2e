"""Several builds to one output at once: one complete package, an error for the others, and nothing left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from vlpack.errors import OptionError
from vlpack.export import folder as output
from vlpack.export.folder import output_folder

needs_posix = pytest.mark.skipif(os.name == "nt", reason="locks and renames of POSIX")


def fill(folder: Path, name: str) -> None:
    """Writes the files that make a folder count as a package."""
    (folder / name).write_text(name)
    (folder / "vlpack.json").write_text(json.dumps({"format": 1, "files": {name: {}}}))


def package(folder: Path, name: str) -> Path:
    folder.mkdir()
    fill(folder, name)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write(folder: Path, name: str, *, force: bool) -> None:
    with output_folder(folder, force=force) as partial:
        fill(partial, name)


def race(number: int, folder: Path, rounds: int, force: bool, start: Any, results: Any) -> None:
    """The work of each process: writes a package to the same output in every round, at the same time as the others."""
    chance = random.Random(number)
    for round_ in range(rounds):
        start.wait(60)
        try:
            with output_folder(folder / str(round_) / "package", force=force) as partial:
                fill(partial, str(number))
                time.sleep(chance.random() * 0.003)
            results.put("won")
        except OptionError as error:
            results.put(error.message.replace(str(folder), "").lstrip("/0123456789"))
        except BaseException as error:
            results.put(repr(error))


@needs_posix
@pytest.mark.parametrize("force", [False, True])
def test_processes_that_build_to_the_same_output(force: bool, tmp_path: Path) -> None:
    processes, rounds = 4, 40
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=race, args=(number, tmp_path, rounds, force, start, results))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    outcomes = Counter(results.get(timeout=120) for _ in range(processes * rounds))
    for worker in workers:
        worker.join()
    wanted = (
        {"won": processes * rounds} if force else {"won": rounds, "package already exists.": (processes - 1) * rounds}
    )
    assert outcomes == wanted
    for round_ in range(rounds):
        assert names(tmp_path / str(round_)) == {"package"}
        made = tmp_path / str(round_) / "package"
        assert names(made) == {"vlpack.json", *json.loads((made / "vlpack.json").read_text())["files"]}


def test_a_package_that_appears_during_the_build_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def other_first(source: Path, target: Path) -> None:
        if not target.exists():
            package(target, "other")
        rename(source, target)

    monkeypatch.setattr(os, "rename", other_first)
    with pytest.raises(OptionError, match="exists"):
        write(tmp_path / "package", "mine", force=False)
    assert names(tmp_path) == {"package"}
    assert "other" in names(tmp_path / "package")


def test_a_working_folder_that_another_build_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, times = output._lock, []

    def removed_first(folder: Path) -> int | None:
        times.append(folder)
        if len(times) == 1:
            shutil.rmtree(folder)
        return lock(folder)

    monkeypatch.setattr(output, "_lock", removed_first)
    write(tmp_path / "package", "mine", force=False)
    assert names(tmp_path) == {"package"}
    assert "mine" in names(tmp_path / "package")


def test_the_old_package_is_restored_if_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path / "package", "before")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if ".partial-" in source.name and "-old" not in source.name:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(output, "exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "package", "after", force=True)
    assert names(tmp_path) == {"package"}
    assert "before" in names(tmp_path / "package")
