"""Brings OpenAI-style and transformers-style messages to one form and lists their images in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from vlpack.errors import InputError
from vlpack.preprocess.load import ImageSource

Message: TypeAlias = Mapping[str, Any]
"""A dictionary with `role` (text) and `content` (text, or a list of parts)."""

_IMAGE_KEYS = ("image", "url", "path", "base64")


def normalize_messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[ImageSource | None]]:
    """Checks a conversation and separates it from its images.

    Parts of a `content` list are texts, {"type": "text", "text": …}, {"type": "image"} with one of image, url, path or
    base64 or with none (the image is given separately), and {"type": "image_url", "image_url": {"url": …} or text},
    which must be an http(s) URL or data: URI and never reads a file. The last becomes an image part, as in
    transformers/processing_utils.py. The messages given are not changed.

    Returns:
        (messages for the chat template, image sources in the order of their parts; None where a part has none).

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
    normalized: list[dict[str, Any]] = []
    sources: list[ImageSource | None] = []
    for number, message in enumerate(messages, start=1):
        where = f"Message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"{where} has no 'role'.", hint='Write {"role": "user", "content": "…"}.')
        plain = {key: value for key, value in message.items() if value is not None}
        content = plain.get("content")
        if isinstance(content, (list, tuple)):
            plain["content"] = [
                _part(part, f"{where}, part {place}", sources) for place, part in enumerate(content, start=1)
            ]
        elif content is not None and not isinstance(content, str):
            raise InputError(f"{where}: 'content' must be a text or a list of parts, not {type(content).__name__}.")
        elif content is None and len(plain) == 1:  # an assistant turn may hold only tool calls
            raise InputError(f"{where} has no 'content'.")
        normalized.append(plain)
    return normalized, sources


def _part(part: object, where: str, sources: list[ImageSource | None]) -> dict[str, Any]:
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
        given = [part[key] for key in _IMAGE_KEYS if part.get(key) is not None]
        if len(given) > 1:
            raise InputError(f"{where} has more than one of {', '.join(_IMAGE_KEYS)}.", hint="Keep one of them.")
        sources.append(given[0] if given else None)
        return dict(part)
    hint = "Send the frames of a video as images." if kind == "video" else "Known types: text, image, image_url."
    raise InputError(f"{where} has the unknown type {kind!r}.", hint=hint)
