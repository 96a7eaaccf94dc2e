"""Reads messages in OpenAI's format: makes messages for chat templates, and collects their images and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlpack.server.errors import too_large, wrong
from vlpack.server.media import ImagePart, VideoPart, check_images, image_part, video_part
from vlpack.server.reading import parse_json
from vlpack.server.settings import Settings

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_FIELDS = {
    "system": (),
    "user": (),
    "assistant": ("tool_calls", "reasoning_content", "reasoning"),
    "tool": ("tool_call_id", "name"),
}
_EMPTY = ("refusal", "audio", "function_call", "annotations", "name", "tool_calls")
"""Fields that clients send back with an earlier answer; they are accepted if they are empty."""


@dataclass
class Conversation:
    """Messages for a chat template, and their images and videos in order."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[ImagePart] = field(default_factory=list)
    videos: list[VideoPart] = field(default_factory=list)


def read_messages(given: Sequence[Any], settings: Settings) -> Conversation:
    """Checks the messages of a request and returns them for a chat template.

    Raises:
        ApiError: a message is invalid, or the messages exceed a limit of the server.
    """
    if not given:
        raise wrong("'messages' is empty.", "messages")
    read, size = Conversation(), 0
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise wrong(f"{where} must be an object with 'role' and 'content'.", where)
        read.messages.append(_message(message, where, read))
        size += _characters(read.messages[-1])
    if size > settings.max_prompt:
        raise too_large(
            f"The messages have {size} characters; this server takes {settings.max_prompt} at most.", "messages"
        )
    check_images(len(read.images) + len(read.videos), settings)
    return read


def _message(message: Mapping[str, Any], where: str, read: Conversation) -> dict[str, Any]:
    given = message.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise wrong(f"{where}: 'role' is {given!r}; it must be system, developer, user, assistant or tool.", where)
    for name, value in message.items():
        known = name in ("role", "content", *_FIELDS[role])
        if not known and not (name in _EMPTY and not value):
            raise wrong(
                f"{where}: the field {name!r} is not supported in a message of the role {role}.", f"{where}.{name}"
            )
    content, calls = message.get("content"), message.get("tool_calls")
    if content is None and not (role == "assistant" and (calls or message.get("reasoning_content"))):
        raise wrong(f"{where} has no 'content'.", f"{where}.content")
    done: dict[str, Any] = {"role": role, "content": _content("" if content is None else content, where, role, read)}
    if calls:
        done["tool_calls"] = _calls(calls, where)
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if reasoning is not None:
        done["reasoning_content"] = _text(reasoning, f"{where}.reasoning_content")
    for name in ("tool_call_id", "name"):
        if role == "tool" and message.get(name) is not None:
            done[name] = _text(message[name], f"{where}.{name}")
    return done


def _content(content: Any, where: str, role: str, read: Conversation) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(f"{where}: 'content' must be a text or a list of parts.", f"{where}.content")
    parts = [_part(part, f"{where}.content[{place}]", role, read) for place, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):  # the templates of text models accept only strings
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any, where: str, role: str, read: Conversation) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        _only(part, ("text",), where)
        return {"type": "text", "text": _text(part.get("text"), f"{where}.text")}
    if kind == "refusal" and role == "assistant":
        return {"type": "text", "text": _text(part.get("refusal"), f"{where}.refusal")}
    if kind not in ("image_url", "video_url"):
        raise wrong(f"{where}: the type {kind!r} is not supported; text, image_url and video_url are.", where)
    if role not in ("user", "tool"):
        raise wrong(f"{where}: a message of the role {role} cannot have images or videos; a user's can.", where)
    _only(part, (kind,), where)
    if kind == "image_url":
        read.images.append(image_part(part.get(kind), where))
        return {"type": "image"}
    read.videos.append(video_part(part.get(kind), where))
    return {"type": "video"}


def _only(part: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in part:
        if name not in ("type", *names):
            raise wrong(f"{where}: the field {name!r} is not supported.", f"{where}.{name}")


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The tool calls of an earlier answer, with arguments as objects, which all templates accept."""
    done = []
    for place, call in enumerate(calls if isinstance(calls, list) else [None]):
        at = f"{where}.tool_calls[{place}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type", "function") != "function":
            raise wrong(f"{at} must be a call of a function: an object with 'id', 'type' and 'function'.", at)
        name, arguments = _text(function.get("name"), f"{at}.function.name"), function.get("arguments") or "{}"
        try:
            parsed = parse_json(_text(arguments, f"{at}.function.arguments"))
        except ValueError:  # the answer was cut off; the template gets the incomplete text
            parsed = arguments
        function = {"name": name, "arguments": parsed}
        done.append({"id": str(call.get("id") or ""), "type": "function", "function": function})
    return done


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise wrong(f"{where} must be a text.", where)
    return value


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
