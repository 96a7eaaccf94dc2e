"""The image sizes for which the runtime's own processor takes another patch grid, and their note in a README."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

import vlpack
from samples import DIGITS
from vlpack.export.processor_config import grid_difference
from vlpack.preprocess import ImageProcessor, smart_resize


@pytest.mark.parametrize(("patch", "merge"), [(16, 2), (14, 2), (8, 2)])
def test_the_listed_edges_are_those_that_differ(patch: int, merge: int) -> None:
    processor = ImageProcessor.from_folder(DIGITS)
    processor = replace(processor, patch_size=patch, merge_size=merge, min_pixels=1, max_pixels=10**9)
    difference, factor = grid_difference(processor), patch * merge
    assert difference is not None

    def differs(edge: int) -> bool:
        sizes = [
            smart_resize(edge, edge, factor, 1, 10**9, rounded=rounded)
            for rounded in (round, lambda value: math.floor(value + 0.5))
        ]
        return sizes[0] != sizes[1]

    for edge in difference.edges:
        assert differs(edge)
        assert not differs(edge - 1)  # the README's advice
    first = [edge for edge in range(factor, difference.edges[3] + 1) if differs(edge)]
    assert first == difference.edges[:4]
    assert (720 in difference.edges) == (factor == 32)


def test_a_package_s_readme_names_them(tmp_path: Path) -> None:
    folder = vlpack.build(DIGITS, tmp_path / "package", precision="int4").folder
    card = re.sub(r"\s+", " ", (folder / "README.md").read_text(encoding="utf-8"))
    difference = grid_difference(ImageProcessor.from_folder(DIGITS))
    assert difference is not None
    assert f"({', '.join(map(str, difference.edges))} … pixels)" in card
    assert f"{difference.width}×{difference.height}" in card
    assert "slightly" not in card
