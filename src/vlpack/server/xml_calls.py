"""A parser of tool calls in the XML-like form of Qwen3.5 and Qwen3-Coder.

A call is a name and parameters, whose values are written as text without quotes:

    <tool_call>
    <function=weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

Clients get arguments as JSON, so the function's schema decides the type of a value: the text "5" becomes a number if
the parameter is a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlpack.server.calls import CLOSE_CALL, OPEN_CALL, CallStream, Piece

MARK = "<function="
"""Text before a function's name in a call; a chat template that contains it uses this form."""

_HEAD = re.compile(r"\s*<function=([^>\n]*)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]*)>")
_END = re.compile(r"\s*</function>")
MAX_VISITS = 1000
"""Largest number of schemas that are visited for a parameter's alternatives; references to references can have more
alternatives than any memory holds."""
BOOLEANS = {"true": True, "false": False, "True": True, "False": False}
"""Texts that stand for booleans; chat templates write those of Python."""


class XmlCallStream(CallStream):
    """A parser that separates XML-like tool calls from the text around them, in text that arrives in pieces.

    The arguments of a call are passed on as JSON, each parameter when its text is complete.

    Args:
        functions: the functions of the request, whose schemas give the types of parameters.
    """

    def __init__(self, functions: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self._parameters = {function["name"]: function.get("parameters") or {} for function in functions}
        self._name: str | None = None  # the function of the current call
        self._given: set[str] = set()
        self._over = False  # whether the function's end has been read

    def _state(self) -> object:
        return self._held, self._inside, self._name, len(self._given), self._over

    def flush(self) -> Iterator[Piece]:
        """Yields the remaining pieces at the end of the answer; JSON of a call that was cut off stays incomplete."""
        begun, self._name = self._name is not None, None
        if self._inside and not begun:
            yield Piece("text", OPEN_CALL + self._held)
            self._held, self._inside = "", False
        elif begun:
            self._held, self._inside = "", False
        yield from super().flush()

    def _call(self) -> Iterator[Piece]:
        if self._over:
            yield from self._closed()
        elif self._name is None:
            yield from self._begun_call()
        elif end := _END.match(self._held):
            yield from self._ended(end.end())
        elif (head := _PARAMETER.match(self._held)) is not None:
            yield from self._parameter(head)
        elif (place := self._held.find(CLOSE_CALL)) >= 0:  # the end of the function is missing
            yield from self._ended(place)

    def _begun_call(self) -> Iterator[Piece]:
        """Yields a new call when the name of its function is complete."""
        if (head := _HEAD.match(self._held)) is not None and head[1]:
            self.calls += 1
            self._begun, self._name, self._given = False, head[1], set()
            self._held = self._held[head.end() :]
            yield Piece("call", head[1])
            return
        body, tag, after = self._held.partition(CLOSE_CALL)
        if tag:  # not a call
            self._held, self._inside = after, False
            yield Piece("text", OPEN_CALL + body + CLOSE_CALL)

    def _parameter(self, head: re.Match[str]) -> Iterator[Piece]:
        """Yields a parameter as JSON when its text is complete; ``head`` is the match of its opening tag."""
        rest = self._held[head.end() :]
        value, tag, after = rest.partition("</parameter>")
        if not tag:
            value, end, _ = rest.partition("</function>")
            if not end or CLOSE_CALL not in rest:
                return  # more text is needed
            after = rest[len(value) :]
        self._held = after
        text = value.removeprefix("\n").removesuffix("\n")
        parameters = self._parameters.get(self._name or "", {})
        schema = (parameters.get("properties") or {}).get(head[1], parameters.get("additionalProperties"))
        if head[1] in self._given:  # JSON with the same key twice would be ambiguous
            return
        before = ", " if self._given else "{"
        self._given.add(head[1])
        value_json = json.dumps(value_of(text, schema, parameters), ensure_ascii=False)
        yield Piece("arguments", f"{before}{json.dumps(head[1], ensure_ascii=False)}: {value_json}")

    def _ended(self, place: int) -> Iterator[Piece]:
        """Yields the end of the arguments; ``place`` is the index of the text after the function."""
        self._held, self._over = self._held[place:], True
        yield Piece("arguments", "}" if self._given else "{}")

    def _closed(self) -> Iterator[Piece]:
        """Drops the text up to the closing tag of a call."""
        _, tag, after = self._held.partition(CLOSE_CALL)
        if tag:
            self._held, self._inside, self._name, self._over = after, False, None, False
        yield from ()


def value_of(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """The JSON value that a parameter's text stands for; the text itself if the schema demands no other type.

    Args:
        text: text between the tags.
        schema: JSON schema of the parameter; None if it has none.
        root: schema of all parameters, in which references are looked up.
    """
    branches = branches_of(schema, root)
    if not branches or any(is_text(branch) and not choices_of(branch) for branch in branches):
        return _null_or(text, branches)
    for branch in branches:
        chosen = choices_of(branch)
        if chosen is not None:
            for value in chosen:
                if text == (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)):
                    return value
    return _as_json(text, {kind for branch in branches for kind in kinds_of(branch)})


def _as_json(text: str, kinds: set[Any]) -> Any:
    """The JSON value in a text if its type is one of ``kinds``; otherwise the text."""
    if "boolean" in kinds and text.strip() in BOOLEANS:
        return BOOLEANS[text.strip()]
    try:
        value = json.loads("null" if text.strip() == "None" else text)
        json.dumps(value, allow_nan=False)  # JSON has no infinity
    except (ValueError, RecursionError):
        return text
    if "number" not in kinds and isinstance(value, float) and value.is_integer():
        value = int(value)
    fits = {
        "null": value is None,
        "boolean": isinstance(value, bool),
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, (int, float)) and not isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    return value if any(fits.get(kind, False) for kind in kinds) else text


def _null_or(text: str, branches: Sequence[Mapping[str, Any]]) -> str | None:
    """A text; None if it is ``null`` or ``None`` and the schema also allows null."""
    nullable = any("null" in kinds_of(branch) for branch in branches)
    return None if nullable and text.strip() in ("null", "None") else text


def branches_of(schema: Any, root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The alternatives of a schema, without references; an empty list if it allows everything, or has too many."""
    left = MAX_VISITS

    def branches(schema: Any, depth: int) -> list[Mapping[str, Any]]:
        nonlocal left
        left -= 1
        if not isinstance(schema, Mapping) or depth > 16 or left < 0:
            return []
        if isinstance(reference := schema.get("$ref"), str):
            found: Any = root
            for name in reference.removeprefix("#/").split("/"):
                found = found.get(name) if isinstance(found, Mapping) else None
            return branches(found, depth + 1)
        for key in ("anyOf", "oneOf"):
            if isinstance(several := schema.get(key), list):
                made: list[Mapping[str, Any]] = []
                for one in several:
                    part = branches(one, depth + 1)
                    if not part:  # this one allows everything
                        return []
                    made += part
                return made
        if isinstance(schema.get("type"), list):
            return [{**schema, "type": kind} for kind in schema["type"]]
        return [schema] if "type" in schema or choices_of(schema) is not None else []

    return branches(schema, 0)


def choices_of(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that a schema lists; None if it lists none."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def kinds_of(schema: Mapping[str, Any]) -> list[Any]:
    """The type of a schema without alternatives, as a list of at most one."""
    return [schema["type"]] if isinstance(schema.get("type"), str) else []


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a schema demands a string."""
    return schema.get("type") == "string"
