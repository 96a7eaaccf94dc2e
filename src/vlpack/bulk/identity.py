"""The manifest of an output, which records the package and the question that all of its rows have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlpack.errors import OptionError, option

MANIFEST = "manifest.json"
"""Name of the manifest in the folder of an output."""

FORMAT = 1
"""Version of the manifest's format."""

KIND = "vlpack batch"
"""Entry of the manifest that says what wrote it."""

_TYPES = {"package": dict, "question": dict, "runs": list}
"""Types of the entries of a manifest that are read again."""


def manifest_of(data: bytes, name: str) -> dict[str, Any]:
    """Reads the manifest that an earlier run has written.

    Args:
        data: contents of the file.
        name: name of the file, for messages.

    Raises:
        OptionError: the file is damaged, or is something else.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    good = isinstance(found, dict) and found.get("kind") == KIND and found.get("format") == FORMAT
    if not good or not all(isinstance(found.get(key), kind) for key, kind in _TYPES.items()):
        raise OptionError(
            f"{name} is damaged, or not a manifest that this version of vlpack batch reads.",
            f"Choose another {option('output')}.",
        )
    return dict(found)


def manifest_bytes(identity: Mapping[str, Any], runs: list[Any]) -> bytes:
    """The contents of a manifest.

    Args:
        identity: what all rows have in common.
        runs: one entry for each run that has written rows.
    """
    return json.dumps({"format": FORMAT, "kind": KIND, **identity, "runs": runs}, indent=1).encode() + b"\n"


def check_identity(folder: str, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises an OptionError if an output has rows of another package, question or format.

    Args:
        folder: folder of the output, for messages.
        there: the manifest of the output.
        now: what the rows of this run have in common.
    """
    another = f"Choose another {option('output')}, or the same options as before."
    old = there["package"]
    if old.get("sha256") != now["package"]["sha256"]:
        raise OptionError(
            f"{folder} has answers of another package: {old.get('name')} ({str(old.get('sha256'))[:12]}), "
            f"not {now['package']['name']} ({now['package']['sha256'][:12]}).",
            f"Choose another {option('output')}, or the package of before.",
        )
    for name, key in (("layout", "layout"), ("format", "shards")):
        if there.get(key) != now[key]:
            said = option(name) if name == "format" else "The form of its rows"
            raise OptionError(f"{said} of {folder} is {there.get(key)}, not {now[key]}.", another)
    before, asked = there["question"], json.loads(json.dumps(now["question"]))
    for name in dict.fromkeys([*asked, *before]):
        if before.get(name) != asked.get(name):
            raise OptionError(
                f"{folder} has answers to another question: {option(name)} was "
                f"{_shown(before.get(name))}, and is {_shown(asked.get(name))} now.",
                another,
            )


def _shown(value: Any) -> str:
    """The value of an option in an error message."""
    if value is None:
        return "not given"
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 80 else f"{text[:79]}…") if isinstance(value, str) else text[:80]
