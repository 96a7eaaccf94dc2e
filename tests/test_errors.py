"""Sentences name options in the words of the interface that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from samples import DIGITS, vlpack
from vlpack.builder import build
from vlpack.errors import Note, OptionError, VlpackWarning, in_python, on_command_line, option


@pytest.mark.parametrize(
    ("sentence", "python", "command_line"),
    [
        (f"Give a smaller {option('max_pixels')}.", "Give a smaller max_pixels.", "Give a smaller --max-pixels."),
        (
            f"Build it with {option('task', 'embedding')}.",
            "Build it with task='embedding'.",
            "Build it with --task embedding.",
        ),
        (
            f"Give {option('allow_private_urls', True)}.",
            "Give allow_private_urls=True.",
            "Give --allow-private-urls.",
        ),
        (
            f"Build with {option('extra.weight_type', 'uint8')}.",
            "Build with weight_type='uint8'.",
            "Build with --extra-options weight_type=uint8.",
        ),
        (f"Leave {option('images')} away.", "Leave images away.", "Leave --image away."),
        ("No option at all.", "No option at all.", "No option at all."),
    ],
)
def test_a_sentence_in_both_interfaces(sentence: str, python: str, command_line: str) -> None:
    assert in_python(sentence) == str(OptionError(sentence)) == Note(sentence) == python
    assert str(VlpackWarning(sentence)) == python
    assert on_command_line(sentence) == on_command_line(Note(sentence)) == command_line


def test_one_mistake_in_both_interfaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError) as caught:
        build(DIGITS, tmp_path / "package", part="text", vision_precision="fp32")
    assert str(caught.value).startswith("vision_precision has no effect with part='text'")
    done = vlpack(capsys, "build", DIGITS, "-o", tmp_path / "package", "--part", "text", "--vision-precision", "fp32")
    assert done.err.startswith("error: --vision-precision has no effect with --part text")
