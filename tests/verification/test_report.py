"""The page and the JSON of a verification: whole, inert whatever a token says, readable in a browser."""

from __future__ import annotations

import base64
import html as escaping
import io
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samples import IMAGES
from vlpack.verification.drawing import heat, modules, number, stages_plot
from vlpack.verification.measure import Agreement, Difference
from vlpack.verification.report import as_json, html, verdict
from vlpack.verification.result import CaseResult, Finding, ImageMap, Report, Stage, WeightResult

HOSTILE = "</style></title><script>alert(\"x\")</script><img src=x onerror='alert(1)'>\u202e\ud800\x00"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
INT4 = "int4 block 32"


def stage(name: str, graph: float | None, total: float, tolerance: float = 3e-5, limit: float = 0.6) -> Stage:
    exact = None if graph is None else Difference(graph, 1.0, 1.0)
    return Stage(name, exact, Difference(total, 1.0, 0.999), tolerance, limit)


def stages(layers: int = 12, blocks: int = 6) -> list[Stage]:
    names = [f"input of vision block {index}" for index in range(blocks)]
    names += ["vision features", "DeepStack 0", "DeepStack 1"] if blocks else []
    names += ["embedding", *(f"layer {index}" for index in range(layers)), "logits"]
    return [stage("positions", 0.0, 0.0)] + [
        stage(name, 1e-7 * 1.02**i, 0.01 * 1.02**i) for i, name in enumerate(names)
    ]


def case(**changes: Any) -> CaseResult:
    whole = CaseResult(
        name="one image",
        prompt="What is the total on this receipt?",
        images=["320 x 224"],
        stages=stages(),
        logits=Agreement([0.01, 0.02], [True, False]),
        tokens=[1, 2, 3, 9],
        pieces=["The", " end", "", "\ufffd"],
        reference_tokens=[1, 4, 5, 9],
        reference_pieces=["The", " other", "\n", "\ufffd"],
        decisive=[3.0, 2.0, 1e-5, 1.0],
        maps=[ImageMap([[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]], (IMAGES / "00.png").read_bytes())],
    )
    return replace(whole, **changes)


def report(**changes: Any) -> Report:
    weights = [
        WeightResult(f"model.language_model.layers.{layer}.mlp.{name}", "decoder", storage, error, error, True)
        for layer in range(12)
        for name, storage, error in (("down_proj", INT4, 0.09 + layer / 1e3), ("norm.weight", "float32", 0.0))
    ]
    text = case(name="text", images=[], maps=[], stages=stages(blocks=0))
    whole = Report(
        "package", "checkpoint", "Qwen3VLForConditionalGeneration", "int4", "cpu", [text, case()], weights, [],
        {"vlpack": "0.1", "torch": "2.13"}, 12.0, 10**9, True,
    )  # fmt: skip
    return replace(whole, **changes)


def exact() -> Report:
    """At fp32, one case, no weight is rounded."""
    fine = [replace(s, total=s.graph or s.total, limit=3e-5) for s in stages()]
    weights = [replace(weight, storage="float32", error=0.0, expected=0.0) for weight in report().weights]
    agreed = Agreement([1e-12, 1e-13], [True, True])
    only = case(stages=fine, logits=agreed, reference_tokens=[1, 2, 3, 9], maps=[ImageMap([[1e-6, 2e-6]], b"no PNG")])
    return report(precision="fp32", cases=[only], weights=weights)


def failed() -> Report:
    good = report()
    bad = [replace(s, graph=Difference(0.5, 1.0, 0.8)) if s.name in {"layer 7", "layer 8"} else s for s in stages()]
    bad[-1] = stage("logits", 0.5, float("inf"))
    maps = [ImageMap([[0.0, float("inf")]], case().maps[0].png)]
    weights = [replace(good.weights[6], error=0.4, same=False)]
    findings = [
        Finding("layer 7", "one image: layer 7 is 0.5 away"),
        Finding("weights", f"{weights[0].path} in the decoder graph is not what vlpack makes of the checkpoint."),
    ]
    cases = [good.cases[0], case(stages=bad, maps=maps, logits=Agreement([float("nan")], [False]))]
    return replace(good, cases=cases, weights=[*good.weights[:6], *weights, *good.weights[7:]], findings=findings)


def hostile() -> Report:
    bad = [replace(s, name=HOSTILE) for s in failed().cases[1].stages[:9]] + [stage(HOSTILE, 1.0, 2.0)]
    evil = case(name=HOSTILE, prompt=HOSTILE, images=[HOSTILE], stages=bad)
    evil = replace(evil, pieces=[HOSTILE] * 4, reference_pieces=[HOSTILE] * 4)
    weights = [WeightResult(HOSTILE, HOSTILE, HOSTILE, 0.1, 0.2, same) for same in (True, False)]
    findings = [Finding(HOSTILE, f"{HOSTILE}: {HOSTILE}")]
    return Report(HOSTILE, HOSTILE, HOSTILE, "int4", HOSTILE, [evil], weights, findings, {HOSTILE: HOSTILE})


@cache
def huge() -> Report:
    """A hundred layers, 64 cases with two noisy images of 3,000 tokens, answers of 500 tokens, 20,000 weights."""
    random = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (640, 480, 3), np.uint8)).save(file, "PNG")
    maps = [ImageMap(random.random((60, 50)).tolist(), file.getvalue())] * 2
    tokens, other = random.integers(0, 9, (2, 500)).tolist()
    pieces = [" word"] * 500
    many = case(
        prompt="Why? " * 5000, images=["a.png", "b.png"], stages=stages(100, 32), maps=maps, decisive=[1.0] * 500,
        tokens=tokens, reference_tokens=other, pieces=pieces, reference_pieces=pieces,
    )  # fmt: skip
    bad = replace(many, stages=[*many.stages[:-1], stage("logits", 0.1, 0.9)])
    weights = [
        WeightResult(f"model.layers.{i % 100}.mlp.experts.{i // 700}.w{i % 7}", "decoder", INT4, 0.1, 0.09, i % 2 == 0)
        for i in range(20_000)
    ]
    cases = [replace(bad if index % 2 else many, name=f"case {index}") for index in range(64)]
    findings = [Finding("logits", f"{c.name}: logits is 0.1 away") for c in cases[1::2]]
    return report(cases=cases, weights=weights, findings=findings)


REPORTS = {
    "good": report,
    "exact": exact,
    "failed": failed,
    "hostile": hostile,
    "text": lambda: report(cases=report().cases[:1]),
    "damaged": lambda: report(cases=[], weights=[], findings=[Finding("files", "decoder.onnx was altered.")]),
    "empty": lambda: report(cases=[case(stages=[], logits=Agreement([], []), maps=[ImageMap([], b"")])], versions={}),
    "huge": huge,
}


class Checked(HTMLParser):
    """Every tag that is opened is closed, in order; what is in it."""

    VOID = ("meta", "img", "br", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_whole_and_inert(name: str) -> None:
    made = REPORTS[name]()
    page = html(made)
    page.encode("utf-8")
    seen = Checked(page)
    assert page.startswith("<!doctype html>")
    assert seen.tags.count("h1") == seen.tags.count("style") == 1
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(seen.tags)
    assert not [key for key, _ in seen.attributes if key.startswith("on")]
    assert all((value or "").startswith("data:image/") for key, value in seen.attributes if key in {"src", "href"})
    assert "default-src 'none'" in page
    assert not set("\u202e\ud800\x00") & set(page)
    assert verdict(made).split(":")[0] in seen.text


def test_a_good_page() -> None:
    seen = Checked(page := html(report()))
    assert "✓ The package is the model: it computes what checkpoint does, within what rounding allows." in seen.text
    assert "not the model" not in page
    assert "✗" not in page
    assert "2 of 4 are what the reference likes best" in seen.text
    assert "␣end reference: ␣other" in seen.text
    assert "#3 ties with ↵" in seen.text  # a token without a text shows its id
    assert "All 24 weights are byte for byte" in seen.text
    assert "12 as float32" in seen.text
    assert "vlpack 0.1, torch 2.13" in seen.text
    assert "streamed module by module" in seen.text
    assert page.count('<details class="case" open>') == 2
    assert page.count('class="heat"') == 1
    assert page.count("<path d=") == 12  # a bar for each layer


def test_a_failed_page() -> None:
    seen = Checked(page := html(failed()))
    assert "✗ The package is not the model: it parts at layer 7 in “one image”." in seen.text
    assert seen.text.index("layer 7 is 0.5 away") < seen.text.index("Error through the model")
    assert "1 of 24 weights are not what vlpack makes" in seen.text
    assert "✗ 1 altered" in seen.text
    assert "not finite (black)" in seen.text
    assert "✗ layer 7" in seen.text
    assert page.count('class="off"') == 1  # the bar of the altered weight
    assert seen.text.index("✗ 1 altered") < seen.text.index("Kept" if "Also" not in seen.text else "Also kept")


def test_what_is_wrong_with_the_package_has_no_case() -> None:
    assert verdict(REPORTS["damaged"]()) == "The package is not the model: it parts at files."


def test_a_huge_page_stays_small() -> None:
    start = time.perf_counter()
    page = html(huge())
    assert len(page.encode()) < 5_000_000
    assert time.perf_counter() - start < 30
    assert "10,000 of 20,000 weights are not" in " ".join(page.split())
    assert page.count("experts.*.w0") == 1  # a hundred layers and all experts are one row
    assert page.count('<details class="case" open>') == 32  # those that failed
    assert "and 12 more, which" in page
    assert "and 300 more" in page


def test_json() -> None:
    shown = json.loads(json.dumps(as_json(failed()), allow_nan=False))
    assert list(shown)[:2] == ["ok", "verdict"]
    assert set(shown) >= {"package", "reference", "precision", "cases", "weights", "findings", "versions", "seconds"}
    assert shown["ok"] is False
    assert shown["verdict"].endswith("parts at layer 7 in “one image”.")
    assert shown["findings"][0]["stage"] == "layer 7"
    found = shown["cases"][1]
    assert found["first_bad"] == "layer 7"
    assert found["stages"][-1]["total"]["relative"] is None
    assert [item["ok"] for item in found["stages"]].count(False) == 3
    assert found["mean_kl"] is None
    assert found["same_tokens"] == 1
    assert found["maps"][0]["values"] == [[0.0, None]]
    assert base64.b64decode(found["maps"][0]["png"]) == (IMAGES / "00.png").read_bytes()
    assert sum(not weight["same"] for weight in shown["weights"]) == 1
    assert as_json(report())["ok"] is True


@pytest.mark.parametrize("name", REPORTS)
def test_json_of_anything(name: str) -> None:
    made = REPORTS[name]()
    if name == "huge":
        made = replace(made, cases=made.cases[:2])
    shown = as_json(made)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (3e-5, "3.0×10⁻⁵"),
        (0.0129, "0.0129"),
        (0.6, "0.6"),
        (999.9, "1.0×10³"),
        (float("inf"), "not finite"),
    ],
)
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown


def test_the_plot_is_logarithmic() -> None:
    """Equal steps for powers of ten, zero on the floor and infinity at the ceiling, and neither is joined."""
    made = stages_plot(
        [stage("layer 0", 1e-4, float("inf")), stage("layer 1", 1e-3, 0.0), stage("layer 2", 1e-2, 1e-1)]
    )
    assert made is not None
    graph, whole = made["lines"]
    heights = [dot["y"] for dot in graph["dots"]]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert [dot["y"] for dot in whole["dots"]][:2] == [0.0, 1000.0]
    assert whole["path"].count("L") == 0
    assert graph["path"].count("L") == 2
    assert {tick["label"]: tick["y"] for tick in made["ticks"]}["10⁻³"] == heights[1]
    assert made["bad"]["name"] == "layer 0"
    assert [dot["ok"] for dot in whole["dots"]] == [False, True, True]


def test_colours_of_a_heat_map_lie_where_the_errors_are() -> None:
    values = [[0.0, 0.5, 0.0], [0.0, 0.0, 1.0]]
    drawn = heat(ImageMap(values, case().maps[0].png), 1.0, 100)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn["overlay"].split(",")[1]))).convert("RGBA"))
    assert pixels.shape == (2, 3, 4)
    assert (pixels[..., 3] > 0).tolist() == (np.array(values) > 0).tolist()
    assert pixels[1, 2, 3] > pixels[0, 1, 3]
    assert drawn["where"] == "row 2 of 2, column 3 of 3"
    assert Image.open(io.BytesIO(base64.b64decode(drawn["picture"].split(",")[1]))).size <= (100, 100)


def test_modules() -> None:
    weights = [*failed().weights, WeightResult("lm_head", "decoder", "int8", 0.01, 0.01, True)]
    rows, kept = modules(weights)
    assert [(row["name"], row["altered"], row["count"]) for row in rows] == [
        ("layers.*.mlp.down_proj", 1, 12),
        ("lm_head", 0, 1),
    ]
    assert kept == {"float32": 12}
    bars = rows[0]["bars"]
    assert [bar["layer"] for bar in bars] == list(range(12))
    assert max(bars, key=lambda bar: bar["share"])["layer"] == 3
    assert rows[1]["bars"][0]["share"] == 1.0  # of its own storage


PROBE = r"""
const linear = (v) => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
const bright = (c) => { const l = c.slice(0, 3).map(linear);
  return .2126 * l[0] + .7152 * l[1] + .0722 * l[2]; };
const rgb = (text) => (text.match(/[\d.]+/g) || []).map(Number);
const behind = (e, view) => { const c = rgb(view.getComputedStyle(e).backgroundColor);
  return c.length === 3 ? c : behind(e.parentElement, view); };
const look = (frame) => {
  const view = frame.contentWindow, page = view.document, all = (s) => [...page.querySelectorAll(s)];
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  const size = (s) => all(s).filter((e) => e.checkVisibility()).map(box);
  const style = (e) => view.getComputedStyle(e);
  const found = { name: frame.name, width: view.innerWidth, folded: page.documentElement.scrollWidth,
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches, h1: all("h1")[0].getBoundingClientRect(),
    words: page.body.innerText.slice(0, 300) };
  for (const e of all("details")) e.open = true;
  found.unfolded = page.documentElement.scrollWidth;
  found.plots = size(".area > svg"); found.bars = size(".bars svg"); found.heat = size(".heat");
  found.over = all(".heat").map((e) => [...e.children].map((i) => [i.naturalWidth, box(i)[0]]));
  found.letters = Math.min(...all(".plot span").map((e) => parseFloat(style(e).fontSize)));
  const worded = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.checkVisibility();
  const contrast = (e) => { const pair = [bright(rgb(style(e).color)), bright(behind(e, view))];
    return (Math.max(...pair) + .05) / (Math.min(...pair) + .05); };
  found.pale = all("body *:not(svg *)").filter(worded).filter((e) => contrast(e) < 4.5)
    .map((e) => e.className + ": " + e.textContent.slice(0, 20)).slice(0, 5);
  const check = all("figcaption input")[0];
  if (check) { const over = check.closest("figure").querySelector(".over");
    found.toggle = [style(over).visibility]; check.click(); found.toggle.push(style(over).visibility); }
  return found; };
addEventListener("load", () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(look)); });
"""


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Every page as a real browser lays it out, on a phone and a desk, light and dark; and what the browser logged."""
    if BROWSER is None:
        pytest.skip("there is no Chromium to look at the page with")
    folder = tmp_path_factory.mktemp("browser")
    frames = [(name, width, scheme) for name in REPORTS for width in (400, 1280) for scheme in ("light", "dark")]
    frames = [frame for frame in frames if frame[0] != "huge" or frame[1:] == (400, "dark")]
    page = folder / "frames.html"
    page.write_text(
        f"<!doctype html><meta charset=utf-8><title>-</title><script>{PROBE}</script>"
        + "".join(
            f'<iframe name="{name} {width} {scheme}" style="width: {width}px; height: 900px; border: 0; '
            f'color-scheme: {scheme}" srcdoc="{escaping.escape(html(REPORTS[name]()))}"></iframe>'
            for name, width, scheme in frames
        ),
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, encoding="utf-8", timeout=180, check=True)
    found = re.search(r"<title>(\[.*?\])</title>", done.stdout, re.DOTALL)
    assert found, done.stdout[:500] + done.stderr[-2000:]
    return {item["name"]: item for item in json.loads(escaping.unescape(found[1]))}, done.stderr


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", REPORTS)
def test_in_a_browser(name: str, width: int, scheme: str, looked: tuple[dict[str, Any], str]) -> None:
    if name == "huge" and (width, scheme) != (400, "dark"):
        pytest.skip("once is enough")
    made, seen = REPORTS[name](), looked[0][f"{name} {width} {scheme}"]
    assert seen["width"] == width
    assert seen["dark"] is (scheme == "dark")
    assert seen["folded"] <= width  # nothing is wider than the window
    assert seen["unfolded"] <= width
    assert verdict(made)[:24] in seen["words"]  # first of all, and where one sees it without scrolling
    assert 0 < seen["h1"]["y"] < 100
    assert seen["h1"]["height"] > 20
    assert seen["pale"] == []  # WCAG AA's contrast
    drawn = [one for one in made.cases if one.stages]
    assert len(seen["plots"]) == (len(drawn) + 1 if len(made.cases) > 1 else len(drawn))
    assert all(wide > 200 and high > 100 for wide, high in seen["plots"] + [[999, 999]])
    assert all(wide > 50 and high > 10 for wide, high in seen["bars"])
    assert len(seen["heat"]) == sum(len(one.maps) for one in made.cases)
    assert all(wide > 50 and high > 5 for wide, high in seen["heat"])
    for layers in seen["over"]:
        assert all(pixels > 0 for pixels, _ in layers)  # the browser could read the pictures
        assert len({wide for _, wide in layers}) == 1  # and lays one exactly over the other
    if drawn:
        assert seen["letters"] >= 11
    if name in {"good", "failed"}:
        assert seen["toggle"] == ["visible", "hidden"]


def test_the_browser_has_nothing_to_say(looked: tuple[dict[str, Any], str]) -> None:
    """No error, no blocked script, nothing that was wanted from elsewhere."""
    assert [line for line in looked[1].splitlines() if "CONSOLE" in line] == []
