"""The route ``/tokenize``, which returns the tokens of a text or of a conversation."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from vlpack.engine import Engine
from vlpack.server.answers import bytes_of
from vlpack.server.asking import Ask, make_prompt
from vlpack.server.errors import too_large, wrong
from vlpack.server.messages import read_messages
from vlpack.server.reading import Fields
from vlpack.server.settings import Settings
from vlpack.server.tools import read_tools


class TokenizeFields(Fields):
    """Fields of a request to ``/tokenize``."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] = Field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    min_pixels: int | None = None
    max_pixels: int | None = None
    return_token_strs: bool = False


def asked_for(fields: TokenizeFields, settings: Settings) -> Ask:
    """Checks a request of this route and returns its text or conversation.

    Raises:
        ApiError: the request has neither or both of prompt and messages, or they are invalid.
    """
    if (fields.prompt is None) == (fields.messages is None):
        raise wrong("Give either 'prompt' or 'messages'.", "prompt")
    if fields.prompt is not None:
        if len(fields.prompt) > settings.max_prompt:
            raise too_large(f"The prompt has more than {settings.max_prompt} characters.", "prompt")
        for name in ("tools", "chat_template_kwargs", "min_pixels", "max_pixels"):
            if name in fields.model_fields_set:
                raise wrong(f"{name!r} has no effect on a text.", name)
        return Ask(fields.prompt, {})
    ask = Ask(read_messages(fields.messages or [], settings), {}, tools=fields.tools)
    ask.variables, ask.min_pixels, ask.max_pixels = fields.chat_template_kwargs, fields.min_pixels, fields.max_pixels
    return ask


def tokenized(engine: Engine, ask: Ask, fields: TokenizeFields, settings: Settings) -> dict[str, Any]:
    """Computes the response of the route; blocks."""
    tools = read_tools(ask.tools, None, None, engine.prompts)
    prompt = make_prompt(engine, ask, tools, settings) if ask.conversation else None
    tokens = [] if prompt is None else [int(token) for token in prompt.input_ids[0]]
    answer: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": engine.context}
    if fields.return_token_strs:
        tokenizer = engine.prompts.tokenizer
        answer["token_strs"] = [bytes_of(token, tokenizer).decode("utf-8", "replace") for token in tokens]
    return answer
