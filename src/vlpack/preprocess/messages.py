"""Brings OpenAI-style and transformers-style messages to one form and lists their images and videos in order."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from vlpack.errors import InputError, OptionError
from vlpack.preprocess.frames import VideoSource
from vlpack.preprocess.load import ImageSource
from vlpack.preprocess.video import VideoOptions

Message: TypeAlias = Mapping[str, Any]
"""A dictionary with `role` (text) and `content` (text, or a list of parts)."""

IMAGE_KEYS = ("image", "url", "path", "base64")
"""Keys of an image part, one of which holds its source."""


_VIDEO_KEYS = ("video", "path", "url")
_VIDEO_OPTIONS = tuple(field.name for field in dataclasses.fields(VideoOptions))


class VideoPart(NamedTuple):
    """A video of a conversation: None for a source that is given separately, None for options that are not given."""

    source: VideoSource | None
    options: VideoOptions | None


class Conversation(NamedTuple):
    """What `normalize_messages` makes of messages.

    Attributes:
        messages: for the chat template.
        images: sources in the order of their parts; None where a part has none.
        videos: likewise.
    """

    messages: list[dict[str, Any]]
    images: list[ImageSource | None]
    videos: list[VideoPart]


def normalize_messages(messages: Sequence[Message]) -> Conversation:
    """Checks a conversation and separates it from its images and videos.

    Parts of a `content` list are texts, {"type": "text", "text": …}, {"type": "image"} with one of image, url, path or
    base64 or with none (the image is given separately), and {"type": "image_url", "image_url": {"url": …} or text},
    which must be an http(s) URL or data: URI and never reads a file. The last becomes an image part, as in
    transformers/processing_utils.py. {"type": "video"} has one of video or path, or none, and may have the fields of
    `VideoOptions`; an unknown field beside them is an error, as it would do nothing. The messages given are not
    changed.

    Raises:
        InputError: no messages, or one of another shape; the message and part are named by number, from 1.
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
            raise InputError(f"{where} has type 'text' and no 'text'.")
        return dict(part)
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(url, str) or not url.lower().startswith(("http://", "https://", "data:")):
            raise InputError(
                f"{where} has type 'image_url' and no http(s) URL or data: URI.",
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
            f"{where} has {unknown[0]!r}, which a video does not have.", f"It may have {', '.join(_VIDEO_OPTIONS)}."
        )
    options = {key: part[key] for key in _VIDEO_OPTIONS if part.get(key) is not None}
    try:
        return VideoPart(_source(part, _VIDEO_KEYS, where), VideoOptions(**options) if options else None)
    except OptionError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from error


def check_sources(images: object, videos: object) -> None:
    """Raises an InputError where something else is given than a list of them."""
    for name, sources in (("image", images), ("video", videos)):
        if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence):
            kind = "" if isinstance(sources, (str, bytes, os.PathLike)) else f", not {type(sources).__name__}"
            raise InputError(f"{name}s must be a list, also for a single one{kind}.", f"[{name}], or [] for none.")
