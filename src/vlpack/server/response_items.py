"""Converts the items and tools of ``/v1/responses`` into messages and tools of chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpack.server.errors import wrong


def chat_tool(tool: Any, where: str) -> dict[str, Any]:
    """Converts a tool into the format of chat completions, which puts the function into an object of its own.

    Raises:
        ApiError: the tool is not a function.
    """
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise wrong(f"{where} must have the type function; this server has no tools of its own.", where)
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": "function", "function": function}


def chat_messages(given: str | list[Any], instructions: str | None) -> list[dict[str, Any]]:
    """Converts the items of an input into chat messages; consecutive tool calls become one message.

    Args:
        given: text of a user's message, or a list of items.
        instructions: text of a system message before them; None for none.

    Raises:
        ApiError: an item has an unknown type.
    """
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    found = _Messages()
    for place, item in enumerate(items):
        found.add(item, f"input[{place}]")
    messages = found.messages
    if instructions is not None:
        first = messages[0] if messages else {}
        if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
            first["content"] = f"{instructions}\n\n{first['content']}"  # chat templates accept one system message
        else:
            messages.insert(0, {"role": "system", "content": instructions})
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


class _Messages:
    """A list of chat messages that grows with every added item."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._thought: str | None = None

    def add(self, item: Any, where: str) -> None:
        """Adds an item as a message or a part of one."""
        if not isinstance(item, Mapping):
            raise wrong(f"{where} must be an object.", where)
        kind = item.get("type", "message")
        if kind == "message":
            self._append(item.get("role"), content=_content(item.get("content"), where))
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not self.messages or self.messages[-1]["role"] != "assistant":
                self._append("assistant", tool_calls=[])
            self.messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            self._append("tool", tool_call_id=item.get("call_id"), content=_content(item.get("output"), where))
        elif kind == "reasoning":
            parts = item.get("content") or []
            self._thought = "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping)) or None
        else:
            raise wrong(f"{where}: the type {kind!r} is not supported.", where)

    def _append(self, role: Any, **fields: Any) -> None:
        if role == "assistant":
            fields["reasoning_content"], self._thought = self._thought, None
        self.messages.append({"role": role, **fields})


def _content(content: Any, where: str) -> Any:
    """Converts the content of an item into that of a chat message, whose parts have other names."""
    if not isinstance(content, list):
        return content
    return [_part(part, f"{where}.content[{place}]") for place, part in enumerate(content)]


def _part(part: Any, where: str) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    if kind in ("refusal", "video_url"):
        return part
    if kind != "input_image":
        raise wrong(f"{where}: the type {kind!r} is not supported.", where)
    if part.get("file_id") is not None:
        raise wrong(f"{where}: there are no stored files; give 'image_url'.", where)
    image = {"url": part.get("image_url"), "detail": part.get("detail")}
    return {"type": "image_url", "image_url": {key: value for key, value in image.items() if value}}
