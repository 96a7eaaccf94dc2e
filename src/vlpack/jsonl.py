"""Reads a user's JSONL file, with one JSON value in each line; an error names the line that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vlpack.errors import InputError

T = TypeVar("T")


def read_jsonl(path: Path, parse: Callable[[Any], T], example: str) -> list[tuple[int, T]]:
    """Reads all lines that are not empty.

    Args:
        path: path of the file, in UTF-8.
        parse: function of a line's value. Its KeyError, TypeError, ValueError or AttributeError refuses the line.
        example: a valid line, for the error's hint.

    Returns:
        For each line, its number and the result of ``parse``.

    Raises:
        InputError: the file cannot be read, is empty, or has a line that cannot be used.
    """
    try:
        # lines end at "\n" only: JSON strings may contain U+2028 and other characters at which str.splitlines splits
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    parsed = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            parsed.append((number, parse(json.loads(line))))
        except (json.JSONDecodeError, RecursionError):
            raise InputError(f"{path}, line {number} is not JSON.", f"A line is {example}.") from None
        except KeyError as error:
            raise InputError(f"{path}, line {number} has no {error}.", f"A line is {example}.") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}, line {number} cannot be used: {error}.", f"A line is {example}.") from None
    if not parsed:
        raise InputError(f"{path} is empty.", f"A line is {example}.")
    return parsed
