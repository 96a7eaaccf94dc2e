"""The page of a verification in a real browser: on a phone and a desktop screen, light and dark."""

from __future__ import annotations

import html as escaping
import json
import re
import subprocess
from typing import Any

import pytest

from chromium import OPTIONS, PROGRAM
from verification.reports import REPORTS
from vlpack.verification.report import html, verdict

FRAMES = [(name, width, scheme) for name in REPORTS for width in (400, 1280) for scheme in ("light", "dark")]
FRAMES = [
    frame for frame in FRAMES if frame[0] != "huge" or frame[1:] == (400, "dark")
]  # the huge report is opened only once
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
  found.paper = bright(rgb(style(page.body).backgroundColor));
  found.right = Math.max(...all("main *:not(.scroll *, .plot *)").map((e) => e.getBoundingClientRect().right));
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
    """The layout of every page in a browser, on a phone and a desktop screen, light and dark, and the browser's log."""
    if PROGRAM is None:
        pytest.skip("there is no Chromium to look at the page with")
    folder = tmp_path_factory.mktemp("browser")
    page = folder / "frames.html"
    page.write_text(
        f"<!doctype html><meta charset=utf-8><title>-</title><script>{PROBE}</script>"
        + "".join(
            f'<iframe name="{name} {width} {scheme}" style="width: {width}px; height: 900px; border: 0; '
            f'color-scheme: {scheme}" srcdoc="{escaping.escape(html(REPORTS[name]()))}"></iframe>'
            for name, width, scheme in FRAMES
        ),
        encoding="utf-8",
    )
    command = [PROGRAM, *OPTIONS, f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, encoding="utf-8", timeout=180, check=True)
    found = re.search(r"<title>(\[.*?\])</title>", done.stdout, re.DOTALL)
    assert found, done.stdout[:500] + done.stderr[-2000:]
    return {item["name"]: item for item in json.loads(escaping.unescape(found[1]))}, done.stderr


@pytest.mark.parametrize(("name", "width", "scheme"), FRAMES)
def test_in_a_browser(name: str, width: int, scheme: str, looked: tuple[dict[str, Any], str]) -> None:
    made, seen = REPORTS[name](), looked[0][f"{name} {width} {scheme}"]
    assert seen["width"] == width
    assert seen["dark"] is (scheme == "dark")
    assert seen["folded"] <= width  # nothing is wider than the window
    assert seen["unfolded"] <= width
    assert seen["right"] <= width - 16 + 0.5  # nothing extends into the margin
    assert seen["paper"] < 0.1 if scheme == "dark" else seen["paper"] > 0.9
    assert verdict(made)[:24] in seen["words"]  # the verdict is first and visible without scrolling
    assert 0 < seen["h1"]["y"] < 100
    assert seen["h1"]["height"] > 20
    assert seen["pale"] == []  # WCAG AA's contrast
    drawn = [one for one in made.cases if one.stages]
    assert len(seen["plots"]) == (len(drawn) + 1 if len(made.cases) > 1 else len(drawn))
    assert all(wide > 200 and 150 < high < 300 for wide, high in seen["plots"])
    assert all(wide > 50 and high > 10 for wide, high in seen["bars"])
    assert len(seen["heat"]) == sum(len(one.maps) for one in made.cases)
    assert all(wide > 50 and high > 5 for wide, high in seen["heat"])
    for layers in seen["over"]:
        assert all(pixels > 0 for pixels, _ in layers)  # the browser has decoded the pictures
        assert len({wide for _, wide in layers}) == 1  # all layers of a picture have the same width
    if drawn:
        assert seen["letters"] >= 11
    if name in {"good", "failed"}:
        assert seen["toggle"] == ["visible", "hidden"]


def test_the_browser_logs_nothing(looked: tuple[dict[str, Any], str]) -> None:
    """The browser logs no error, no blocked script and no request for an external resource."""
    assert [line for line in looked[1].splitlines() if "CONSOLE" in line] == []
