"""``/tokenize``: the tokens of a text or of a conversation."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from vlpack.engine import Engine
from vlpack.server.answers import bytes_of
from vlpack.server.asking import Ask, make_prompt, text_prompt
from vlpack.server.errors import too_large, wrong
from vlpack.server.messages import read_messages
from vlpack.server.reading import Fields
from vlpack.server.settings import Settings
from vlpack.server.tools import read_tools


class TokenizeFields(Fields):
    """What the route takes."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] = Field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    min_pixels: int | None = None
    max_pixels: int | None = None
    return_token_strs: bool = False


def tokenized(engine: Engine, fields: TokenizeFields, settings: Settings) -> dict[str, Any]:
    """The route's answer; blocks.

    Raises:
        ApiError: the request has neither or both of prompt and messages, or they are not usable.
    """
    if (fields.prompt is None) == (fields.messages is None):
        raise wrong("Give either 'prompt' or 'messages'.", "prompt")
    if fields.prompt is not None:
        if len(fields.prompt) > settings.max_prompt:
            raise too_large(f"The prompt has more than {settings.max_prompt} characters.", "prompt")
        ids = text_prompt(engine, fields.prompt).input_ids if fields.prompt else None
    else:
        tools = read_tools(fields.tools, None, None, engine.prompts)
        conversation = read_messages(fields.messages or [], settings)
        ask = Ask(conversation, {}, variables=fields.chat_template_kwargs)
        ask.min_pixels, ask.max_pixels = fields.min_pixels, fields.max_pixels
        ids = make_prompt(engine, ask, tools, settings).input_ids
    tokens = [] if ids is None else [int(token) for token in ids[0]]
    answer: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": engine.context}
    if fields.return_token_strs:
        tokenizer = engine.prompts.tokenizer
        answer["token_strs"] = [bytes_of(token, tokenizer).decode("utf-8", "replace") for token in tokens]
    return answer
