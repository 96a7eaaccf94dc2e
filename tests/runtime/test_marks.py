"""Boxes and points are read from answers and drawn at their places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlpack.runtime.marks import HUES, Mark, draw_marks, marks_of

BOX = '{"bbox_2d": [100, 200, 500, 900], "label": "cat"}'


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        (BOX, [Mark((100, 200, 500, 900), "cat")]),
        (f"[{BOX}, {BOX}]", [Mark((100, 200, 500, 900), "cat")] * 2),
        (f"Here they are:\n```json\n[{BOX}]\n```\nDone.", [Mark((100, 200, 500, 900), "cat")]),
        (f"```\n{BOX}\n```", [Mark((100, 200, 500, 900), "cat")]),
        ('{"found": [{"point_2d": [1.5, 2]}]}', [Mark((1.5, 2), "")]),
        (
            '{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "text_content": "a"}',
            [Mark((1, 2, 3, 4), "a"), Mark((5, 6, 7, 8), "a")],
        ),
        ('[{"bbox_2d": [1, 2, 3]}, {"bbox_2d": [1, 2, 3, "4"]}, {"bbox_2d": [1, 2, 3, true]}]', []),
        ('{"bbox_2d": [1, 2, 3, NaN]}', []),
        ('{"bbox_2d": [1, 2, 3, 1' + "0" * 400 + "]}", []),
        ("There is nothing.", []),
        ("[" * 100_000, []),
        ("", []),
    ],
    ids=range(12),
)
def test_marks_of(text: str, marks: Any) -> None:
    assert marks_of(text) == marks


def colour(image: Image.Image, x: int, y: int) -> str:
    return "#" + bytes(np.asarray(image)[y, x]).hex()


def test_drawing() -> None:
    white = Image.new("RGB", (400, 200), "white")
    marks = [Mark((250, 250, 750, 750), ""), Mark((900, 500), "far"), Mark((-50, 0, 2000, 1000), "")]
    drawn = draw_marks(white, marks)
    assert drawn.size == white.size
    assert set(np.asarray(white).ravel()) == {255}  # the original image is not changed
    for x, y in ((100, 100), (200, 50), (299, 100), (200, 149)):
        assert colour(drawn, x, y) == HUES[0]
    assert colour(drawn, 200, 100) == "#ffffff"
    assert colour(drawn, 359, 99) == HUES[1]
    for x, y in ((0, 100), (399, 100), (200, 0), (200, 199)):
        assert colour(drawn, x, y) == HUES[0]  # marks outside of the image are drawn at its edge
    labelled = draw_marks(white, [Mark((0, 0, 1000, 1000), "label\n" * 50)])
    assert np.count_nonzero(np.asarray(labelled) != np.asarray(draw_marks(white, [Mark((0, 0, 1000, 1000), "")]))) > 500
