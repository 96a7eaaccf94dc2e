"""Requests that generate, in the engine's terms: from fields and messages to handles that answers come through."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
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

_OFF = 2**31 - 1  # the k of top_k that limits nothing
_OURS = frozenset(inspect.signature(PromptBuilder.__call__).parameters)
"""Names that are no variables of a chat template for a request to choose, because prompts have them otherwise."""

WORKERS = 4
"""Requests whose images and texts are made tensors at a time. Others wait, so that their memory is bounded."""

Result = TypeVar("Result")


class Generation(Fields):
    """What all routes that generate take."""

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
    prompt_cache_key: str | None = None  # beginnings of prompts are reused in any case
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    def choosing(self) -> dict[str, Any]:
        """How tokens are chosen, as options of `vlpack.Engine.submit`."""
        top_k = _OFF if self.top_k in (0, -1) else self.top_k
        options = {"top_p": self.top_p, "top_k": top_k, "min_p": self.min_p}
        if self.temperature == 0:  # the likeliest token is among any so likely ones
            options = {}
        names = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
        return options | {name: getattr(self, name) for name in names}

    @property
    def asker(self) -> str | None:
        """Whoever asks, as far as the request says it."""
        return self.safety_identifier or self.user


class StreamOptions(Fields):
    """How an answer is streamed."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


@dataclass
class Ask:
    """A request that generates.

    Args:
        conversation: what is asked; or a text that is continued as it is.
        options: of `vlpack.Engine.submit_n`.
        n: how many answers.
        tools: in OpenAI's form, not checked yet.
        tool_choice: see `read_tools`.
        parallel: whether an answer may have several calls.
        schema: the answer is JSON that it describes; None where it is free.
        variables: of the chat template.
        min_pixels: smallest image area.
        max_pixels: largest image area.
        silent: whether the model must not think.
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
        """Whether something has yet to be fetched."""
        asked = self.conversation
        return not isinstance(asked, str) and (any(map(is_remote, asked.images)) or any(map(is_remote, asked.videos)))

    def fetch(self, settings: Settings) -> None:
        """Fetches what has URLs; blocks."""
        assert not isinstance(self.conversation, str), "a text has no URLs"
        fetched = Downloads(settings)
        self.conversation.images[:] = map(fetched, self.conversation.images)
        self.conversation.videos[:] = map(fetched, self.conversation.videos)


@dataclass
class Asked:
    """Answers on their way.

    Attributes:
        engine: that makes them.
        handles: one for each.
        tools: that they may call.
        thinks: whether they begin inside the model's reasoning.
        submitted: when they were, by `time.perf_counter`.
    """

    engine: Engine
    handles: list[Handle]
    tools: Tools
    thinks: bool
    submitted: float = field(default_factory=time.perf_counter)

    def cancel(self) -> None:
        """Free the slots."""
        for handle in self.handles:
            handle.cancel()


def make_prompt(engine: Engine, ask: Ask, tools: Tools, settings: Settings) -> Prompt:
    """The prompt of a request; blocks. All of its texts are plain texts: none becomes a control token."""
    if isinstance(ask.conversation, str):
        return text_prompt(engine, ask.conversation)
    for name in ask.variables:
        if name in _OURS:
            raise wrong(f"'chat_template_kwargs' may not have {name!r}.", "chat_template_kwargs")
        if name not in engine.prompts.chat_template.source:
            raise wrong(f"The package's chat template has no variable {name!r}.", "chat_template_kwargs")
    variables = dict(ask.variables)
    # what must be JSON from the first token on is no thought
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
    """A text as a prompt by itself, without a chat template and without control tokens."""
    ids = engine.prompts.tokenizer.encode(literal_pieces(engine.prompts.tokenizer, text))
    if not ids:
        raise wrong("'prompt' is empty.", "prompt")
    return Prompt(np.array([ids], np.int32), np.zeros(0, np.int64), None, None, text)


def submit(engine: Engine, ask: Ask, settings: Settings) -> Asked:
    """Puts a request into the engine's queue; blocks while its images are read.

    Raises:
        ApiError: something about it is wrong.
        VlpackError: the same, told by the engine.
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
    """What the answer must be like, as options of the engine."""
    rules = tools.grammar(engine.prompts)
    if ask.schema is not None and not tools.forced:
        if not tools.offered and not thinks and not ask.options.get("stop"):
            return {"schema": ask.schema}
        compact = {"x-guidance": {"whitespace_flexible": False}}
        schema = {**compact, **ask.schema} if isinstance(ask.schema, Mapping) else ask.schema
        json_rules = {"json": f"%json {json.dumps(schema)}", "start": "json"}
        if tools.offered:  # either calls, or the answer in its form
            forced = Tools(tools.tools, "required", tools.parallel).grammar(engine.prompts) or {}
            json_rules = {**forced, **json_rules, "start": f"json | {forced['start']}"}
        rules = json_rules
    return {} if rules is None else {"lark": lark(rules, engine.prompts, thinks=thinks)}


class Preparing:
    """Threads for what blocks, a few at a time."""

    def __init__(self, workers: int = WORKERS) -> None:
        self._pool = ThreadPoolExecutor(workers, "vlpack-server")

    async def run(self, work: Callable[[], Result], undo: Callable[[Result], object] | None = None) -> Result:
        """Runs a function that blocks.

        Args:
            work: the function.
            undo: takes its result where nobody waits for it any more.
        """
        future = self._pool.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:

            def forget(done: Future[Result]) -> None:
                if not done.cancelled() and done.exception() is None and undo is not None:
                    undo(done.result())

            future.add_done_callback(forget)  # in its thread, which cannot be interrupted
            raise

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
