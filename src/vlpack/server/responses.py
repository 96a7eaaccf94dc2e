"""The route ``/v1/responses``, OpenAI's newer protocol, without the functions that store responses."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from vlpack.server.answers import Said, logprob, together
from vlpack.server.asking import Ask, Asked, Generation
from vlpack.server.calls import Piece
from vlpack.server.chat import schema_of, usage
from vlpack.server.errors import wrong
from vlpack.server.messages import read_messages
from vlpack.server.reading import Fields
from vlpack.server.response_items import chat_messages, chat_tool
from vlpack.server.settings import Settings


class TextForm(Fields):
    """The field ``text``: format and verbosity of the answer."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Fields):
    """The field ``reasoning``: how much the model reasons."""

    effort: Literal["none"] | None = None
    summary: None = None


class ResponseFields(Generation):
    """Fields of a request to ``/v1/responses``."""

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: TextForm | None = None
    reasoning: Reasoning | None = None
    tools: list[Any] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(default_factory=list)
    metadata: dict[str, str] = Field(default_factory=dict)
    truncation: Literal["disabled"] | None = None


def asked_for(fields: ResponseFields, settings: Settings, client: object) -> Ask:
    """Checks a request of this route and returns it in the form that `submit` accepts.

    Raises:
        ApiError: an item is invalid, or fields contradict each other.
    """
    wants = "message.output_text.logprobs" in fields.include
    if fields.top_logprobs is not None and not wants:
        raise wrong("'top_logprobs' has no effect without 'message.output_text.logprobs' in 'include'.", "top_logprobs")
    options = fields.choosing() | {"client": client}
    if wants:
        options["logprobs"] = fields.top_logprobs or 0
    if fields.max_output_tokens is not None:
        options["max_tokens"] = fields.max_output_tokens
    form = None if fields.text is None else fields.text.format
    return Ask(
        read_messages(chat_messages(fields.input, fields.instructions), settings),
        options,
        1,
        [chat_tool(tool, f"tools[{place}]") for place, tool in enumerate(fields.tools)],
        fields.tool_choice,
        fields.parallel_tool_calls,
        schema_of(form, "text.format", None),
        fields.chat_template_kwargs,
        fields.min_pixels,
        fields.max_pixels,
        fields.reasoning is not None and fields.reasoning.effort == "none",
    )


def _new(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


@dataclass
class _Item:
    """An item of the output, whose text grows while the answer is generated.

    Attributes:
        kind: ``text``, ``reasoning`` or ``call``.
        id: id of the item.
        text: text of the message or reasoning, or arguments of the tool call.
        name: name of the called function.
        call: id of the tool call.
        logprobs: log-probabilities of the message's tokens in OpenAI's format.
    """

    kind: str
    id: str
    text: str = ""
    name: str = ""
    call: str = ""
    logprobs: list[Any] = field(default_factory=list)

    def part(self) -> dict[str, Any]:
        """The item's text as a content part."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def json(self, status: str) -> dict[str, Any]:
        """The item in OpenAI's format."""
        if self.kind == "call":
            return {
                "id": self.id, "type": "function_call", "status": status,
                "call_id": self.call, "name": self.name, "arguments": self.text,
            }  # fmt: skip
        content = [] if status == "in_progress" else [self.part()]
        if self.kind == "reasoning":
            return {"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content}
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}


def _item(kind: str, name: str = "") -> _Item:
    prefix = {"text": "msg", "reasoning": "rs", "call": "fc"}[kind]
    return _Item(kind, _new(prefix), name=name, call=_new("call") if kind == "call" else "")


def _frame(model: str, fields: ResponseFields) -> dict[str, Any]:
    """A response in progress, without output: its ids and the parameters of the request."""
    form = fields.text.format if fields.text is not None and fields.text.format is not None else {"type": "text"}
    effort = None if fields.reasoning is None else fields.reasoning.effort
    return {
        "id": _new("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": fields.metadata,
        "model": model,
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "store": False,
        "temperature": fields.temperature,
        "text": {"format": form},
        "tool_choice": "auto" if fields.tool_choice is None else fields.tool_choice,
        "tools": fields.tools,
        "top_p": fields.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": fields.user,
    }


def _ended(frame: dict[str, Any], asked: Asked, said: Said, items: list[_Item]) -> dict[str, Any]:
    cut = said.reason == "length"
    spent = usage(asked, [said])
    output = [item.json("incomplete" if cut and item is items[-1] else "completed") for item in items]
    return {
        **frame,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": {
            "input_tokens": spent["prompt_tokens"],
            "input_tokens_details": spent["prompt_tokens_details"],
            "output_tokens": spent["completion_tokens"],
            "output_tokens_details": spent["completion_tokens_details"],
            "total_tokens": spent["total_tokens"],
        },
    }


def _with_logprobs(items: list[_Item], asked: Asked, said: Said) -> None:
    """Puts the log-probabilities of all tokens into the message item, if there is one."""
    found = said.over.logprobs
    message = next((item for item in items if item.kind == "text"), None)
    if found is None or message is None:
        return
    tokenizer = asked.engine.prompts.tokenizer
    if found and said.over.finish_reason == "stop" and not tokenizer.decode([found[-1].token]):
        found = found[:-1]
    message.logprobs = [logprob(one, tokenizer) for one in found]


def response(model: str, asked: Asked, said: list[Said], fields: ResponseFields) -> dict[str, Any]:
    """The complete response of the route."""
    (one,) = said
    items = []
    if one.reasoning is not None:
        items.append(_item("reasoning"))
        items[-1].text = one.reasoning
    if one.text or not one.calls:
        items.append(_item("text"))
        items[-1].text = one.text
    for call in one.calls:
        items.append(_item("call", call.name))
        items[-1].text = call.arguments
    _with_logprobs(items, asked, one)
    return _ended(_frame(model, fields), asked, one, items)


Event = tuple[str, dict[str, Any]]


class _Events:
    """Makes the numbered events of a response, and keeps the items that they have announced."""

    def __init__(self) -> None:
        self.items: list[_Item] = []
        self._number = -1
        self._open: _Item | None = None

    def event(self, name: str, /, **more: Any) -> Event:
        """An event with this name and the next sequence number."""
        self._number += 1
        return name, {"type": name, "sequence_number": self._number, **more}

    def piece(self, piece: Piece) -> Iterator[Event]:
        """Yields the events for a new piece of the answer."""
        kind = "call" if piece.kind in ("call", "arguments") else piece.kind
        if self._open is None or self._open.kind != kind or piece.kind == "call":
            yield from self.close()
            yield from self.begin(kind, piece.text if kind == "call" else "")
        if piece.kind == "call" or self._open is None:
            return
        self._open.text += piece.text
        place = self._place(self._open)
        if kind == "call":
            yield self.event("response.function_call_arguments.delta", **place, delta=piece.text)
        elif kind == "reasoning":
            yield self.event("response.reasoning_text.delta", **place, content_index=0, delta=piece.text)
        else:
            content = {**place, "content_index": 0, "delta": piece.text, "logprobs": []}
            yield self.event("response.output_text.delta", **content)

    def begin(self, kind: str, name: str = "") -> Iterator[Event]:
        """Yields the events that announce a new item."""
        self._open = item = _item(kind, name)
        self.items.append(item)
        index = len(self.items) - 1
        yield self.event("response.output_item.added", output_index=index, item=item.json("in_progress"))
        if kind == "text":
            yield self.event("response.content_part.added", **self._place(item), content_index=0, part=item.part())

    def close(self, status: str = "completed") -> Iterator[Event]:
        """Yields the events that complete the last item."""
        item, self._open = self._open, None
        if item is None:
            return
        place = self._place(item)
        if item.kind == "call":
            yield self.event("response.function_call_arguments.done", **place, name=item.name, arguments=item.text)
        elif item.kind == "reasoning":
            yield self.event("response.reasoning_text.done", **place, content_index=0, text=item.text)
        else:
            place["content_index"] = 0
            yield self.event("response.output_text.done", **place, text=item.text, logprobs=item.logprobs)
            yield self.event("response.content_part.done", **place, part=item.part())
        index = self.items.index(item)
        yield self.event("response.output_item.done", output_index=index, item=item.json(status))

    def _place(self, item: _Item) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": self.items.index(item)}


async def events(model: str, asked: Asked, fields: ResponseFields) -> AsyncIterator[Event]:
    """Yields the response of the route as named events."""
    frame, made = _frame(model, fields), _Events()
    yield made.event("response.created", response=frame)
    yield made.event("response.in_progress", response=frame)
    async for _, said, piece in together(asked):
        if piece is not None:
            for event in made.piece(piece):
                yield event
            continue
        if not made.items:  # an empty answer is a message with an empty text
            for event in made.begin("text"):
                yield event
        _with_logprobs(made.items, asked, said)
        cut = said.reason == "length"
        for event in made.close("incomplete" if cut else "completed"):
            yield event
        name = "response.incomplete" if cut else "response.completed"
        yield made.event(name, response=_ended(frame, asked, said, made.items))
