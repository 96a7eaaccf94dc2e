"""Opens one image from a path, URL, base64 text, bytes or array, and refuses what is unsafe or not an image."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from vlpack.errors import InputError
from vlpack.preprocess.fetch import MAX_DOWNLOAD_BYTES, fetch

MAX_IMAGE_PIXELS = 2 * (2**30 // 4 // 3)
"""Maximum pixels of an image that is decoded: 178 956 970, the limit at which Pillow raises; 512 MiB as RGB."""

MAX_ENCODED_BYTES = MAX_DOWNLOAD_BYTES
"""Maximum bytes of a base64 text after decoding; the same as for a download."""

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]
"""The types of image that `load_image` accepts: path, URL or base64 text, encoded bytes, PIL image, array."""

# EPS (for which Pillow runs Ghostscript), PDF, WMF and scientific containers are left out: models are not asked about
# such files.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "MPO", "JPEG2000", "AVIF", "PPM", "TGA", "ICO", "PCX")


@cache
def file_endings() -> frozenset[str]:
    """The endings of file names of readable image formats, such as ``.png``."""
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS)


def load_image(
    source: ImageSource, *, allow_private_urls: bool = False, max_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Loads an image as upright RGB, as ``load_image`` in transformers/image_utils.py does.

    EXIF rotation is applied. Alpha is dropped, not composited. An animation gives its first frame.

    Args:
        source: file path, http(s) URL, `data:` URI, base64 text, encoded bytes, PIL image, or uint8 array [H, W, 3].
            Do not pass paths or URLs from people you do not trust: a path can name any file that this user can read.
        allow_private_urls: whether to also fetch from loopback, private and link-local addresses.
        max_pixels: maximum pixels of encoded bytes, at most `MAX_IMAGE_PIXELS`; they are checked before decoding.

    Returns:
        A decoded PIL image of mode RGB.

    Raises:
        InputError: the source is missing, unreachable, not an image, truncated, empty, or has more than
            `MAX_IMAGE_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the PIL image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), f"the {len(source)} bytes given", max_pixels)
    if isinstance(source, os.PathLike):
        return _from_file(os.fspath(source))
    if not isinstance(source, str):
        raise InputError(f"An image cannot be loaded from a {type(source).__name__}.", hint=_SOURCES_HINT)
    return _from_text(source, allow_private_urls)


_SOURCES_HINT = "Give a file path, an http(s) URL, a data: URI, bytes, a PIL image or a uint8 array [H, W, 3]."


def _from_text(source: str, allow_private_urls: bool) -> Image.Image:
    # The order is transformers': URL, existing path, data: URI, bare base64.
    scheme = source[:8].lower()
    if scheme.startswith(("http://", "https://")):
        body = fetch(source, allow_private=allow_private_urls)
        return _decode(io.BytesIO(body), _shorten(source.partition("?")[0]))
    if "\0" not in source and os.path.lexists(source):
        return _from_file(source)
    if scheme.startswith("data:"):
        return _decode(io.BytesIO(data_uri_bytes(source)), "the data: URI")
    if "://" in source[:32]:
        raise InputError(
            f"{_shorten(source)} cannot be fetched: only http, https and data: URLs are supported.", hint=_SOURCES_HINT
        )
    if (encoded := _from_base64(source)) is not None:
        return _decode(io.BytesIO(encoded), "the base64 text")
    raise InputError(f"There is no image file {_shorten(source)}.", hint=_SOURCES_HINT)


def _from_file(path: str) -> Image.Image:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or device could block or never end
            raise InputError(f"{path} is not a regular file.", hint="Give the path of an image file.")
        with Path(path).open("rb") as file:
            return _decode(file, path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(
            f"An image array must be uint8 [H, W, 3] and not empty, not {array.dtype} {list(array.shape)}.",
            hint="Convert it to RGB with the channels last and levels from 0 to 255.",
        )
    _check_size(array.shape[1], array.shape[0], "the array")
    return Image.fromarray(np.ascontiguousarray(array))


def data_uri_bytes(uri: str) -> bytes:
    """The bytes that a base64 ``data:`` URI holds.

    Raises:
        InputError: the URI is of another form, or holds more than `MAX_ENCODED_BYTES`.
    """
    header, comma, payload = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InputError("The data: URI is not base64.", hint="Write it as data:image/png;base64,....")
    data = _from_base64(payload)
    if data is None:
        raise InputError("The data: URI holds invalid base64.")
    return data


def _from_base64(text: str) -> bytes | None:
    if len(text) > 2 * MAX_ENCODED_BYTES:
        raise InputError(f"The base64 text has {len(text)} characters; at most {MAX_ENCODED_BYTES} bytes are decoded.")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(data) > MAX_ENCODED_BYTES:
        raise InputError(f"The base64 text holds {len(data)} bytes; at most {MAX_ENCODED_BYTES} are decoded.")
    # The shortest image header has eight bytes; a shorter word is far more likely a mistyped path.
    return data if len(data) >= 8 else None


def _decode(file: Any, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        # Pillow warns above half of MAX_IMAGE_PIXELS; that warning is left to the user's filters.
        with Image.open(file, formats=formats) as image:
            _check_size(image.width, image.height, name, max_pixels)
            return _upright_rgb(image, name, owned=True)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        size = re.search(r"\d+", str(error))
        raise InputError(
            f"{name} has {size[0] if size else 'too many'} pixels; at most {MAX_IMAGE_PIXELS} are decoded.",
            hint="Scale the image down first.",
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image of a known format ({', '.join(formats)}).") from error
    except Exception as error:
        # On damaged files Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, KeyError …
        raise InputError(f"{name} is a damaged or truncated image: {error}.") from error


def _upright_rgb(image: Image.Image, name: str, *, owned: bool = False) -> Image.Image:
    _check_size(image.width, image.height, name)
    try:
        if owned:
            ImageOps.exif_transpose(image, in_place=True)
        else:
            image = ImageOps.exif_transpose(image)
        image.load()
        # `convert` always copies, so skip it for RGB; an animation is copied to let go of its file.
        return image if image.mode == "RGB" and not getattr(image, "is_animated", False) else image.convert("RGB")
    except Exception as error:
        raise InputError(f"{name} is a damaged or truncated image: {error}.") from error


def _check_size(width: int, height: int, name: str, most: int = MAX_IMAGE_PIXELS) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name} is empty: {width}x{height} pixels.")
    if width * height > most:
        raise InputError(
            f"{name} has {width}x{height} = {width * height} pixels; at most {most} are decoded.",
            hint="Scale the image down first.",
        )


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
