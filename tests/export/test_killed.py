"""Builds killed at any moment: the output is never half a package, and the next build cleans up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from samples import DIGITS
from vlpack.builder import build
from vlpack.inspection import inspect

KILLS = 50

KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from vlpack.builder import build
from vlpack.inspection import inspect

source, place, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
started = time.monotonic()
build(source, place, precision="int8")
whole, length = inspect(place)["problems"] == [], time.monotonic() - started
outcomes = {"whole": 0, "nothing": 0, "half": 0, "ended": 0, "leftovers": 0}
rng = random.Random(0)
for number in range(kills):
    for path in place.glob("*"):
        path.unlink()
    place.exists() and place.rmdir()
    child = os.fork()
    if child == 0:
        try:
            build(source, place, precision="int8")
        finally:
            os._exit(0)
    time.sleep((number + rng.random()) / kills * 1.05 * length)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    outcomes["ended"] += not os.WIFSIGNALED(status)
    outcomes["leftovers"] += any(place.parent.glob(f".{place.name}.partial-*"))
    if not place.exists():
        outcomes["nothing"] += 1
    else:
        outcomes["whole" if inspect(place)["problems"] == [] else "half"] += 1
print(json.dumps({**outcomes, "sound": whole}))
"""


STEPPER = """
import json, os, shutil, signal, sys
from pathlib import Path
from vlpack.export import folder as output

place, steps = Path(sys.argv[1]), 0
if sys.argv[2] == "in two steps":
    output.exchange = lambda one, other: False
NAMES = ("mkdir", "rename", "rmdir", "unlink", "open")

def fill(folder, name):
    (folder / name).write_text(name)
    (folder / "vlpack.json").write_text(json.dumps({"format": 1, "files": {name: {}}}))

def replace(kill_at):
    count = 0
    def counted(call):
        def run(*arguments, **options):
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return run
    for name in NAMES:
        setattr(os, name, counted(getattr(os, name)))
    with output.output_folder(place, force=True) as folder:
        fill(folder, "new")

found = []
for kill_at in range(1, 1000):
    shutil.rmtree(place.parent)
    place.mkdir(parents=True)
    fill(place, "old")
    child = os.fork()
    if child == 0:
        replace(kill_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    there = sorted(path.name for path in place.iterdir()) if place.exists() else []
    with output.output_folder(place, force=True) as folder:
        fill(folder, "next")
    after = [sorted(path.name for path in folder.iterdir()) for folder in (place, place.parent)]
    found.append([os.WIFSIGNALED(status), there, after])
    if not os.WIFSIGNALED(status):
        break
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("how", ["in one step", "in two steps"])
def test_a_replacement_killed_before_each_of_its_steps(how: str, tmp_path: Path) -> None:
    """The output is the old or the new package, never a part of one; without an atomic exchange it may be absent."""
    if how == "in one step" and sys.platform not in ("linux", "darwin"):
        pytest.skip("this system cannot exchange names")
    place = tmp_path / "place" / "package"
    place.parent.mkdir()
    command: list[Any] = [sys.executable, "-c", STEPPER, place, how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    old, new = ["old", "vlpack.json"], ["new", "vlpack.json"]
    assert [killed for killed, _, _ in found] == [True] * (len(found) - 1) + [False]
    assert all(there in (old, [], new) for _, there, _ in found)
    assert all(after == [["next", "vlpack.json"], ["package"]] for _, _, after in found)
    states = [there for _, there, _ in found]
    assert states == sorted(states, key=[old, [], new].index)  # the states follow each other in this order
    assert states.count([]) == (how == "in two steps")
    assert states.count(old) > 3
    assert states.count(new) > 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_fifty_kills(tmp_path: Path) -> None:
    """Fifty builds, each killed at another moment, spread over the whole duration of a build."""
    place = tmp_path / "package"
    done = subprocess.run(
        [sys.executable, "-c", KILLER, DIGITS, place, str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes["sound"]
    assert outcomes["half"] == 0
    assert outcomes["whole"] + outcomes["nothing"] == KILLS
    # most builds were killed before their end, and some while they wrote the package
    assert outcomes["nothing"] >= KILLS // 4
    assert outcomes["leftovers"] >= 3
    build(DIGITS, place, precision="int8", force=place.exists())
    assert inspect(place)["problems"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
