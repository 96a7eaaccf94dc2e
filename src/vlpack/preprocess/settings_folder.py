"""Reads the small text and JSON files of a checkpoint or package; every failure names the file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlpack.checkpoint.files import locate, parse_json, read_small
from vlpack.errors import CheckpointError

MAX_TEXT_BYTES = 16 * 2**20
"""Largest configuration or template file that is read; real ones stay below a tenth of it."""


class SettingsFolder:
    """The small files of a checkpoint or package, which anybody may have written: no link leads out of the folder.

    Args:
        path: of the folder.
        names: of the files that there are for its readers, such as those that a package's manifest lists; None for
            all. A file that somebody added to a package later would otherwise be used without being noticed.
    """

    def __init__(self, path: str | os.PathLike[str], names: Container[str] | None = None) -> None:
        self.path, self._names = Path(path), names

    @classmethod
    def of(cls, folder: str | os.PathLike[str] | SettingsFolder) -> SettingsFolder:
        """``folder`` itself, or the one at that path with all its files."""
        return folder if isinstance(folder, SettingsFolder) else cls(folder)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether there is such a file; a CheckpointError where it is a link that leads out of the folder."""
        return self._target(name) is not None

    def data(self, name: str, limit: int = MAX_TEXT_BYTES) -> bytes:
        """A file's bytes; a missing, unreadable or huge one is a CheckpointError."""
        target = self._target(name)
        if target is None:
            raise CheckpointError(f"{self.path / name} is missing.")
        return read_small(self.path / name, target, limit)

    def text(self, name: str) -> str:
        """A file's UTF-8 text; a missing, unreadable, huge or wrongly encoded one is a CheckpointError."""
        try:
            return self.data(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path / name} is not UTF-8 text: {error}.") from error

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object (not list or scalar) in a file; anything else is a CheckpointError."""
        return parse_json(self.data(name), str(self.path / name))

    def _target(self, name: str) -> Path | None:
        return locate(self.path, name) if self._names is None or name in self._names else None


def given_settings(settings: Any, config: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """A processor's fields that its configuration gives; those ``without`` are read otherwise.

    A null means "the default" in transformers, so it does not hide one here. One mean or deviation is all channels'.
    """
    names = {field.name for field in dataclasses.fields(settings)} - set(without)
    values = {name: config[name] for name in names if config.get(name) is not None}
    for name in values.keys() & {"image_mean", "image_std"}:
        value = values[name]
        values[name] = tuple(value) if isinstance(value, list) else (value,) * 3
    return values
