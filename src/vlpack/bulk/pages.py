"""The pages of PDFs as images: a few are rendered at a time and kept for the rows that follow."""

from __future__ import annotations

import threading
from collections import OrderedDict

from vlpack.bulk.folder import Folder, RemoteFolder
from vlpack.errors import InputError
from vlpack.preprocess.image_source import data_uri_bytes
from vlpack.preprocess.pdf import page_count, render

AT_ONCE = 8
"""Number of pages that are rendered at a time; starting the process that renders them takes as long as a few pages."""

MAX_BYTES = 2**28
"""Largest size of a PDF, in bytes: 256 MiB."""

_KEPT = 4
"""Number of groups of `AT_ONCE` pages that are kept."""


class Pages:
    """A renderer of pages of PDFs, which any thread may call.

    Args:
        folder: folder with the PDFs.
    """

    def __init__(self, folder: Folder | RemoteFolder) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._kept: OrderedDict[tuple[str, int], list[bytes]] = OrderedDict()

    def count(self, path: str) -> int:
        """The number of pages of a PDF; raises the same errors as rendering a page."""
        return page_count(self._folder.read(path, MAX_BYTES), path)

    def __call__(self, path: str, number: int) -> bytes:
        """A page as an encoded image.

        Args:
            path: path of the PDF, relative to the folder.
            number: number of the page, from 1.

        Raises:
            InputError: the PDF cannot be read or rendered, or has no such page.
            VlpackError: pypdfium2 is not installed.
        """
        group, place = divmod(number - 1, AT_ONCE)
        with self._lock:
            found = self._kept.pop((path, group), None)
            if found is None:
                data = self._folder.read(path, MAX_BYTES)
                found = [data_uri_bytes(page) for page in render(data, group * AT_ONCE, AT_ONCE, path)]
            self._kept[path, group] = found
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        if place >= len(found):
            raise InputError(f"{path} has no page {number}.")
        return found[place]
