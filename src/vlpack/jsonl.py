"""JSONL files of users: one object a line, read whole, and the line named where it cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vlpack.errors import InputError

T = TypeVar("T")


def read_jsonl(path: Path, parse: Callable[[Any], T], example: str) -> list[tuple[int, T]]:
    """The number of each line that is not empty, and what ``parse`` makes of it.

    Args:
        path: the file, UTF-8.
        parse: of a line's value; its KeyError, TypeError, ValueError or AttributeError refuses the line.
        example: a line as it should be, for the error.

    Raises:
        InputError: the file cannot be read or holds nothing, or a line cannot be used.
    """
    try:
        # lines end at "\n" alone: a JSON text may hold U+2028 and other characters that str.splitlines splits at
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
