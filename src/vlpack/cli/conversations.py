"""Conversations in files: JSON in OpenAI's form, which `/save` writes and `--messages` reads."""

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
"""Largest conversation that is read; images in it are base64."""


def read_messages(path: Path) -> list[Message]:
    """A conversation that `/save` has written, or anybody else.

    Raises:
        InputError: the file cannot be read, or is no list of messages.
    """
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size > MAX_BYTES:
            raise InputError(f"{path} has more than {MAX_BYTES} bytes.", "Give a conversation.")
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):  # which may have no end
            raise InputError(f"{path} is a device.", "Give a conversation.")
        messages = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{path} holds no list of messages.", '[{"role": "user", "content": "…"}, …]')
    return messages


def write_messages(path: Path, messages: Sequence[Message]) -> None:
    """The file appears whole or not at all.

    Raises:
        InputError: a video is given as frames, which JSON cannot hold.
        OptionError: the file cannot be written.
    """
    said = saved(messages)
    try:
        data = json.dumps(said, ensure_ascii=False, indent=1).encode()
    except UnicodeEncodeError:  # a file's name that is not UTF-8
        data = json.dumps(said, indent=1).encode()
    try:
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(data + b"\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise OptionError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from None


def saved(messages: Sequence[Message]) -> list[Message]:
    """Messages as JSON can hold them: files by their absolute paths, URLs as they are, other images as data URIs.

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
    # os.path's, as Path.exists raises an error at a data URI, which is too long for a name
    if isinstance(source, os.PathLike) or (isinstance(source, str) and (key == "path" or os.path.exists(source))):
        return {**rest, "path": os.path.abspath(source)}
    if isinstance(source, str):
        return {**rest, "url" if source[:8].lower().startswith(("http://", "https://", "data:")) else key: source}
    if kind == "video":
        raise InputError("A video that was given as frames cannot be saved.", "Give the file or folder.")
    return {**rest, "url": _data_uri(source)}


def _data_uri(source: Any) -> str:
    import base64
    import io

    from vlpack.preprocess import load_image

    buffer = io.BytesIO()
    load_image(source).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
