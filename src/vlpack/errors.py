"""Errors, warnings and notes for users, which say what is wrong, where, and what to do.

A message names an option with `option`, and each interface writes it in its own form: a keyword argument in Python
(``max_pixels=…``), an option on the command line (``--max-pixels …``), a field of a request to the server
(``"max_pixels": …``). `in_python`, `on_command_line` and `in_request` do so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters, which do not occur in a user's text
_REPEATED = {"images": "image", "videos": "video", "choices": "choice"}
"""Arguments that take several values in Python → the option that is repeated for them on the command line."""
_OPTION = re.compile(f"{_OPEN}([a-z_.]+)(?:=(.*?))?{_CLOSE}", re.DOTALL)


def option(name: str, value: object = None) -> str:
    """A placeholder for an option in a message, which each interface writes in its own form.

    Args:
        name: name of the keyword argument, such as ``max_pixels``; the fields of `vlpack.ExtraOptions` have the prefix
            ``extra.``.
        value: the value to show; None for the option's name alone.
    """
    said = "" if value is None else f"={value}"
    return f"{_OPEN}{name}{said}{_CLOSE}"


def in_python(text: str) -> str:
    """A message with its options written as keyword arguments: ``task='embedding'``, ``kv_cache='int8'``."""

    def written(name: str, value: str | None) -> str:
        name = name.removeprefix("extra.")
        if value is None:
            return name
        plain = value in ("True", "False", "None") or value.replace(".", "", 1).isdigit() or "…" in value
        return f"{name}={value if plain else repr(value)}"

    return _write(text, written)


def on_command_line(text: str) -> str:
    """A message with its options as on the command line: ``--task embedding``, ``--extra-options kv_cache=int8``."""

    def written(name: str, value: str | None) -> str:
        if name.startswith("extra."):
            name = name.removeprefix("extra.")
            return name if value is None else f"--extra-options {name}={value.lower()}"
        if name == "special_tokens":  # a choice of two in Python, a flag on the command line
            return "--literal"
        flag = f"--{_REPEATED.get(name, name).replace('_', '-')}"
        return flag if value in (None, "True") else f"{flag} {value}"

    return _write(getattr(text, "raw", text), written)


_OF_SERVER = ("allow_private_urls", "context", "queue", "slots", "special_tokens")
"""Options that whoever runs the server chooses, and no request."""


def in_request(text: str) -> str:
    """A message with its options as fields of a request to ``vlpack serve``, or as options of that command."""

    def written(name: str, value: str | None) -> str:
        if name in _OF_SERVER:
            return f"--{name.replace('_', '-')} of the server"
        if value is None:
            return f"'{name}'"
        plain = value in ("True", "False", "None") or value.replace(".", "", 1).isdigit() or "…" in value
        return f'"{name}": {value.lower() if plain else json.dumps(value)}'

    return _write(text, written)


def first_option(text: str) -> str | None:
    """The name of the first option that a message has a placeholder for; None if it has none."""
    found = _OPTION.search(text)
    return None if found is None else found[1]


class Note(str):
    """A sentence for the user that accompanies a result; as a string, it writes options as keyword arguments.

    Attributes:
        raw: the sentence with its `option` placeholders.
    """

    raw: str

    def __new__(cls, text: str) -> Note:
        """Makes a note from a sentence that may contain `option` placeholders."""
        note = super().__new__(cls, in_python(text))
        note.raw = text
        return note


def _write(text: str, written: Callable[[str, str | None], str]) -> str:
    return _OPTION.sub(lambda found: written(found[1], found[2]), text)


class VlpackError(Exception):
    """An error that the user can correct. The command line prints it without a traceback and exits with 2.

    As a string, it writes options as keyword arguments; the command line applies `on_command_line` to both texts.

    Args:
        message: sentence that says what is wrong and where (file, tensor, option).
        hint: sentence that says what to do about it, printed on a separate line; None if there is nothing to say.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return in_python(self.message if self.hint is None else f"{self.message}\n{self.hint}")


class CheckpointError(VlpackError):
    """A checkpoint is missing, damaged, unsafe or of an unsupported kind."""


class OptionError(VlpackError):
    """An option is unknown, contradictory, without effect, or not available in this combination."""


class PackageError(VlpackError):
    """A package is incomplete, damaged or cannot be loaded by this runtime."""


class InputError(VlpackError):
    """An image, prompt or message cannot be used."""


class VerifyError(VlpackError):
    """A verification cannot be done."""


class VlpackWarning(UserWarning):
    """A warning that something works, but not as well as it could. The text says what to do."""

    def __str__(self) -> str:
        return in_python(super().__str__())
