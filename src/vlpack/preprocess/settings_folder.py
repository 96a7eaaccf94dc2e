"""Reads the small text and JSON files of a checkpoint or package; every error names the file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlpack.checkpoint.files import locate, parse_json, read_small
from vlpack.errors import CheckpointError

MAX_TEXT_BYTES = 16 * 2**20
"""Maximum size of a configuration or template file, in bytes; real files stay below a tenth of it."""


class SettingsFolder:
    """The folder of an untrusted checkpoint or package. Its small files are read here; links out of it are refused.

    Args:
        path: path of the folder.
        names: names of the files that may be read, such as the files in a package's manifest; None for all. The names
            keep a file that was later added to a package from being used unnoticed.
    """

    def __init__(self, path: str | os.PathLike[str], names: Container[str] | None = None) -> None:
        self.path, self._names = Path(path), names

    @classmethod
    def of(cls, folder: str | os.PathLike[str] | SettingsFolder) -> SettingsFolder:
        """``folder`` itself if it is a `SettingsFolder`, else one for that path, in which all files may be read."""
        return folder if isinstance(folder, SettingsFolder) else cls(folder)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the folder has a file of this name; CheckpointError if it is a link that leads out of the folder."""
        return self._target(name) is not None

    def data(self, name: str, limit: int = MAX_TEXT_BYTES) -> bytes:
        """The bytes of a file; CheckpointError if it is missing, unreadable or larger than ``limit`` bytes."""
        target = self._target(name)
        if target is None:
            raise CheckpointError(f"{self.path / name} is missing.")
        return read_small(self.path / name, target, limit)

    def text(self, name: str) -> str:
        """The text of a UTF-8 file; CheckpointError if it is missing, unreadable, too large or not UTF-8."""
        try:
            return self.data(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path / name} is not UTF-8 text: {error}.") from error

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; CheckpointError for anything else, such as a list or a missing file."""
        return parse_json(self.data(name), str(self.path / name))

    def _target(self, name: str) -> Path | None:
        return locate(self.path, name) if self._names is None or name in self._names else None


def given_settings(settings: Any, config: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """The fields of a processor that its configuration file sets.

    As in transformers, null stands for the default, and a single mean or deviation is used for all three channels.

    Args:
        settings: dataclass of the processor.
        config: JSON object of the configuration file.
        without: fields to leave out, because they are read in another way.
    """
    names = {field.name for field in dataclasses.fields(settings)} - set(without)
    values = {name: config[name] for name in names if config.get(name) is not None}
    for name in values.keys() & {"image_mean", "image_std"}:
        value = values[name]
        values[name] = tuple(value) if isinstance(value, list) else (value,) * 3
    return values
