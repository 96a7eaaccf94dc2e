"""Reasoning and answer are separated correctly, however the text is split into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlpack.preprocess.chat_template import CLOSE, OPEN
from vlpack.runtime.reasoning import ReasoningStream, opens_reasoning, split_reasoning


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "said"),
    [
        ("A cat.", False, None, "A cat."),
        ("\nA cat.", False, None, "\nA cat."),
        ("Hm.\n</think>\n\nA cat.", True, "Hm.", "A cat."),
        ("<think>\nHm.\n</think>\n\nA cat.", False, "Hm.", "A cat."),
        ("\n <think>Hm.</think>A cat.", False, "Hm.", "A cat."),
        ("Hm, and no end", True, "Hm, and no end", ""),
        ("<think>\n\n</think>\n\nA cat.", False, "", "A cat."),
        ("In HTML <think> is no tag.", False, None, "In HTML <think> is no tag."),
        ("Hm.</think>It is <think>, </think>.", True, "Hm.", "It is <think>, </think>."),
        ("", False, None, ""),
        ("<thin", False, None, "<thin"),
    ],
)
def test_cases(text: str, opened: bool, reasoning: str | None, said: str) -> None:
    assert split_reasoning(text, opened) == (reasoning, said)
    stream = ReasoningStream(opened)
    pieces = [
        piece for character in text for piece in stream.push(character)
    ] + stream.flush()  # marks arrive character by character
    spoken = "".join(piece for thinking, piece in pieces if not thinking)
    assert (spoken if reasoning is None else spoken.lstrip("\n")) == said
    assert "".join(piece for thinking, piece in pieces if thinking).strip("\n") == (reasoning or "")


words = st.lists(st.sampled_from([OPEN, CLOSE, "<thi", "nk>", "</", "a", " ", "\n", "<", "é"]), max_size=12)


@given(words, st.booleans(), st.lists(st.integers(0, 60), max_size=8))
def test_texts_in_random_pieces(parts: list[str], opened: bool, cuts: list[int]) -> None:
    text = "".join(parts)
    whole, pieces = ReasoningStream(opened), ReasoningStream(opened)
    expected = [*whole.push(text), *whole.flush()]
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    found = [piece for start, end in pairwise(edges) for piece in pieces.push(text[start:end])]
    found += pieces.flush()
    for thinking in (True, False):
        assert "".join(t for k, t in found if k == thinking) == "".join(t for k, t in expected if k == thinking)
    assert pieces.reasoned == whole.reasoned
    assert all(piece for _, piece in found)


def test_prompts_that_begin_the_reasoning() -> None:
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
