"""Requests that generate text: turns their fields and messages into prompts and submits them to the engine."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from vlpack.engine import Engine, Handle
from vlpack.preprocess import Prompt, PromptBuilder
from vlpack.preprocess.literal import literal_pieces
from vlpack.runtime.reasoning import opens_reasoning
from vlpack.server.errors import wrong
from vlpack.server.media import Downloads, Media, is_remote
from vlpack.server.messages import Conversation
from vlpack.server.reading import Fields
from vlpack.server.settings import Settings
from vlpack.server.tools import Tools, lark, read_tools

_OFF = 2**31 - 1  # a top_k that excludes no token
_OURS = frozenset(inspect.signature(PromptBuilder.__call__).parameters)
"""Variables of chat templates that a request may not set, because they are set from other fields."""

WORKERS = 4
"""Number of requests whose images and texts are preprocessed at a time; others wait, which bounds the memory."""

Result = TypeVar("Result")


class Generation(Fields):
    """Fields of a request that all routes which generate text share."""

    model: str | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # has no effect, because prefixes of prompts are always reused
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    def choosing(self) -> dict[str, Any]:
        """The sampling parameters as options of `vlpack.Engine.submit`."""
        top_k = _OFF if self.top_k in (0, -1) else self.top_k
        options = {"top_p": self.top_p, "top_k": top_k, "min_p": self.min_p}
        if self.temperature == 0:  # the likeliest token passes each of these limits
            options = {}
        names = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
        return options | {name: getattr(self, name) for name in names}

    @property
    def asker(self) -> str | None:
        """The user whom the request names; None if it names none."""
        return self.safety_identifier or self.user


class StreamOptions(Fields):
    """Options of a streamed response."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


@dataclass
class Ask:
    """A request for generated text, before its prompt is made and its tools are checked.

    Args:
        conversation: messages of the request, or a text that is continued without a chat template.
        options: options of `vlpack.Engine.submit_n`.
        n: number of answers.
        tools: tools in OpenAI's format.
        tool_choice: the request's ``tool_choice``, which `read_tools` checks.
        parallel: whether an answer may contain several tool calls; None for the default.
        schema: JSON schema that the answer matches, or True for any JSON; None for free text.
        variables: variables of the chat template.
        min_pixels: smallest area of an image in pixels; None for the package's.
        max_pixels: largest area of an image in pixels; None for the package's.
        silent: whether the model must answer without reasoning.
    """

    conversation: Conversation | str
    options: dict[str, Any]
    n: int = 1
    tools: list[Any] = field(default_factory=list)
    tool_choice: Any = None
    parallel: bool | None = None
    schema: Mapping[str, Any] | bool | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    min_pixels: int | None = None
    max_pixels: int | None = None
    silent: bool = False

    @property
    def remote(self) -> bool:
        """Whether the request has images or videos that must be downloaded first."""
        asked = self.conversation
        return not isinstance(asked, str) and (any(map(is_remote, asked.images)) or any(map(is_remote, asked.videos)))

    def fetch(self, settings: Settings) -> None:
        """Downloads the images and videos that are given as URLs; blocks."""
        assert not isinstance(self.conversation, str), "a text has no URLs"
        fetched = Downloads(settings)
        self.conversation.images[:] = map(fetched, self.conversation.images)
        self.conversation.videos[:] = map(fetched, self.conversation.videos)


@dataclass
class Asked:
    """A request that was submitted to the engine.

    Attributes:
        engine: engine that generates the answers.
        handles: handle of each answer.
        tools: tools that the answers may call.
        thinks: whether the prompt ends inside the model's reasoning, so that the answers begin with it.
        submitted: time of submission by `time.perf_counter`, in seconds.
    """

    engine: Engine
    handles: list[Handle]
    tools: Tools
    thinks: bool
    submitted: float = field(default_factory=time.perf_counter)

    def cancel(self) -> None:
        """Cancels all answers, which frees their slots."""
        for handle in self.handles:
            handle.cancel()


def make_prompt(engine: Engine, ask: Ask, tools: Tools, settings: Settings) -> Prompt:
    """Makes the prompt of a request; blocks. Special tokens in its texts stay plain text."""
    if isinstance(ask.conversation, str):
        return text_prompt(engine, ask.conversation)
    for name in ask.variables:
        if name in _OURS:
            raise wrong(f"'chat_template_kwargs' may not have {name!r}.", "chat_template_kwargs")
        if name not in engine.prompts.chat_template.source:
            raise wrong(f"The package's chat template has no variable {name!r}.", "chat_template_kwargs")
    variables = dict(ask.variables)
    # an answer that must be JSON from its first token on leaves no place for reasoning
    silent = ask.silent or tools.forced or ask.schema is not None
    if silent and "enable_thinking" in engine.prompts.chat_template.source:
        variables.setdefault("enable_thinking", False)
    media = Media(engine.prompts, settings, ask.min_pixels, ask.max_pixels)
    return engine.prompt(
        ask.conversation.messages,
        [media.image(part) for part in ask.conversation.images],  # type: ignore[misc]
        [media.video(part) for part in ask.conversation.videos],  # type: ignore[misc]
        tools=tools.offered,
        special_tokens="text",
        **variables,
    )


def text_prompt(engine: Engine, text: str) -> Prompt:
    """Makes a prompt of a text alone, without a chat template; special tokens in it stay plain text."""
    ids = engine.prompts.tokenizer.encode(literal_pieces(engine.prompts.tokenizer, text))
    if not ids:
        raise wrong("'prompt' is empty.", "prompt")
    return Prompt(np.array([ids], np.int32), np.zeros(0, np.int64), None, None, text)


def submit(engine: Engine, ask: Ask, settings: Settings) -> Asked:
    """Makes the prompt of a request and submits it to the engine; blocks while images are decoded.

    Raises:
        ApiError: a field or message is invalid.
        VlpackError: the engine refuses the request.
    """
    if ask.n > settings.queue:
        raise wrong(f"'n' is {ask.n}; this server makes {settings.queue} answers at most.", "n")
    tools = read_tools(ask.tools, ask.tool_choice, ask.parallel, engine.prompts)
    prompt = make_prompt(engine, ask, tools, settings)
    thinks = not isinstance(ask.conversation, str) and opens_reasoning(prompt.text)
    if thinks and ask.silent:
        raise wrong("The model always thinks, so it cannot be asked not to.", "reasoning_effort")
    options = ask.options | _constraint(engine, ask, tools, thinks)
    options.setdefault("max_tokens", engine.context)
    return Asked(engine, engine.submit_n(ask.n, prompt, **options), tools, thinks)


def _constraint(engine: Engine, ask: Ask, tools: Tools, thinks: bool) -> dict[str, Any]:
    """The constraint on the answer, as options of `vlpack.Engine.submit_n`; empty if it is free."""
    rules = tools.grammar(engine.prompts)
    if ask.schema is not None and not tools.forced:
        if not tools.offered and not thinks and not ask.options.get("stop"):
            return {"schema": ask.schema}
        compact = {"x-guidance": {"whitespace_flexible": False}}
        schema = {**compact, **ask.schema} if isinstance(ask.schema, Mapping) else ask.schema
        json_rules = {"json": f"%json {json.dumps(schema)}", "start": "json"}
        if tools.offered:  # either tool calls, or text that matches the schema
            forced = replace(tools, choice="required").grammar(engine.prompts) or {}
            json_rules = {**forced, **json_rules, "start": f"json | {forced['start']}"}
        rules = json_rules
    return {} if rules is None else {"lark": lark(rules, engine.prompts, thinks=thinks)}


class Preparing:
    """A small pool of threads for blocking work.

    Args:
        workers: number of threads.
    """

    def __init__(self, workers: int = WORKERS) -> None:
        self._pool = ThreadPoolExecutor(workers, "vlpack-server")

    async def run(self, work: Callable[[], Result], undo: Callable[[Result], object] | None = None) -> Result:
        """Runs a blocking function in one of the threads and returns its result.

        Args:
            work: function to run.
            undo: function that receives the result if the caller was cancelled in the meantime.
        """
        future = self._pool.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:

            def forget(done: Future[Result]) -> None:
                if not done.cancelled() and done.exception() is None and undo is not None:
                    undo(done.result())

            future.add_done_callback(forget)  # called in the worker thread, which cannot be interrupted
            raise

    def close(self) -> None:
        """Ends the threads after their current work."""
        self._pool.shutdown(wait=False, cancel_futures=True)
