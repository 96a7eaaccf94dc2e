"""The route ``/v1/chat/completions``: its fields, responses and events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import Field

from vlpack.preprocess import Tokenizer
from vlpack.server.answers import Said, logprob, reasoning_tokens, together
from vlpack.server.asking import Ask, Asked, Generation, StreamOptions
from vlpack.server.errors import wrong
from vlpack.server.messages import read_messages
from vlpack.server.settings import Settings


class ChatFields(Generation):
    """Fields of a request to ``/v1/chat/completions``."""

    messages: list[Any]
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: list[Any] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None


def asked_for(fields: ChatFields, settings: Settings, client: object) -> Ask:
    """Checks a request of this route and returns it in the form that `submit` accepts.

    Raises:
        ApiError: fields contradict each other, or a message is invalid.
    """
    if fields.top_logprobs is not None and not fields.logprobs:
        raise wrong("'top_logprobs' has no effect without 'logprobs': true.", "top_logprobs")
    if fields.stream_options is not None and not fields.stream:
        raise wrong("'stream_options' has no effect without 'stream': true.", "stream_options")
    options = fields.choosing() | {"stop": fields.stop, "client": client}
    if fields.logprobs:
        options["logprobs"] = fields.top_logprobs or 0
    limits = {"max_tokens": fields.max_tokens, "max_completion_tokens": fields.max_completion_tokens}
    most = {name: value for name, value in limits.items() if value is not None}
    if len(set(most.values())) > 1:
        raise wrong("'max_tokens' and 'max_completion_tokens' say different things.", "max_tokens")
    for name, value in most.items():
        if value < 1:
            raise wrong(f"{name!r} is {value}; it must be at least 1.", name)
        options["max_tokens"] = value
    return Ask(
        read_messages(fields.messages, settings),
        options,
        fields.n,
        fields.tools,
        fields.tool_choice,
        fields.parallel_tool_calls,
        schema_of(fields.response_format, "response_format", "json_schema"),
        fields.chat_template_kwargs,
        fields.min_pixels,
        fields.max_pixels,
        fields.reasoning_effort == "none",
    )


def schema_of(form: dict[str, Any] | None, name: str, inner: str | None) -> dict[str, Any] | bool | None:
    """The JSON schema that a response format requires, or True for any JSON; None for free text.

    Args:
        form: response format, ``{"type": "text" | "json_object" | "json_schema", …}``.
        name: name of the field, for error messages.
        inner: key of the object that contains the schema; None if ``form`` itself contains it.
    """
    kind = "text" if form is None else form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema" or form is None:
        raise wrong(f"'{name}' has the type {kind!r}; it must be text, json_object or json_schema.", name)
    holder = form if inner is None else form.get(inner)
    schema = holder.get("schema") if isinstance(holder, dict) else None
    if not isinstance(schema, (dict, bool)):
        raise wrong(f"'{name}' has no JSON schema.", name)
    return schema


def usage(asked: Asked, said: list[Said]) -> dict[str, Any]:
    """The token counts of a request and its answers, in OpenAI's format."""
    tokenizer = asked.engine.prompts.tokenizer
    prompt, new = said[0].over.stats.prompt_tokens, sum(one.over.stats.new_tokens for one in said)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": min(one.over.stats.reused_tokens for one in said)},
        "completion_tokens_details": {"reasoning_tokens": sum(reasoning_tokens(one, tokenizer) for one in said)},
    }


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def call_id() -> str:
    """A new random id for a tool call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def completion(model: str, asked: Asked, said: list[Said]) -> dict[str, Any]:
    """The response of the route, with all answers."""
    tokenizer = asked.engine.prompts.tokenizer
    choices = []
    for index, one in enumerate(said):
        message: dict[str, Any] = {"role": "assistant", "content": one.text or None if one.calls else one.text}
        message["refusal"] = None
        if one.reasoning is not None:
            message["reasoning_content"] = one.reasoning
        if one.calls:
            message["tool_calls"] = [
                {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in one.calls
            ]
        found = None
        if one.over.logprobs is not None:
            found = _logprobs(one, asked, tokenizer, 0)
        choices.append({"index": index, "message": message, "logprobs": found, "finish_reason": one.reason})
    return {**_head("chat.completion", model), "choices": choices, "usage": usage(asked, said)}


def _logprobs(said: Said, asked: Asked, tokenizer: Tokenizer, first: int) -> dict[str, Any]:
    """The log-probabilities of an answer's tokens from index ``first`` on, without an end token."""
    found = said.over.logprobs or []
    if found and said.over.finish_reason == "stop" and not tokenizer.decode([found[-1].token]):
        found = found[:-1]
    return {"content": [logprob(one, tokenizer) for one in found[first:]], "refusal": None}


async def chunks(model: str, asked: Asked, fields: ChatFields) -> AsyncIterator[Any]:
    """Yields the response of the route as the data of events."""
    head, tokenizer = _head("chat.completion.chunk", model), asked.engine.prompts.tokenizer
    counted = fields.stream_options is not None and fields.stream_options.include_usage
    finished: dict[int, Said] = {}
    told = [0] * len(asked.handles)  # tokens whose probabilities were sent

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, found: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}
        return {**head, "choices": [choice], **({"usage": None} if counted else {})}

    for index in range(len(asked.handles)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, said, piece in together(asked):
        if piece is None:
            finished[index] = said
            found = _logprobs(said, asked, tokenizer, told[index]) if fields.logprobs else None
            yield chunk(index, {}, said.reason, found if found and found["content"] else None)
            continue
        place = len(said.calls) - 1
        if piece.kind == "call":
            function = {"name": piece.text, "arguments": ""}
            delta: dict[str, Any] = {
                "tool_calls": [{"index": place, "id": call_id(), "type": "function", "function": function}]
            }
        elif piece.kind == "arguments":
            delta = {"tool_calls": [{"index": place, "function": {"arguments": piece.text}}]}
        else:
            delta = {"reasoning_content" if piece.kind == "reasoning" else "content": piece.text}
        found = None
        if fields.logprobs:
            # the last one may belong to an end token, so it is sent only when the answer has finished
            new = asked.handles[index].logprobs[told[index] : -1]
            told[index] += len(new)
            found = {"content": [logprob(one, tokenizer) for one in new], "refusal": None} if new else None
        yield chunk(index, delta, None, found)
    if counted:
        yield {**head, "choices": [], "usage": usage(asked, [finished[index] for index in sorted(finished)])}
    yield "[DONE]"
