"""Normalizes OpenAI-style and transformers-style messages, and collects their images and videos in order."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from vlpack.errors import InputError, OptionError, in_python
from vlpack.preprocess.image_source import ImageSource
from vlpack.preprocess.video import VideoOptions
from vlpack.preprocess.video_decode import VideoSource

Message: TypeAlias = Mapping[str, Any]
"""A dictionary with `role` (text) and `content` (text, or a list of parts)."""

IMAGE_KEYS = ("image", "url", "path", "base64")
"""Keys of an image part, one of which holds its source."""


_VIDEO_KEYS = ("video", "path", "url")
_VIDEO_OPTIONS = tuple(field.name for field in dataclasses.fields(VideoOptions))


class VideoPart(NamedTuple):
    """A video of a conversation.

    Attributes:
        source: the video; None where it is given separately.
        options: the frame and size options in the message part; None where it has none.
    """

    source: VideoSource | None
    options: VideoOptions | None


class Conversation(NamedTuple):
    """Normalized messages, with their images and videos taken out.

    Attributes:
        messages: messages in the form that the chat template takes.
        images: image sources in the order of their parts; None for a part without a source.
        videos: videos in the order of their parts.
    """

    messages: list[dict[str, Any]]
    images: list[ImageSource | None]
    videos: list[VideoPart]


def normalize_messages(messages: Sequence[Message]) -> Conversation:
    """Checks a conversation and separates it from its images and videos.

    A `content` list may hold these parts:

    - a text, or {"type": "text", "text": …};
    - {"type": "image"} with at most one of the keys image, url, path and base64; without any, the image is given
      separately;
    - {"type": "image_url", "image_url": {"url": …} or text}, which must be an http(s) URL or data: URI and never reads
      a file; it becomes an image part, as in transformers/processing_utils.py;
    - {"type": "video"} with at most one of video, path and url, and optionally the fields of `VideoOptions`; any other
      field is an error, because it would have no effect.

    The given messages are not changed.

    Raises:
        InputError: there are no messages, or one is malformed; it names the message and part by number, from 1.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(
            f"Messages must be a list, not a {type(messages).__name__}.",
            hint='Write [{"role": "user", "content": "…"}].',
        )
    if not messages:
        raise InputError("There are no messages.", hint='Write [{"role": "user", "content": "…"}].')
    whole = Conversation([], [], [])
    for number, message in enumerate(messages, start=1):
        where = f"Message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"{where} has no 'role'.", hint='Write {"role": "user", "content": "…"}.')
        plain = {key: value for key, value in message.items() if value is not None}
        content = plain.get("content")
        if isinstance(content, (list, tuple)):
            plain["content"] = [
                _part(part, f"{where}, part {place}", whole) for place, part in enumerate(content, start=1)
            ]
        elif content is not None and not isinstance(content, str):
            raise InputError(f"{where}: 'content' must be a text or a list of parts, not {type(content).__name__}.")
        elif content is None and len(plain) == 1:  # an assistant turn may hold only tool calls
            raise InputError(f"{where} has no 'content'.")
        whole.messages.append(plain)
    return whole


def _part(part: object, where: str, whole: Conversation) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InputError(f"{where} must be an object with a 'type', not {type(part).__name__}.")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f"{where} has type 'text' but no 'text'.")
        return dict(part)
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(url, str) or not url.lower().startswith(("http://", "https://", "data:")):
            raise InputError(
                f"{where} has type 'image_url' but no http(s) URL or data: URI.",
                hint='For a file write {"type": "image", "path": "…"}.',
            )
        part, kind = {"type": "image", "url": url}, "image"
    if kind == "image":
        whole.images.append(_source(part, IMAGE_KEYS, where))
        return dict(part)
    if kind == "video":
        whole.videos.append(_video(part, where))
        return {"type": "video"}
    raise InputError(f"{where} has the unknown type {kind!r}.", hint="Known types: text, image, image_url, video.")


def _source(part: Mapping[str, Any], keys: Sequence[str], where: str) -> Any:
    given = [part[key] for key in keys if part.get(key) is not None]
    if len(given) > 1:
        raise InputError(f"{where} has more than one of {', '.join(keys)}.", hint="Keep one of them.")
    return given[0] if given else None


def _video(part: Mapping[str, Any], where: str) -> VideoPart:
    unknown = [key for key in part if key not in ("type", *_VIDEO_KEYS, *_VIDEO_OPTIONS)]
    if unknown:
        raise InputError(
            f"{where} has the unknown field {unknown[0]!r}.", f"A video may have {', '.join(_VIDEO_OPTIONS)}."
        )
    options = {key: part[key] for key in _VIDEO_OPTIONS if part.get(key) is not None}
    try:
        return VideoPart(_source(part, _VIDEO_KEYS, where), VideoOptions(**options) if options else None)
    except OptionError as error:
        # The options are fields of the message here, so the command line must not write them as --option.
        raise InputError(f"{where}: {in_python(error.message)}", in_python(error.hint or "") or None) from error


def check_sources(images: object, videos: object) -> None:
    """Raises an InputError if ``images`` or ``videos`` is not a list."""
    for name, sources in (("image", images), ("video", videos)):
        if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence):
            kind = "" if isinstance(sources, (str, bytes, os.PathLike)) else f", not {type(sources).__name__}"
            raise InputError(
                f"{name}s must be a list, even for a single {name}{kind}.", f"Write [{name}], or [] for none."
            )
