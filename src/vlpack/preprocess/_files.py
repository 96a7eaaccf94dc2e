"""Reads the small text and JSON files of a checkpoint folder; every failure names the file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlpack.errors import CheckpointError

MAX_TEXT_BYTES = 16 * 2**20
"""Largest configuration or template file that is read; real ones stay below a tenth of it."""


def read_text(path: Path) -> str:
    """The UTF-8 text of a file; a missing, unreadable, huge or wrongly encoded one is a CheckpointError."""
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {MAX_TEXT_BYTES} are read.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object (not list or scalar) in a file; anything else is a CheckpointError."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


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
