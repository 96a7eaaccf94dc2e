"""A parser of the tool calls in generated text that writes each call as JSON.

Qwen2.5 and Qwen3 write ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"
"""Tags around a tool call."""

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class Piece(NamedTuple):
    """A piece of an answer.

    Attributes:
        kind: ``text``, ``reasoning``, ``call`` (a new call) or ``arguments`` (more of the last call's arguments).
        text: text to add; for ``call``, the name of the function.
    """

    kind: str
    text: str


class CallStream:
    """A parser that separates tool calls from the text around them, in generated text that arrives in pieces.

    If the text between the tags is not a valid call, it is passed on as text, including its tags.

    Attributes:
        calls: number of calls so far.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._held = ""
        self._inside = False
        self._arguments: _Value | None = None
        self._begun = False  # whether there was text other than white space

    @property
    def between(self) -> bool:
        """Whether the end of the text so far is outside of a call."""
        return not self._inside

    def push(self, piece: str) -> Iterator[Piece]:
        """Adds generated text and yields the pieces that no later text can change."""
        self._held += piece
        while True:
            before = self._state()
            yield from (self._call() if self._inside else self._text())
            if before == self._state():
                return

    def _state(self) -> object:
        """A value that changes whenever some text is processed, so that equal values mean that more text is needed."""
        return self._held, self._inside, self._arguments

    def flush(self) -> Iterator[Piece]:
        """Yields the remaining pieces at the end of the answer."""
        held, self._held = self._held, ""
        if not self._inside:
            yield from self._said(held)
        elif self._arguments is None:
            yield from self._whole(held, ended=False)
        self._inside, self._arguments = False, None

    def _text(self) -> Iterator[Piece]:
        """Processes text outside of calls."""
        before, tag, after = self._held.partition(OPEN_CALL)
        if tag:
            yield from self._said(before if not self.calls or before.strip() else "", last=True)
            self._held, self._inside = after, True
            return
        # white space at the end may precede a call and be dropped, and the end may be the beginning of a tag: both wait
        kept = next(
            (n for n in range(min(len(OPEN_CALL) - 1, len(before)), 0, -1) if before.endswith(OPEN_CALL[:n])), 0
        )
        end = len(before[: len(before) - kept].rstrip())
        yield from self._said(before[:end])
        self._held = before[end:]

    def _said(self, text: str, *, last: bool = False) -> Iterator[Piece]:
        """Yields text outside of calls, without white space between calls; ``last`` is text directly before a call."""
        text = text.rstrip() if last else text
        if self.calls and not self._begun_after_call(text):
            return
        if text:
            yield Piece("text", text)

    def _begun_after_call(self, text: str) -> bool:
        """Whether there is text other than white space after the last call."""
        self._begun = self._begun or bool(text.strip())
        return self._begun

    def _call(self) -> Iterator[Piece]:
        """Processes text inside of a call."""
        if self._arguments is None:
            head = _HEAD.match(self._held)
            name = None if head is None else _name(head[1])
            if head is not None and name is not None:
                self.calls += 1
                self._begun = False
                self._arguments, self._held = _Value(), self._held[head.end() :]
                yield Piece("call", name)
                return
            body, tag, after = self._held.partition(CLOSE_CALL)
            if tag:
                yield from self._whole(body)
                self._held, self._inside = after, False
            return
        taken = self._arguments.take(self._held)
        if taken:
            yield Piece("arguments", self._held[:taken])
            self._held = self._held[taken:]
        if self._arguments.over:
            _, tag, after = self._held.partition(CLOSE_CALL)
            if tag:
                self._held, self._inside, self._arguments = after, False, None

    def _whole(self, body: str, *, ended: bool = True) -> Iterator[Piece]:
        """Yields a complete call whose keys are in an unusual order, or its text if it is not a valid call."""
        try:
            call = json.loads(body)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
            if not isinstance(name, str) or not isinstance(arguments, dict) or not ended or not _name(json.dumps(name)):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield Piece("text", OPEN_CALL + body + (CLOSE_CALL if ended else ""))
            return
        self.calls += 1
        self._begun = False
        yield Piece("call", name)
        yield Piece("arguments", json.dumps(arguments))


def _name(text: str) -> str | None:
    """The name of a function from a JSON string; None if it is invalid."""
    try:
        name = str(json.loads(text))
        name.encode()
    except ValueError:  # invalid escape, or half a surrogate pair
        return None
    return name


class _Value:
    """A scanner that finds the end of a JSON object in text that arrives in pieces.

    Attributes:
        over: whether the end was found.
    """

    def __init__(self) -> None:
        self.over = False
        self._depth = 0
        self._quoted = self._escaped = False

    def take(self, text: str) -> int:
        """Scans the next piece and returns the number of its characters that belong to the object."""
        for place, character in enumerate(text):
            if self.over:
                return place
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                self.over = self._depth == 0
        return len(text)
