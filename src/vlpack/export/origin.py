"""Describes the origin of a package for its README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def made_from(source: Mapping[str, Any]) -> str:
    """The beginning of a sentence, ``Made from …``, in Markdown.

    Args:
        source: the manifest's ``source``: ``repo_id`` and ``commit``, or the folder's ``name``; and its ``adapters``.
    """
    folder = "" if source.get("repo_id") else "the folder "
    merged = "".join(f", with the LoRA adapter {_place(a)} merged into it" for a in source.get("adapters", ()))
    return f"Made from {folder}{_place(source)}{merged}{',' if merged else ''}"


def _place(origin: Mapping[str, Any]) -> str:
    repo_id, commit = origin.get("repo_id"), origin.get("commit")
    if not repo_id:
        return f"`{origin['name']}`"
    return f"[{repo_id}](https://huggingface.co/{repo_id})" + (f" at `{commit}`" if commit else "")
