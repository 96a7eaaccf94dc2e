"""The question of a batch: what is asked about every row, and the options of the answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from vlpack.errors import InputError, OptionError, option
from vlpack.preprocess import VideoOptions
from vlpack.preprocess.literal import CONTROL, check_special_tokens
from vlpack.runtime.sampling import Sampling, check_number

MAX_TOKENS = 512
"""Largest number of tokens of an answer if the user gives none."""

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Question:
    """The question about every row, and the options of the answers. None stands for a default.

    Args:
        prompt: question about the rows that have none of their own.
        template: question with names of columns in braces, such as ``Describe {title}.``; ``{{`` and ``}}`` are braces.
        system: system prompt.
        schema: JSON schema that every answer matches.
        regex: regular expression that every answer matches as a whole.
        choices: texts of which every answer is one.
        max_tokens: largest number of tokens of an answer.
        sampling: sampling parameters.
        special_tokens: meaning of special tokens that are written in texts, ``control`` or ``text``.
        image_column: column with the image of a row, in place of ``image`` or ``images``.
        id_column: column with the id of a row, in place of ``id``.
        min_pixels: smallest area of an image in pixels.
        max_pixels: largest area of an image in pixels.
        video_options: sampling of the frames of videos.

    Raises:
        OptionError: options contradict each other, or a value cannot be used.
    """

    prompt: str | None = None
    template: str | None = None
    system: str | None = None
    schema: Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    special_tokens: str = CONTROL
    image_column: str | None = None
    id_column: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    video_options: VideoOptions = field(default_factory=VideoOptions)

    def __post_init__(self) -> None:
        for name in ("prompt", "template"):
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise OptionError(f"{option(name)} is empty.", "Say what the model shall do with every row.")
        if self.prompt is not None and self.template is not None:
            raise OptionError(f"{option('prompt')} and {option('template')} are both given.", "Give one of them.")
        if self.template is not None and not pieces(self.template)[1]:
            raise OptionError(
                f"{option('template')} names no column, such as {{title}}.",
                f"Give a question that is the same for all rows with {option('prompt')}.",
            )
        check_number("max_tokens", self.max_tokens, 1, 2**31 - 1, whole=True)
        check_special_tokens(self.special_tokens)
        self.sampling.search_options()

    @property
    def constraint(self) -> dict[str, Any]:
        """The constraint on every answer, as options of `vlpack.Engine.submit`; empty if answers are free."""
        given = {"schema": self.schema, "regex": self.regex, "choices": self.choices}
        return {name: value for name, value in given.items() if value is not None}

    def check_constraint(self) -> None:
        """Raises an OptionError if the constraint cannot be used; imports the engine and llguidance."""
        from vlpack.engine.constraints import grammar_of

        grammar_of(**self.constraint)

    def record(self) -> dict[str, Any]:
        """All options that are given, by their names, as JSON-like data for the manifest of the output."""
        made: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Sampling | VideoOptions):
                made |= {each.name: getattr(value, each.name) for each in fields(value)}
            else:
                made[one.name] = list(value) if one.name == "choices" and value is not None else value
        # 0 and 0.0 are the same option, and must give the same ids
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in made.items()
            if value is not None
        }

    def filled(self, columns: Mapping[str, Any]) -> str:
        """The template with the values of a row's columns.

        Raises:
            InputError: the row lacks a column of the template, or its value is null.
        """
        assert self.template is not None, "the caller asks for the template"
        made = []
        for text, name in pieces(self.template)[0]:
            made.append(text)
            if name is None:
                continue
            value = columns.get(name)
            if value is None or isinstance(value, bytes):
                why = "has no column" if name not in columns else "has no text in the column"
                known = ", ".join(column for column in columns if not isinstance(columns[column], bytes))
                raise InputError(f"The row {why} {name!r}, which {option('template')} names.", f"It has {known[:300]}.")
            made.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        return "".join(made)


def pieces(template: str) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Splits a template into its texts and the names of columns.

    Returns:
        The texts, each with the name of the column after it (None after the last text), and the names of all columns.

    Raises:
        OptionError: a brace has no partner, or there is no name between two braces.
    """
    parts: list[tuple[str, str | None]] = []
    text, end = "", 0
    for found in _FIELD.finditer(template):
        text += template[end : found.start()]
        end = found.end()
        if found[0] in ("{{", "}}"):
            text += found[0][0]
        elif found[1]:
            parts.append((text, found[1].strip()))
            text = ""
        else:
            raise OptionError(
                f"{option('template')} has {found[0]!r} at character {found.start() + 1}, which is no column.",
                "Write a column as {name}, and a brace itself twice: {{ or }}.",
            )
    parts.append((text + template[end:], None))
    return parts, [name for _, name in parts if name is not None]
