"""What thinking models write before their answer: told apart from it, whole or as it comes."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered chat template ends with the reasoning's beginning, so that an answer goes on with it."""
    return prompt.rstrip().endswith(OPEN)


def split_reasoning(text: str, opened: bool) -> tuple[str | None, str]:
    """An answer's reasoning, None where it has none, and what it says.

    Args:
        text: of the answer.
        opened: the prompt ended with `OPEN`.
    """
    stream = ReasoningStream(opened)
    pieces = [*stream.push(text), *stream.flush()]
    if not stream.reasoned:
        return None, text
    said = "".join(piece for thinking, piece in pieces if not thinking)
    return "".join(piece for thinking, piece in pieces if thinking).strip("\n"), said.lstrip("\n")


class ReasoningStream:
    """Pieces of an answer, each with whether it is reasoning. The marks themselves, and nothing else, are left out.

    Args:
        opened: the prompt ended with `OPEN`.
    """

    def __init__(self, opened: bool) -> None:
        self.reasoned = opened
        """Whether there was any mark, before the answer or in it."""
        self._thinking, self._begun = opened, opened
        self._held = ""  # what may be the beginning of a mark

    def push(self, piece: str) -> list[tuple[bool, str]]:
        """What is certain after one more piece."""
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
        """The rest."""
        rest, self._held = self._held, ""
        return [(self._thinking, rest)] if rest else []

    def _awaited(self) -> str | None:
        """The mark that may come now: reasoning stands at an answer's beginning, once."""
        return CLOSE if self._thinking else None if self._begun else OPEN

    def _may_be_mark(self) -> int:
        """How many characters at the end must wait for more."""
        mark = self._awaited()
        if mark is None:
            return 0
        if mark == OPEN and not self._held.strip():
            return len(self._held)  # blanks before a mark belong to it
        held = self._held
        length = next((n for n in range(min(len(mark) - 1, len(held)), 0, -1) if held.endswith(mark[:n])), 0)
        return len(held) if mark == OPEN and length and not held[:-length].strip() else length
