"""The scripts in `benchmarks/` that turn measurements into ratios, tables, plots and the page."""

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

from vlpack.ort.kernels import Library

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
    import roofline

    yield {"compare": compare, "build": build, "page": page, "plot": plot, "quiet": quiet, "roofline": roofline}
    for name in ("compare", "build", "page", "peak", "plot", "quiet", "roofline", "peers", "peers.make"):
        sys.modules.pop(name, None)


def test_ratios_are_to_the_best_peer(scripts: Any) -> None:
    runs = {
        "512": {
            "vlpack a": [run(1, 0.03, warm=0.9), run(2, 0.02, warm=0.8)],
            "x": [run(4, 0.01, warm=1.0)],
            "y": [run(2, 0.04, load=6.0, warm=2.0)],
        }
    }
    heads, _, *lines = scripts["compare"].table(runs).splitlines()
    rows = [dict(zip(heads.split(" | "), line.split(" | "), strict=True)) for line in lines]
    cells = [line.split(" | ") for line in lines]
    assert cells[0][2:11] == ["512", "4.00–5.00", "0.57", "1.00–2.00", "0.50", "0.80–0.90", "0.80", "20.0–30.0", "2.00"]
    assert (cells[1][4], cells[2][6], cells[1][8], cells[1][10]) == ("1.00",) * 4
    assert rows[0]["later requests, s"] == "0.80–0.90"
    assert (rows[0]["of reading"], rows[2]["of reading"]) == ("2.0", "4.0")
    alone = scripts["compare"].table({"512": {"vlpack a": [run(1, 0.03)]}}).splitlines()[2].split(" | ")
    assert alone[4] == alone[6] == alone[7] == alone[8] == "-"


def test_ratios_are_to_peers_of_as_many_bits(scripts: Any) -> None:
    compare = scripts["compare"]
    runs = {
        "512": {
            "vlpack 2b-int8": [run(1, 0.03, bits=8)],
            "vlpack 2b-int4": [run(3, 0.02, bits=4)],
            "vlpack 2b-fp32": [run(8, 0.08, bits=32)],
            "x int8": [run(4, 0.06, bits=8)],
            "y Q4_0": [run(2, 0.04, bits=4)],
        }
    }
    rows = [line.split(" | ") for line in compare.table(runs).splitlines()[2:]]
    assert [(row[6], row[10]) for row in rows[:3]] == [("0.25", "0.50"), ("1.50", "0.50"), ("4.00", "2.00")]


def test_bits_follow_from_names_and_manifests(scripts: Any, tmp_path: Path) -> None:
    compare = scripts["compare"]
    names = ("openvino-int8", "llama-q4_0.gguf", "llama-q8_0.gguf", "upstream-fp32", "models-plain")
    assert [compare.bits(compare.kind(Path(name))) for name in names] == [8, 4, 8, 32, None]
    (tmp_path / "vlpack.json").write_text('{"precision": "int4"}')
    assert (compare.bits_of(tmp_path), compare.bits_of(tmp_path / "none")) == (4, None)


def test_the_first_request_is_reported_separately(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = scripts["compare"]
    (tmp_path / "model").write_bytes(b"x")
    work = {"prompt_tokens": 9, "first_token": [8.4, 4.5, 4.1], "token": [0.3, 0.2, 0.1], "resident": 1}
    for seconds, warm in (([8.4, 4.5, 4.1], 4.1), ([8.4], None)):
        printed = json.dumps({"load": 2.0, "version": "1", "works": [{**work, "first_token": seconds}]})
        contender = compare.Contender([sys.executable, "-c", f"print({printed!r})"], tmp_path / "model")
        found = compare.measure(contender, "640x480")
        assert (found["first"], found["warm"], found["token"], found["load"]) == (8.4, warm, 0.1, 2.0)
    seen: list[Any] = []

    def contenders(given: Any) -> dict[str, Any]:
        seen.append(given.answers)
        return {}

    monkeypatch.setattr(compare, "contenders", contenders)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--vlpack", str(tmp_path), "--rounds", "1"])
    compare.main()
    assert seen == [3]  # by default, later requests are measured too


def test_a_plot_says_whether_it_shows_cold_or_warm_requests(scripts: Any) -> None:
    def result(**more: Any) -> dict[str, Any]:
        return {"results": {"64x32": {"vlpack a": [run(2, 0.1, **more)]}, "64x64": {"vlpack a": [run(3, 0.1, **more)]}}}

    cold, warm = scripts["page"].images(result()), scripts["page"].images(result(warm=1.0))
    assert "first request (cold)" in cold
    assert "later requests (warm)" in warm
    assert cold.count("<circle") == warm.count("<circle") == 2


def test_builds_are_compared_with_copying(scripts: Any) -> None:
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
def test_ticks_are_few_and_exceed_the_largest_value(scripts: Any, highest: float) -> None:
    ticks = scripts["plot"].ticks(highest)
    assert ticks[0] == 0
    assert highest <= ticks[-1] * (1 + 1e-9)
    assert 2 <= len(ticks) <= 8


def test_labels_do_not_touch(scripts: Any) -> None:
    moved = scripts["plot"].spread([340.0, 100.0, 101.0, 343.0], 17)
    ordered = sorted(moved)
    assert all(after - before >= 17 - 1e-9 for before, after in pairwise(ordered))


def test_a_page_is_filled(tmp_path: Path) -> None:
    """Running the command twice gives the same page as running it once."""
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


def test_processor_time_of_other_processes(scripts: Any) -> None:
    with scripts["quiet"].Others() as others:
        subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert others.cores is None or 0 <= others.cores < 1024
    assert 0 < others.own <= 1.1
    with scripts["quiet"].Others() as waiting:
        time.sleep(0.3)
    assert waiting.own < 0.2


def test_the_roofline_measures_the_operators_that_it_names(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    roofline = scripts["roofline"]
    monkeypatch.setattr(roofline, "COLD", 1 << 14)
    products = [("Linear8", 64, 16, 0), ("Linear8", *roofline.VISION[0], 0), ("Linear4", 64, 16, 32)]
    cases = [case for one in [*products, ("Linear8Blocks", 64, 16, 64)] for case in roofline.product(*one)]
    for operator in ("GroupQueryAttention", "NarrowGroupQueryAttention"):
        cases += roofline.causal(operator)
    assert {case.copies for case in cases} > {1}
    for case in cases:
        made = roofline.replaced(case, Library("kernels.so", "avx512_bf16"))
        assert [(node.domain, node.op_type) for node in made.graph.node] == [("vlpack", case.operator)] * case.copies


def test_the_roofline_s_table(scripts: Any) -> None:
    one = {"operator": "A", "sizes": "2 → 3", "stock": 0.002, "native": 0.001, "peak": 50.0, "share": 0.5}
    results = [
        {**one, "call": "1 row", "threads": 1, "limit": "reading"},
        {**one, "call": "2 rows", "threads": 2, "limit": "int8"},
    ]
    lines = scripts["roofline"].table(results).splitlines()
    assert lines[0] == "|  | 1 row | 2 rows |"
    assert lines[2:] == [
        "| A, 2 → 3, 1 thread | 1 (2), 25 GB/s 50% |  |",
        "| A, 2 → 3, 2 threads |  | 1 (2), int8 50% |",
    ]
