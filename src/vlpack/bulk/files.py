"""Folders and lists of images, videos and PDFs as inputs: a row for each image, video and page of a PDF."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlpack.bulk.folder import Folder
from vlpack.bulk.media import Page
from vlpack.bulk.pages import Pages
from vlpack.bulk.row import Item
from vlpack.errors import InputError
from vlpack.preprocess.image_source import file_endings

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m4v", ".flv", ".ogv", ".wmv")
"""Endings of names of videos."""


def kind_of(name: str) -> str | None:
    """The kind of a file by its name: ``image``, ``video`` or ``pdf``; None for others and for hidden files."""
    ending = os.path.splitext(name)[1].lower()
    if name.startswith("."):
        return None
    if ending in file_endings():
        return "image"
    return "video" if ending in VIDEOS else "pdf" if ending == ".pdf" else None


class Files:
    """A source of rows from files, in the order of their paths: one for each image, video and page of a PDF.

    The id of a row is the path of its file relative to the folder, followed by ``#page=…`` for a page of a PDF.

    Args:
        folder: folder that the paths are relative to.
        paths: the files; None for all in the folder and the folders in it.

    Attributes:
        count: number of files.
        total: number of rows; None if there are PDFs, whose pages are counted only when they are read.
    """

    def __init__(self, folder: Path, paths: Sequence[Path] | None) -> None:
        self._folder, self._paths = folder, paths
        self.count, pdfs = 0, False
        for name in self._names():
            self.count += 1
            pdfs = pdfs or kind_of(os.path.basename(name)) == "pdf"
        self.total = None if pdfs else self.count

    def items(self) -> Iterator[Item]:
        """Iterates over the rows."""
        pages = Pages(Folder(str(self._folder)))
        for name in self._names():
            kind = kind_of(os.path.basename(name))
            if kind == "pdf":
                yield from self._of_pdf(name, pages)
            elif kind == "video":
                yield Item({"file": name}, name, name, videos=[name])
            else:
                yield Item({"file": name}, name, name, images=[name])

    def _of_pdf(self, name: str, pages: Pages) -> Iterator[Item]:
        """The rows of a PDF; one with an error if it cannot be read."""
        try:
            count = pages.count(name)
        except InputError as error:
            yield Item({"file": name, "page": None}, name, name, error=error)
            return
        for number in range(1, count + 1):
            key = f"{name}#page={number}"
            yield Item({"file": name, "page": number}, key, key, images=[Page(name, number)])

    def _names(self) -> Iterator[str]:
        """The paths of all files, relative to the folder, with ``/`` between folders."""
        if self._paths is not None:
            yield from (Path(os.path.relpath(path, self._folder)).as_posix() for path in self._paths)
            return
        for place, folders, names in os.walk(self._folder):  # does not follow links to folders
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if kind_of(name) is not None:
                    yield Path(os.path.relpath(os.path.join(place, name), self._folder)).as_posix()
