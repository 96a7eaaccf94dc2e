"""The page and the JSON of a verification: complete, and without active content whatever text a token contains."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from samples import IMAGES
from verification.reports import REPORTS, case, failed, huge, report, stage, stages
from vlpack.verification.drawing import heat, modules, number, stages_plot
from vlpack.verification.report import as_json, html, verdict
from vlpack.verification.result import Finding, ImageMap, WeightResult


class Checked(HTMLParser):
    """Parses a page, checks that every opened tag is closed in order, and collects text and attributes."""

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
def test_the_page_is_complete_and_has_no_active_content(name: str) -> None:
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
    assert "2 of 4 are the reference’s most likely token" in seen.text
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
    assert "✗ The package is not the model: it first differs at layer 7 in “one image”." in seen.text
    assert seen.text.index("layer 7 is 0.5 away") < seen.text.index("Error through the model")
    assert "1 of 24 weights are not what a build of the checkpoint stores" in seen.text
    assert "✗ 1 altered" in seen.text
    assert "not finite (black)" in seen.text
    assert "✗ layer 7" in seen.text
    for tile in ("Graph error ✗ off", "Whole error ✗ off", "Next token, KL ✗ off", "Weights ✗ off"):
        assert tile in seen.text
    assert page.count('class="off"') == 1  # the bar of the altered weight
    assert seen.text.index("✗ 1 altered") < seen.text.index("Stored" if "Also" not in seen.text else "Also stored")


def test_a_case_beyond_its_bounds_is_marked_whatever_the_findings_say() -> None:
    seen = Checked(html(replace(failed(), findings=[Finding("weights", "altered")])))
    assert "text ✓ ok" in seen.text
    assert "one image ✗ off" in seen.text


def test_findings_about_the_whole_package_have_no_case() -> None:
    assert verdict(REPORTS["damaged"]()) == (
        "The package is not the model: its files are not those that the build wrote."
    )


@pytest.mark.parametrize("first", [True, False])
def test_values_that_are_not_numbers_are_always_marked(first: bool) -> None:
    nan = float("nan")
    bad = case(name="bad", stages=[*stages()[:-1], stage("logits", nan, nan)])
    found = [Finding("logits", "bad: logits is nan away")]
    seen = Checked(html(report(cases=[bad, case()] if first else [case(), bad], findings=found)))
    for tile in ("Graph error ✗ off not finite", "Whole error ✗ off not finite"):
        assert tile in seen.text
    assert "bad ✗ off not finite not finite" in seen.text


@pytest.mark.parametrize("first", [True, False])
def test_a_weight_that_is_not_a_number_has_the_highest_bar(first: bool) -> None:
    bad = WeightResult("layers.3.experts.0.w", "decoder", "int4", float("nan"), 0.1, False)
    good = replace(bad, path="layers.3.experts.1.w", error=0.1, same=True)
    weights = [bad, good] if first else [good, bad]
    (row,), _ = modules(weights)
    assert row["bars"] == [{"layer": 3, "error": float("inf"), "same": False, "share": 1.0}]
    assert row["worst"] == float("inf")
    assert "v-nan" not in html(report(weights=weights))


def test_no_text_makes_a_page_large() -> None:
    """The page stays small with names, tokens and prompts of any length and any number of modules."""
    long = "x" * 2_000_000
    one = case(
        name=long, prompt=long, images=[long, *["a" * 200] * 5000], pieces=[long] * 4, reference_pieces=[long] * 4
    )
    weights = [WeightResult(f"m{'y' * i}.w", "decoder", "int4", 0.1, 0.1, True) for i in range(2000)]
    weights += [WeightResult(f"layers.{'9' * 5000}.w", long, "int4", 0.2, 0.1, False)]
    page = html(report(cases=[one] * 9, weights=weights, package=long, findings=[Finding(long, long)]))
    assert len(page.encode()) < 5_000_000
    assert page.count('<div class="bars">') == 300
    assert "and 1,701 more modules" in page
    assert max(map(len, re.findall(r">([^<]*)</bdi>", page[page.index('class="chip') :]))) < 100
    assert "✗ 1 altered" in Checked(page).text  # altered weights are always shown


def test_plots_of_the_page_are_never_cut() -> None:
    made = report(cases=[case(stages=stages(400, 60))])
    plot = stages_plot(made.cases[0].stages)
    assert plot is not None
    assert len(plot["lines"][0]["path"]) > 1000
    assert f'd="{plot["lines"][0]["path"]}"' in html(made)


def test_a_huge_page_stays_small() -> None:
    start = time.perf_counter()
    page = html(huge())
    assert len(page.encode()) < 5_000_000
    assert time.perf_counter() - start < 30
    assert "10,000 of 20,000 weights are not" in " ".join(page.split())
    assert page.count("experts.*.w0") == 1  # a hundred layers and all experts are one row
    assert page.count('<details class="case" open>') == 32  # cases that failed are open
    assert "and 12 more, which" in page
    assert "and 300 more" in page
    assert page.count('class="chip ') == 64 * 200


def test_json() -> None:
    shown = json.loads(json.dumps(as_json(failed()), allow_nan=False))
    assert list(shown)[:2] == ["ok", "verdict"]
    assert set(shown) >= {"package", "reference", "precision", "cases", "weights", "findings", "versions", "seconds"}
    assert shown["ok"] is False
    assert shown["verdict"].endswith("first differs at layer 7 in “one image”.")
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
def test_json_of_unusual_values(name: str) -> None:
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
    """Powers of ten have equal steps; zero is at the bottom and infinity at the top, and lines end before them."""
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
    values = [[0.0, 0.5, 0.0], [float("inf"), 0.0, 1.0]]
    drawn = heat(ImageMap(values, case().maps[0].png), 1.0, 100)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn["overlay"].split(",")[1]))).convert("RGBA"))
    assert pixels.shape == (2, 3, 4)
    assert (pixels[..., 3] > 0).tolist() == (np.array(values) > 0).tolist()
    assert pixels[1, 2, 3] > pixels[0, 1, 3]
    assert pixels[1, 0].tolist() == [0, 0, 0, 255]
    assert (drawn["not_finite"], drawn["where"]) == (1, "row 2 of 2, column 1 of 3")
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
    assert rows[1]["bars"][0]["share"] == 1.0  # relative to weights of the same storage
