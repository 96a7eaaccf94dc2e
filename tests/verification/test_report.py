"""The page and the JSON of a verification: whole, inert whatever a token says, readable in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from samples import IMAGES
from vlpack.verification.measure import Agreement, Difference
from vlpack.verification.report import as_json, html
from vlpack.verification.result import CaseResult, Finding, ImageMap, Report, Stage, WeightResult

HOSTILE = '<script>alert("x")</script>'
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def stage(name: str, graph: float, total: float) -> Stage:
    return Stage(name, Difference(graph, 1.0, 1.0), Difference(total, 1.0, 1.0), 3e-5, 0.6)


def report(**changes: Any) -> Report:
    names = ["pixels", *(f"layer {index}" for index in range(12)), "logits"]
    stages = [stage(name, 1e-7 * 1.2**index, 0.01 * 1.1**index) for index, name in enumerate(names)]
    case = CaseResult(
        name="one image",
        prompt=f"What? {HOSTILE}",
        images=["a.png"],
        stages=stages,
        logits=Agreement([0.01, 0.02], [True, False]),
        tokens=[1, 2, 3],
        pieces=["The", HOSTILE, " end"],
        reference_tokens=[1, 4, 5],
        reference_pieces=["The", " other", " fin"],
        decisive=[3.0, 2.0, 1e-5],
        maps=[ImageMap([[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]], (IMAGES / "00.png").read_bytes())],
    )
    weights = [
        WeightResult(f"layers.{index}.mlp.down_proj", "decoder", "int4 block 32", 0.09, 0.09, True)
        for index in range(12)
    ]
    whole = Report(
        "package",
        f"checkpoint {HOSTILE}",
        "Architecture",
        "int4",
        "cpu",
        [case],
        weights,
        [],
        {"vlpack": "0.1"},
        12.0,
        10**9,
    )
    return replace(whole, **changes)


def failed() -> Report:
    good = report()
    bad = replace(good.cases[0], stages=[*good.cases[0].stages[:3], stage("layer 2", 0.5, float("inf"))])
    altered = replace(good.weights[0], error=0.4, same=False)
    findings = [Finding("layer 2", f"one image: layer 2 is 0.5 away {HOSTILE}")]
    return replace(good, cases=[bad], weights=[altered, *good.weights[1:]], findings=findings)


class Checked(HTMLParser):
    """Every tag that is opened is closed, in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("made", [report(), failed(), report(cases=[], weights=[])], ids=["good", "bad", "damaged"])
def test_the_page(made: Report) -> None:
    page = html(made)
    parser = Checked()
    parser.feed(page)
    assert parser.open == []
    assert "script" not in parser.seen
    assert HOSTILE not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)  # nothing from elsewhere
    text = " ".join(page.split())
    if made.ok:
        assert "The package is the model." in text
    else:
        assert "parts at “layer 2”" in text
        assert "1 of 12 weights are not" in text
        assert "not finite" in text
    if made.cases:
        assert page.count("<polyline") == 2
        assert page.count('fill-opacity="') == 6
        assert "≠  other" in page
        assert "(tie)" in page
        assert "12 weights are" in text


def test_a_large_page_stays_small() -> None:
    good = report()
    many = [
        replace(good.weights[0], path=f"layers.{index}.mlp.experts.{index % 7}.down_proj") for index in range(20_000)
    ]
    stages = [stage(f"layer {index}", 1e-6, 0.1) for index in range(100)]
    maps = [ImageMap([[0.5] * 64] * 48, good.cases[0].maps[0].png)]
    page = html(replace(good, weights=many, cases=[replace(good.cases[0], stages=stages, maps=maps)] * 4))
    assert len(page) < 5_000_000


def test_json() -> None:
    shown = json.loads(json.dumps(as_json(failed()), allow_nan=False))
    assert shown["ok"] is False
    assert shown["findings"][0]["stage"] == "layer 2"
    case = shown["cases"][0]
    assert case["first_bad"] == "layer 2"
    assert case["stages"][3]["total"]["relative"] is None
    assert case["same_tokens"] == 1
    assert base64.b64decode(case["maps"][0]["png"]) == (IMAGES / "00.png").read_bytes()
    assert as_json(report())["ok"] is True


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to look at the page with")
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser(width: int, tmp_path: Path) -> None:
    """Laid out by a real browser: nothing is wider than the window, plots and pictures have a size."""
    probe = (
        "<script>addEventListener('load', () => { const box = (s) => [...document.querySelectorAll(s)].map("
        "(e) => e.getBoundingClientRect()).every((r) => r.width > 10 && r.height > 10);"
        "document.title = JSON.stringify({wide: document.documentElement.scrollWidth - innerWidth, svg: box('svg'),"
        "img: box('img'), heading: box('h1'), width: innerWidth}) })</script>"
    )
    page = tmp_path / "report.html"
    page.write_text(html(failed()).replace("</head>", f"{probe}</head>"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found, done.stdout[:500]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen["wide"] <= 0, seen
    assert seen["svg"], seen
    assert seen["img"], seen
    assert seen["heading"], seen
