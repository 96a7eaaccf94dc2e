"""Images, videos and PDFs as inputs: a row for each image, video and page of a PDF."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from vlpack.bulk.folder import folder_of
from vlpack.bulk.media import Page
from vlpack.bulk.pages import Pages
from vlpack.bulk.row import Item, Mark
from vlpack.bulk.storage import Storage
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


def files_in(place: Storage) -> Iterator[str]:
    """The names of the images, videos and PDFs in a folder and the folders in it, without hidden ones."""
    for name in place.names():
        if not any(part.startswith(".") for part in name.split("/")) and kind_of(os.path.basename(name)) is not None:
            yield name


class Files:
    """Files of a folder as rows: one for each image, video and page of a PDF.

    The id of a row is the path of its file relative to the folder, followed by ``#page=…`` for a page of a PDF.

    Args:
        folder: path or URI of the folder.
        names: names of the files.
    """

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names

    def read(self, start: Mark = (0, 0)) -> Iterator[tuple[Mark, Item]]:
        """Iterates over the rows from a mark on: the number of a file, and that of the page in it, both from 0."""
        pages: Pages | None = None
        for place, name in enumerate(self._names[start[0] :], start[0]):
            kind = kind_of(os.path.basename(name))
            if kind == "pdf":
                pages = pages or Pages(folder_of(self._folder))
                first = start[1] if place == start[0] else 0
                yield from (((place, page), item) for page, item in self._of_pdf(name, pages, first))
            elif kind == "video":
                yield (place, 0), Item({"file": name}, name, name, videos=[name])
            else:
                yield (place, 0), Item({"file": name}, name, name, images=[name])

    def _of_pdf(self, name: str, pages: Pages, first: int) -> Iterator[tuple[int, Item]]:
        """The rows of a PDF from a page on; one with an error if it cannot be read."""
        try:
            count = pages.count(name)
        except InputError as error:
            yield 0, Item({"file": name, "page": None}, name, name, error=error)
            return
        for page in range(first, count):
            key = f"{name}#page={page + 1}"
            yield page, Item({"file": name, "page": page + 1}, key, key, images=[Page(name, page + 1)])

    def column(self, name: str) -> None:
        """None, because files have no columns."""
