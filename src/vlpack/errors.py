"""The errors that vlpack shows to people: what is wrong, where, and what to do, in the words of whoever called.

A sentence names an option with `option`, which every interface writes in its own way: ``max_pixels=…`` is a keyword
argument in Python and ``--max-pixels …`` on the command line. `in_python` and `on_command_line` write it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters, which no text of a user's can be mistaken for
_OPTION = re.compile(f"{_OPEN}([a-z_.]+)(?:=(.*?))?{_CLOSE}", re.DOTALL)


def option(name: str, value: object = None) -> str:
    """An option in a sentence, to be written as the caller's interface has it.

    Args:
        name: of the keyword argument, such as ``max_pixels``; options of `vlpack.ExtraOptions` have ``extra.`` before.
        value: that is proposed; None for the option's name alone.
    """
    said = "" if value is None else f"={value}"
    return f"{_OPEN}{name}{said}{_CLOSE}"


def in_python(text: str) -> str:
    """A sentence with its options as keyword arguments: ``task='embedding'``, ``ExtraOptions(kv_cache='int8')``."""

    def written(name: str, value: str | None) -> str:
        name = name.removeprefix("extra.")
        if value is None:
            return name
        plain = value in ("True", "False", "None") or value.replace(".", "", 1).isdigit() or "…" in value
        return f"{name}={value if plain else repr(value)}"

    return _write(text, written)


def on_command_line(text: str) -> str:
    """A sentence with its options as those of the command ``vlpack``: ``--task embedding``, ``--force``."""

    def written(name: str, value: str | None) -> str:
        if name.startswith("extra."):
            name = name.removeprefix("extra.")
            return name if value is None else f"--extra-options {name}={value.lower()}"
        flag = f"--{name.replace('_', '-')}"
        return flag if value in (None, "True") else f"{flag} {value}"

    return _write(getattr(text, "raw", text), written)


class Note(str):
    """A sentence for the user beside a result. As a string it names options as keyword arguments."""

    raw: str

    def __new__(cls, text: str) -> Note:
        """A note of a sentence that `option` was used in."""
        note = super().__new__(cls, in_python(text))
        note.raw = text
        return note


def _write(text: str, written: Callable[[str, str | None], str]) -> str:
    return _OPTION.sub(lambda found: written(found[1], found[2]), text)


class VlpackError(Exception):
    """A mistake that the user can mend; the command line prints it as one sentence and exits with 2.

    As a string it names options as keyword arguments; `on_command_line` of `message` and `hint` as that has them.

    Args:
        message: what is wrong and where (file, tensor, option), as a sentence.
        hint: what to do about it, as a sentence; printed on a line of its own.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return in_python(self.message if self.hint is None else f"{self.message}\n{self.hint}")


class CheckpointError(VlpackError):
    """The checkpoint is missing, damaged, unsafe or of an unsupported kind."""


class OptionError(VlpackError):
    """An option is unknown, contradictory or not offered for this combination."""


class PackageError(VlpackError):
    """A built package is incomplete, damaged or not loadable by this runtime."""


class InputError(VlpackError):
    """An image, prompt or message cannot be used."""


class VerifyError(VlpackError):
    """A verification that cannot be done."""


class VlpackWarning(UserWarning):
    """Something that works, and not as well as it could; the text says what to do."""

    def __str__(self) -> str:
        return in_python(super().__str__())
