"""Separates the reasoning that thinking models write from the answer after it, in a whole text or in a stream."""

from __future__ import annotations

from vlpack.preprocess.chat_template import CLOSE, OPEN


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends with `OPEN`, so that the answer starts inside the reasoning."""
    return prompt.rstrip().endswith(OPEN)


def split_reasoning(text: str, opened: bool) -> tuple[str | None, str]:
    """Splits a text into its reasoning (None if it has none) and the answer.

    Args:
        text: text that the model generated.
        opened: whether the prompt ended with `OPEN`.
    """
    stream = ReasoningStream(opened)
    pieces = [*stream.push(text), *stream.flush()]
    if not stream.reasoned:
        return None, text
    said = "".join(piece for thinking, piece in pieces if not thinking)
    return "".join(piece for thinking, piece in pieces if thinking).strip("\n"), said.lstrip("\n")


class ReasoningStream:
    """Marks the pieces of a streamed text as reasoning or answer. Only the tags `OPEN` and `CLOSE` are left out.

    Args:
        opened: whether the prompt ended with `OPEN`.
    """

    def __init__(self, opened: bool) -> None:
        self.reasoned = opened
        """Whether there was any tag so far, in the prompt or in the text."""
        self._thinking, self._begun = opened, opened
        self._held = ""  # text that may be the start of a tag

    def push(self, piece: str) -> list[tuple[bool, str]]:
        """Adds a piece of text and returns the pieces that are certain now, each as (is reasoning, text)."""
        self._held += piece
        found: list[tuple[bool, str]] = []
        while mark := self._awaited():
            before, there, after = self._held.partition(mark)
            if not there or (mark == OPEN and before.strip()):
                break
            if mark == CLOSE:
                found.append((True, before))
            self._thinking, self._begun, self.reasoned = mark == OPEN, True, True
            self._held = after
        keep = self._may_be_mark()
        found.append((self._thinking, self._held[: len(self._held) - keep]))
        self._held = self._held[len(self._held) - keep :]
        if found[-1][1].strip():
            self._begun = True
        return [(thinking, text) for thinking, text in found if text]

    def flush(self) -> list[tuple[bool, str]]:
        """Returns the text that was held back, as a list of at most one (is reasoning, text)."""
        rest, self._held = self._held, ""
        return [(self._thinking, rest)] if rest else []

    def _awaited(self) -> str | None:
        """The tag that may come next, or None: reasoning stands only at the start of an answer, and only once."""
        return CLOSE if self._thinking else None if self._begun else OPEN

    def _may_be_mark(self) -> int:
        """Number of characters at the end of the held text that may belong to a tag and must wait for more text."""
        mark = self._awaited()
        if mark is None:
            return 0
        if mark == OPEN and not self._held.strip():
            return len(self._held)  # white space before a tag belongs to it
        held = self._held
        length = next((n for n in range(min(len(mark) - 1, len(held)), 0, -1) if held.endswith(mark[:n])), 0)
        return len(held) if mark == OPEN and length and not held[:-length].strip() else length
