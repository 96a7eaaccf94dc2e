"""Images and videos of requests, given as ``data:`` URIs or http(s) URLs; files of this machine are never read."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from vlpack.errors import VlpackError
from vlpack.preprocess import ProcessedImages, ProcessedVideo, PromptBuilder, VideoOptions, load_image
from vlpack.preprocess.fetch import fetch
from vlpack.preprocess.image_source import data_uri_bytes
from vlpack.server.errors import sentence, too_large, wrong
from vlpack.server.settings import Settings

LOW_DETAIL = 512 * 512
"""Largest area, in pixels, of an image that the request gives with ``"detail": "low"``."""


FETCH_SECONDS = 30.0
"""Largest number of seconds for the downloads of one request."""


class ImagePart(NamedTuple):
    """An image of a message.

    Attributes:
        url: ``data:`` URI or http(s) URL.
        where: place of the image in the request, for error messages.
        low: whether the request asks for low detail.
        data: downloaded bytes; None if the URL was not downloaded.
    """

    url: str
    where: str
    low: bool = False
    data: bytes | None = None


class VideoPart(NamedTuple):
    """A video of a message.

    Attributes:
        url: ``data:`` URI or http(s) URL.
        where: place of the video in the request, for error messages.
        options: sampling of frames; None for the package's.
        data: downloaded bytes; None if the URL was not downloaded.
    """

    url: str
    where: str
    options: VideoOptions | None
    data: bytes | None = None


def image_part(value: Any, where: str) -> ImagePart:
    """Reads a message part's ``image_url``: a URL, or an object with ``url`` and ``detail``."""
    extra = dict(value) if isinstance(value, dict) else {"url": value}
    url, detail = extra.pop("url", None), extra.pop("detail", None)
    if extra:
        raise wrong(f"{where}: 'image_url' has the unknown field {next(iter(extra))!r}.", where)
    if detail not in (None, "auto", "low", "high", "original"):
        raise wrong(f"{where}: 'detail' is {detail!r}; it must be auto, low or high.", where)
    return ImagePart(_url(url, where, "image"), where, detail == "low")


def video_part(value: Any, where: str) -> VideoPart:
    """Reads a message part's ``video_url``: a URL, or an object with ``url`` and fields of `VideoOptions`."""
    extra = dict(value) if isinstance(value, dict) else {"url": value}
    url = _url(extra.pop("url", None), where, "video")
    unknown = [name for name in extra if name not in VideoOptions.__dataclass_fields__]
    if unknown:
        known = ", ".join(VideoOptions.__dataclass_fields__)
        raise wrong(f"{where}: 'video_url' has the unknown field {unknown[0]!r}. It may have url, {known}.", where)
    return VideoPart(url, where, VideoOptions(**extra) if extra else None)


def _url(url: Any, where: str, kind: str) -> str:
    if not isinstance(url, str) or not url[:8].lower().startswith(("http://", "https://", "data:")):
        raise wrong(f"{where}: the {kind}'s 'url' must be an http(s) URL or a data: URI; files are not read.", where)
    return url


Part = TypeVar("Part", ImagePart, VideoPart)


def is_remote(part: ImagePart | VideoPart) -> bool:
    """Whether an image or video must still be downloaded."""
    return part.data is None and part.url[:5].lower() != "data:"


class Downloads:
    """Downloads the URLs of one request; all of them together may take `FETCH_SECONDS` and ``max_body`` bytes.

    Args:
        settings: settings of the server.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._left, self._end = settings.max_body, time.monotonic() + FETCH_SECONDS

    def __call__(self, part: Part) -> Part:
        """Returns the part with its data, downloaded if it must be; blocks.

        Raises:
            ApiError: the download fails or is too large, or the URL leads to this machine or its network.
        """
        if not is_remote(part):
            return part
        private, accept = self._settings.allow_private_urls, "image/*" if isinstance(part, ImagePart) else "video/*"
        seconds = max(0.01, self._end - time.monotonic())
        try:
            data = fetch(part.url, allow_private=private, timeout=seconds, max_bytes=self._left, accept=accept)
        except VlpackError as error:
            at_most = "is larger than" in error.message
            raise (too_large if at_most else wrong)(f"{part.where}: {sentence(error)}", part.where) from None
        self._left -= len(data)
        return part._replace(data=data)


def read_bytes(part: ImagePart | VideoPart) -> bytes:
    """The bytes of an image or video that was downloaded or is a ``data:`` URI.

    Raises:
        InputError: the URI is invalid.
    """
    return data_uri_bytes(part.url) if part.data is None else part.data


def read_image(part: ImagePart, settings: Settings) -> Image.Image:
    """Decodes an image as upright RGB.

    Raises:
        ApiError: the image is invalid or too large; the error names its place in the request.
    """
    try:
        return load_image(read_bytes(part), max_pixels=settings.max_image_pixels)
    except VlpackError as error:
        at_most = " pixels; at most" in error.message
        raise (too_large if at_most else wrong)(f"{part.where}: {sentence(error)}", part.where) from None


class Media:
    """Preprocesses the images and videos of one request; its methods block.

    Args:
        prompts: prompt builder of the package.
        settings: settings of the server.
        min_pixels: smallest area of an image in pixels; None for the package's.
        max_pixels: largest area of an image in pixels; None for the package's.

    Raises:
        ApiError: pixel limits were given, but the package takes no images.
        OptionError: the pixel limits are out of their range.
    """

    def __init__(
        self, prompts: PromptBuilder, settings: Settings, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        self._prompts, self._settings = prompts, settings
        self._min, self._max = min_pixels, max_pixels
        if prompts.image_processor is not None:
            prompts.image_processor.with_pixel_limits(min_pixels, max_pixels)  # checks them
        elif min_pixels is not None or max_pixels is not None:
            name = "max_pixels" if min_pixels is None else "min_pixels"
            raise wrong(f"{name!r} has no effect: the package takes no images.", name)

    def image(self, part: ImagePart) -> ProcessedImages:
        """Turns an image into patches, before its prompt is made, so that other prompts do not wait for this work."""
        self._prompts.check_takes(images=True)
        processor = self._prompts.image_processor
        assert processor is not None, "checked"
        most = self._max
        if part.low:
            most = max(min(most or processor.max_pixels, LOW_DETAIL), self._min or processor.min_pixels)
        if most is not None or self._min is not None:
            processor = processor.with_pixel_limits(self._min, most)
        return processor([read_image(part, self._settings)])

    def video(self, part: VideoPart) -> ProcessedVideo:
        """Turns a video into patches and timestamps."""
        self._prompts.check_takes(videos=True)
        try:
            return self._prompts.processed_video(read_bytes(part), part.options)
        except VlpackError as error:
            raise wrong(f"{part.where}: {sentence(error)}", part.where) from None


def check_images(count: int, settings: Settings) -> None:
    """Raises an ApiError if a request has more images and videos than the server allows."""
    if count > settings.max_images:
        raise too_large(f"The request has {count} images and videos; this server takes {settings.max_images} at most.")
