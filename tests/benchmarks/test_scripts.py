"""What `benchmarks/` makes of measurements: ratios, tables, plots, the page."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MACHINE = {"processor": "A <b>", "cores": 2, "memory": 8e9, "system": "Linux"}


def run(first: float, token: float, **more: Any) -> dict[str, Any]:
    known = {
        "prompt_tokens": 512,
        "resident": 2e9,
        "load": 3.0,
        "read": 1.5,
        "own": 1.9,
        "others": 0.25,
        "version": "1",
    }
    return {"first": first, "token": token, **known, **more}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import build
    import compare
    import page
    import plot
    import quiet

    yield {"compare": compare, "build": build, "page": page, "plot": plot, "quiet": quiet}
    for name in ("compare", "build", "page", "plot", "quiet", "peers", "peers.make"):
        sys.modules.pop(name, None)


def test_ratios_are_to_the_best_peer(scripts: Any) -> None:
    runs = {"512": {"vlpack a": [run(1, 0.03), run(2, 0.02)], "x": [run(4, 0.01)], "y": [run(2, 0.04, load=6.0)]}}
    rows = [line.split(" | ") for line in scripts["compare"].table(runs).splitlines()[2:]]
    assert rows[0][2:7] == ["512", "1.00–2.00", "0.50", "20.0–30.0", "2.00"]
    assert rows[2][4] == "1.00"
    assert (rows[0][9], rows[2][9]) == ("2.0", "4.0")
    alone = scripts["compare"].table({"512": {"vlpack a": [run(1, 0.03)]}})
    assert alone.splitlines()[2].split(" | ")[4] == "-"


def test_builds_stand_beside_copying(scripts: Any) -> None:
    built = {"wall": 10.0, "processor": 15.0, "peak": 4e8, "bytes": 1e9, "code": 0, "others": None}
    runs = {
        "copy": [{**built, "wall": 2.0}],
        "a": [built, {**built, "wall": 8.0, "peak": 5e8}],
        "b": [{**built, "code": 9}],
    }
    rows = scripts["build"].table(runs).splitlines()[2:]
    assert rows[1] == "| a | 8.0 | 4.0 | 15.0 | 0.50 GB | 1.00 GB | - |"
    assert "b (exit code 9)" in rows[2]


@pytest.mark.parametrize("highest", [0.003, 0.99, 1, 7, 23.4, 1e5])
def test_ticks_are_few_and_reach_above(scripts: Any, highest: float) -> None:
    ticks = scripts["plot"].ticks(highest)
    assert ticks[0] == 0
    assert highest <= ticks[-1] * (1 + 1e-9)
    assert 2 <= len(ticks) <= 8


def test_labels_do_not_touch(scripts: Any) -> None:
    moved = scripts["plot"].spread([340.0, 100.0, 101.0, 343.0], 17)
    ordered = sorted(moved)
    assert all(after - before >= 17 - 1e-9 for before, after in pairwise(ordered))


def test_a_page_is_filled(tmp_path: Path) -> None:
    """As the command: twice, which gives the same page."""
    (tmp_path / "benchmarks.md").write_text(
        "# A\n<!-- compare -->\nold\n<!-- /compare -->\n<!-- build -->\n<!-- /build -->\nend\n"
    )
    settings = {"machine": MACHINE, "threads": 2, "new_tokens": 8, "answers": 1, "rounds": 1}
    results = {
        "512": {"vlpack a": [run(1, 0.1)]},
        "64x32": {"vlpack a": [run(2, 0.1)]},
        "64x64": {"vlpack a": [run(3, 0.1)]},
    }
    compared = tmp_path / "compare.json"
    compared.write_text(json.dumps({**settings, "results": results}))
    row = {"wall": 1.0, "processor": 1.0, "peak": 4e8, "bytes": 1e9, "code": 0, "others": 0.0}
    builds = tmp_path / "build.json"
    whole = {"machine": MACHINE, "checkpoint": "2b", "bytes": 4e9, "rounds": 1, "builds": {"copy": [row], "a": [row]}}
    builds.write_text(json.dumps(whole))
    command = [sys.executable, str(BENCHMARKS / "page.py"), "--docs", str(tmp_path)]
    options = ["--compare", str(compared), "--images", str(compared), "--build", str(builds)]
    pages = []
    for _ in range(2):
        subprocess.run([*command, *options], check=True)
        pages.append((tmp_path / "benchmarks.md").read_text())
    assert pages[0] == pages[1]
    assert "old" not in pages[0]
    assert "| 512 | vlpack a |" in pages[0]
    assert pages[0].endswith("end\n")
    for name, word in (("image-time.svg", "64×32"), ("build-memory.svg", "checkpoint, GB")):
        drawing = ElementTree.parse(tmp_path / name)
        assert word in "".join(drawing.getroot().itertext())
    wrong = subprocess.run([*command, "--compare", str(builds)], capture_output=True, text=True, check=False)
    assert (wrong.returncode, "not a result" in wrong.stderr) == (1, True)
    assert (tmp_path / "benchmarks.md").read_text() == pages[0]


def test_others_are_not_oneself(scripts: Any) -> None:
    with scripts["quiet"].Others() as others:
        subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert others.cores is None or 0 <= others.cores < 1024
    assert 0 < others.own <= 1.1
    with scripts["quiet"].Others() as waiting:
        time.sleep(0.3)
    assert waiting.own < 0.2
