"""The route ``/v1/completions``, which continues a text without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from itertools import accumulate
from typing import Any, Literal

from pydantic import Field

from vlpack.server.answers import Said, bytes_of, together
from vlpack.server.asking import Ask, Asked, Generation, StreamOptions
from vlpack.server.chat import usage
from vlpack.server.errors import too_large, wrong
from vlpack.server.settings import Settings


class CompletionFields(Generation):
    """Fields of a request to ``/v1/completions``."""

    prompt: str | list[str]
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1)
    max_tokens: int = Field(default=16, ge=1)
    stop: str | list[str] = Field(default_factory=list)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] | None = None


def asked_for(fields: CompletionFields, settings: Settings, client: object) -> Ask:
    """Checks a request of this route and returns it in the form that `submit` accepts.

    Raises:
        ApiError: there are several prompts, the prompt is too long, or fields contradict each other.
    """
    prompts = [fields.prompt] if isinstance(fields.prompt, str) else fields.prompt
    if len(prompts) != 1:
        raise wrong("'prompt' must be one text; send several requests for several.", "prompt")
    for name in ("min_pixels", "max_pixels", "chat_template_kwargs"):
        if name in fields.model_fields_set:
            raise wrong(f"{name!r} has no effect on a text.", name)
    if fields.stream_options is not None and not fields.stream:
        raise wrong("'stream_options' has no effect without 'stream': true.", "stream_options")
    if len(prompts[0]) > settings.max_prompt:
        raise too_large(
            f"The prompt has {len(prompts[0])} characters; this server takes {settings.max_prompt} at most.", "prompt"
        )
    options = fields.choosing() | {"stop": fields.stop, "client": client, "max_tokens": fields.max_tokens}
    return Ask(prompts[0], options | {"logprobs": fields.logprobs}, fields.n)


def _head(model: str) -> dict[str, Any]:
    return {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}


def completion(model: str, asked: Asked, said: list[Said], fields: CompletionFields) -> dict[str, Any]:
    """The response of the route, with all answers."""
    choices = [
        {"index": index, "text": one.over.text, "logprobs": _logprobs(one, asked), "finish_reason": one.reason}
        for index, one in enumerate(said)
    ]
    return {**_head(model), "choices": choices, "usage": usage(asked, said)}


def _logprobs(said: Said, asked: Asked) -> dict[str, Any] | None:
    if said.over.logprobs is None:
        return None
    tokenizer = asked.engine.prompts.tokenizer

    def text(token: int) -> str:
        return bytes_of(token, tokenizer).decode("utf-8", "replace")

    found = said.over.logprobs
    words = [text(one.token) for one in found]
    return {
        "tokens": words,
        "token_logprobs": [max(one.logprob, -9999.0) for one in found],
        "top_logprobs": [{text(token): max(value, -9999.0) for token, value in one.top} for one in found],
        "text_offset": [0, *accumulate(map(len, words))][:-1],
    }


async def chunks(model: str, asked: Asked, fields: CompletionFields) -> AsyncIterator[Any]:
    """Yields the response as the data of events; log-probabilities are part of an answer's last event."""
    head = _head(model)
    counted = fields.stream_options is not None and fields.stream_options.include_usage
    more: dict[str, Any] = {"usage": None} if counted else {}
    finished: dict[int, Said] = {}
    async for index, said, piece in together(asked):
        choice: dict[str, Any] = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
        if piece is None:
            finished[index] = said
            choice |= {"logprobs": _logprobs(said, asked), "finish_reason": said.reason}
        else:
            choice["text"] = piece.text
        yield {**head, "choices": [choice], **more}
    if counted:
        yield {**head, "choices": [], "usage": usage(asked, [finished[index] for index in sorted(finished)])}
    yield "[DONE]"
