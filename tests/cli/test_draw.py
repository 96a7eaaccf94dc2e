"""``vlpack run --draw``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samples import DIGITS, IMAGES, vlpack
from vlpack.builder import build

pytest.importorskip("llguidance")

Capsys = pytest.CaptureFixture[str]
BOX = '[{"bbox_2d": [250, 250, 750, 750], "label": "it"}]'


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DIGITS, tmp_path_factory.mktemp("package") / "digits").folder


def test_boxes_are_drawn(package: Path, tmp_path: Path, capsys: Capsys) -> None:
    asked = (
        package,
        "Where?",
        "--image",
        IMAGES / "00.png",
        "--image",
        IMAGES / "01.png",
        "--draw",
        tmp_path / "out.png",
    )
    done = vlpack(capsys, "run", *asked, "--choice", BOX)
    assert (done.code, done.out) == (0, f"{BOX}\n")
    drawn, last = Image.open(tmp_path / "out.png"), Image.open(IMAGES / "01.png").convert("RGB")
    assert drawn.size == last.size
    changed = np.argwhere((np.asarray(drawn) != np.asarray(last)).any(axis=2))
    assert changed[:, 1].min() == pytest.approx(0.25 * last.width, abs=2)


def test_an_answer_without_boxes(package: Path, tmp_path: Path, capsys: Capsys) -> None:
    asked = (package, "Read the digits.", "--image", IMAGES / "00.png", "--draw", tmp_path / "out.png")
    done = vlpack(capsys, "run", *asked)
    assert done.code == 2
    assert "names no boxes or points" in done.err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--draw", "out.png"], "--draw has no effect without an image"),
        (["--image", IMAGES / "00.png", "--draw", "out.txt"], "must end in .png"),
        (["--image", IMAGES / "00.png", "--draw", "nowhere/out.png"], "there is no folder"),
    ],
    ids=["image", "name", "folder"],
)
def test_what_is_refused(arguments: list[str], said: str, package: Path, capsys: Capsys) -> None:
    done = vlpack(capsys, "run", package, "Where?", *arguments)
    assert done.code == 2
    assert said in done.err
