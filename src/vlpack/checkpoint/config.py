"""Reads values of config.json with their types and bounds checked; an error names the value that is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from vlpack.errors import CheckpointError

_LIMIT = 1 << 31


def is_finite(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a finite number that fits a float; an integer in JSON may be too long for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


class Section:
    """One object of a config.json, read value by value.

    Args:
        values: the parsed JSON object.
        where: place of the object, for messages, such as ``config.json: text_config``.

    Raises:
        CheckpointError: a value is missing, of another type or out of bounds.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.where}: '{name}' is missing.")
            return default
        return value

    def _fail(self, name: str, value: Any, wanted: str) -> CheckpointError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return CheckpointError(f"{self.where}: '{name}' is {shown}; it must be {wanted}.")

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = _LIMIT) -> int:
        """An integer from ``low`` to ``high``; ``default`` if the name is absent."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._fail(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above zero; ``default`` if the name is absent."""
        value = self._get(name, default)
        if not is_finite(value) or value <= 0:
            raise self._fail(name, value, "a number above zero")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean; ``default`` if the name is absent."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._fail(name, value, "true or false")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        """A string that must be one of ``choices``; ``default`` if the name is absent."""
        value = self._get(name, default)
        if value not in choices:
            raise self._fail(name, value, "one of " + ", ".join(choices))
        return str(value)

    def words(self, name: str, choices: Sequence[str], count: int) -> list[str]:
        """A list of ``count`` strings that must all be among ``choices``."""
        value = self._get(name, None)
        if not isinstance(value, (list, tuple)) or len(value) != count or not all(one in choices for one in value):
            raise self._fail(name, value, f"a list of {count} words, each one of " + ", ".join(choices))
        return list(value)

    def integers(
        self, name: str, default: Sequence[int] | None = None, *, low: int = 0, high: int = _LIMIT
    ) -> list[int]:
        """A list of integers from ``low`` to ``high``; a single integer is read as a list of one."""
        value = self._get(name, default)
        items = [value] if isinstance(value, int) else value
        if not isinstance(items, (list, tuple)) or len(items) > 4096:
            raise self._fail(name, value, "a list of integers")
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= high:
                raise self._fail(name, value, f"a list of integers from {low} to {high}")
        return list(items)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Section:
        """A copy of this section with ``defaults`` for absent names; a name whose value is null stays null."""
        return Section({**defaults, **self.values}, self.where)

    def without(self, name: str) -> Section:
        """A copy of this section without ``name``."""
        return Section({key: value for key, value in self.values.items() if key != name}, self.where)

    def section(self, name: str, *, required: bool = True) -> Section:
        """The object ``name`` inside this one; an empty section if it is absent and not ``required``."""
        value = self.values.get(name)
        if value is None and not required:
            value = {}
        if not isinstance(value, dict):
            raise self._fail(name, value, "an object")
        return Section(value, f"{self.where}: {name}")
