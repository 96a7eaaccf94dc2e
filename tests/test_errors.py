"""Sentences name options in the words of the interface that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from samples import DIGITS, vlpack
from vlpack.builder import build
from vlpack.errors import Note, OptionError, VlpackWarning, first_option, in_python, in_request, on_command_line, option


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


@pytest.mark.parametrize(
    ("sentence", "asked", "first"),
    [
        (f"{option('top_p')} is 2.", "'top_p' is 2.", "top_p"),
        (f"Say {option('temperature', 0)}.", 'Say "temperature": 0.', "temperature"),
        (f"Say {option('task', 'x')}.", 'Say "task": "x".', "task"),
        (f"Make it with a larger {option('context')}.", "Make it with a larger --context of the server.", "context"),
        ("No option at all.", "No option at all.", None),
    ],
)
def test_a_sentence_in_a_request(sentence: str, asked: str, first: str | None) -> None:
    assert in_request(sentence) == asked
    assert first_option(sentence) == first


def test_one_mistake_in_both_interfaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError) as caught:
        build(DIGITS, tmp_path / "package", part="text", vision_precision="fp32")
    assert str(caught.value).startswith("vision_precision has no effect with part='text'")
    done = vlpack(capsys, "build", DIGITS, "-o", tmp_path / "package", "--part", "text", "--vision-precision", "fp32")
    assert done.err.startswith("error: --vision-precision has no effect with --part text")
