"""Conversations in files: JSON in OpenAI's format, written by `/save` and read by `--messages`."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlpack.errors import InputError, OptionError
from vlpack.preprocess import Message

MAX_BYTES = 1 << 30
"""Maximum size of a conversation file, in bytes; images in it are base64."""


def read_messages(path: Path) -> list[Message]:
    """Reads a conversation from an untrusted file, such as one written by `/save`.

    Raises:
        InputError: the file cannot be read, is too large, or is not a JSON list of messages.
    """
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size > MAX_BYTES:
            raise InputError(f"{path} has more than {MAX_BYTES} bytes.", "Give the JSON file of a conversation.")
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):  # reading a device may never end
            raise InputError(f"{path} is a device.", "Give the JSON file of a conversation.")
        messages = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(
            f"{path} does not hold a list of messages.", 'It should be [{"role": "user", "content": "…"}, …].'
        )
    return messages


def write_messages(path: Path, messages: Sequence[Message]) -> None:
    """Writes a conversation to a JSON file, atomically: the file appears complete or not at all.

    Raises:
        InputError: a video is given as frames, which JSON cannot hold.
        OptionError: the file cannot be written.
    """
    said = saved(messages)
    try:
        data = json.dumps(said, ensure_ascii=False, indent=1).encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8: escape it
        data = json.dumps(said, indent=1).encode()
    try:
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(data + b"\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a name with a NUL raises ValueError
        raise OptionError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from None


def saved(messages: Sequence[Message]) -> list[Message]:
    """Messages in a form that JSON can hold: files as absolute paths, URLs unchanged, other images as data: URIs.

    Raises:
        InputError: a video is given as frames, which JSON cannot hold.
    """
    return [_saved(message) for message in messages]


def _saved(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return message
    return {**message, "content": [_saved_part(part) for part in content]}


def _saved_part(part: Any) -> Any:
    kind = part["type"] if isinstance(part, dict) else None
    if kind not in ("image", "video"):
        return part
    key = next((key for key in (kind, "path", "url", "base64") if part.get(key) is not None), None)
    if key is None:
        return part
    source, rest = part[key], {name: value for name, value in part.items() if name != key}
    # os.path.exists, because Path.exists raises an error for a data: URI, which is too long for a file name
    if isinstance(source, os.PathLike) or (isinstance(source, str) and (key == "path" or os.path.exists(source))):
        return {**rest, "path": os.path.abspath(source)}
    if isinstance(source, str):
        return {**rest, "url" if source[:8].lower().startswith(("http://", "https://", "data:")) else key: source}
    if kind == "video":
        raise InputError(
            "A video that was given as frames cannot be saved.", "Give the video as a file or folder instead."
        )
    return {**rest, "url": _data_uri(source)}


def _data_uri(source: Any) -> str:
    import base64
    import io

    from vlpack.preprocess import load_image

    buffer = io.BytesIO()
    load_image(source).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
