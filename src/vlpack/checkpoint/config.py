"""Values out of config.json: typed, bounded, and named in the error when they are not what they must be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from vlpack.errors import CheckpointError

_LIMIT = 1 << 31


def is_finite(value: object) -> TypeGuard[int | float]:
    """Whether a value of a JSON file is a number that fits a float: JSON's integers have any length."""
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
        where: its place for messages, such as ``config.json: text_config``.

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
        """An integer in ``low … high``; ``default`` where the file has none."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._fail(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._get(name, default)
        if not is_finite(value) or value <= 0:
            raise self._fail(name, value, "a number above zero")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._fail(name, value, "true or false")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of ``choices``."""
        value = self._get(name, default)
        if value not in choices:
            raise self._fail(name, value, "one of " + ", ".join(choices))
        return str(value)

    def integers(
        self, name: str, default: Sequence[int] | None = None, *, low: int = 0, high: int = _LIMIT
    ) -> list[int]:
        """A list of integers, or one integer as a list of one."""
        value = self._get(name, default)
        items = [value] if isinstance(value, int) else value
        if not isinstance(items, (list, tuple)) or len(items) > 4096:
            raise self._fail(name, value, "a list of integers")
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= high:
                raise self._fail(name, value, f"a list of integers from {low} to {high}")
        return list(items)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Section:
        """This section with values for names that it lacks; a null stays one."""
        return Section({**defaults, **self.values}, self.where)

    def section(self, name: str, *, required: bool = True) -> Section:
        """An object inside this one; an empty one where it is absent and not ``required``."""
        value = self.values.get(name)
        if value is None and not required:
            value = {}
        if not isinstance(value, dict):
            raise self._fail(name, value, "an object")
        return Section(value, f"{self.where}: {name}")
