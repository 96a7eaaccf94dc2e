"""The images and videos of rows: files inside one folder, ``data:`` URIs, bytes, and, if allowed, http(s) URLs.

Rows may come from people who are not trusted. A path in a row never leads out of the folder of the input, neither by
``..`` nor by a link, and nothing is downloaded unless the user allows it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from PIL import Image

from vlpack.bulk.folder import Folder, folder_of
from vlpack.bulk.pages import Pages
from vlpack.errors import InputError, option
from vlpack.preprocess import load_image
from vlpack.preprocess.fetch import fetch
from vlpack.preprocess.image_source import FORMATS, MAX_ENCODED_BYTES, data_uri_bytes

MAX_IMAGE_PIXELS = 64_000_000
"""Largest area of an image before it is resized, in pixels; the server has the same default."""

LONGEST_PATH = 1024
"""Largest number of characters of a path; a longer text without a scheme is decoded as base64."""


class Page(NamedTuple):
    """A page of a PDF as an image.

    Attributes:
        path: path of the PDF, relative to the folder.
        number: number of the page, from 1.
    """

    path: str
    number: int


Given: TypeAlias = "str | bytes | Page"
"""An image or video of a row: a path relative to the folder, a URL, a ``data:`` URI, base64, bytes, or a PDF's page."""


@dataclass(frozen=True)
class Place:
    """The place of the files of rows, and the kinds of sources that rows may name.

    Args:
        folder: path or URI of the folder in which all files must be; None if rows may name no files.
        allow_urls: whether http(s) URLs are downloaded.
        allow_private_urls: whether URLs may lead to this machine or its network.
    """

    folder: str | None
    allow_urls: bool = False
    allow_private_urls: bool = False


class Media:
    """A reader of the images and videos of rows.

    Args:
        place: where the files are, and what rows may name.
    """

    def __init__(self, place: Place) -> None:
        self._place, self._folder = place, folder_of(place.folder)
        self._pages = Pages(self._folder)

    def image(self, given: Given) -> Image.Image:
        """Decodes an image as upright RGB.

        Raises:
            InputError: the image is missing, out of the folder, not an image, or too large.
        """
        return load_image(self._bytes(given), max_pixels=MAX_IMAGE_PIXELS)

    def video(self, given: Given) -> str | bytes:
        """The path or the bytes of a video, as `vlpack.preprocess.open_clip` takes them.

        Raises:
            InputError: the video is missing, out of the folder, or may not be downloaded.
        """
        if isinstance(given, str) and _scheme(given) is None and isinstance(self._folder, Folder):
            return str(self._folder.find(given))
        return self._bytes(given, "video/*")

    def area(self, given: Given) -> int:
        """The area of an image in pixels before it is resized, read from its header; 0 if it is not known."""
        try:
            if isinstance(given, bytes):
                source: Any = io.BytesIO(given)
            elif isinstance(given, str) and _scheme(given) is None and isinstance(self._folder, Folder):
                source = self._folder.find(given)
            else:
                return 0
            with Image.open(source, formats=FORMATS) as image:
                return int(image.width * image.height)
        except Exception:  # the error is reported when the row is answered
            return 0

    def _bytes(self, given: Given, accept: str = "image/*") -> bytes:
        """The encoded bytes of an image or video; ``accept`` is the media type that a server is asked for."""
        if isinstance(given, Page):
            return self._pages(given.path, given.number)
        if isinstance(given, bytes):
            return given
        scheme = _scheme(given)
        if scheme == "data":
            return data_uri_bytes(given)
        if scheme is None and len(given) > LONGEST_PATH:
            return data_uri_bytes(f"data:;base64,{given}")
        if scheme is not None:
            return self._fetched(given, scheme, accept)
        return self._folder.read(given, MAX_ENCODED_BYTES)

    def _fetched(self, url: str, scheme: str, accept: str) -> bytes:
        """Downloads an http(s) URL; raises an InputError if that is not allowed."""
        if scheme not in ("http", "https"):
            raise InputError(f"{url[:200]!r} is not a file, an http(s) URL or a data: URI.")
        if not self._place.allow_urls:
            raise InputError(
                f"{url.partition('?')[0][:200]} is not downloaded.",
                f"{option('allow_urls', True)} allows http(s) URLs in rows.",
            )
        return fetch(url, allow_private=self._place.allow_private_urls, accept=accept)


def _scheme(text: str) -> str | None:
    """The scheme of a URL or ``data:`` URI, in lower case; None for a path, such as ``a.png`` or ``C:\\a``."""
    scheme, colon, _ = text[:16].partition(":")
    return scheme.lower() if colon and len(scheme) > 1 and scheme.isalpha() else None


def held(value: Any, what: str = "image") -> Given | None:
    """The image or video in a column: a path, URL, bytes, or object with ``bytes``, ``path``, ``url`` or ``base64``.

    Hugging Face data sets store images as objects with ``bytes`` and ``path``.

    Args:
        value: value of the column.
        what: ``image`` or ``video``, for error messages.

    Returns:
        The image or video; None if the column holds none.

    Raises:
        InputError: the value has another type.
    """
    if isinstance(value, Mapping):
        encoded = value.get("base64")
        if isinstance(encoded, str):
            return f"data:;base64,{encoded}"
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
    if value is None or isinstance(value, str | bytes | Page):
        return value or None
    raise InputError(f"The row's {what} must be a path, a URL or a data: URI, not {type(value).__name__}.")
