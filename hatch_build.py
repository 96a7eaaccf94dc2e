"""Makes the project's description on PyPI from README.md, whose relative links work only in the repository."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?![a-z]+:|#)[^)]+)\)")
"""A Markdown link or picture whose target is a path."""


def repository() -> str | None:
    """The address of this repository's files at this commit, if a workflow of GitHub runs the build; otherwise None."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_SHA")
    server, name, commit = (os.environ.get(key) for key in names)
    return f"{server}/{name}/{{kind}}/{commit}/" if server and name and commit else None


def description(readme: str, address: str | None) -> str:
    """README.md with its relative links made absolute, for readers outside of the repository.

    Args:
        readme: text of the file.
        address: beginning of links, before the path, with ``{kind}`` for blob or raw. If it is None, pictures are left
            out and links become plain text, because a wrong address would be worse than none.
    """

    def replaced(link: re.Match[str]) -> str:
        picture, text, target = link["picture"], link["text"], link["target"]
        if address is None:
            return "" if picture else text
        return f"{picture}[{text}]({address.format(kind='raw' if picture else 'blob')}{target})"

    return _LINK.sub(replaced, readme)


class DescriptionHook(MetadataHookInterface):
    """Hatchling's hook for the field ``readme``, which pyproject.toml declares as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Sets the description in the project's metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": description(text, repository())}
