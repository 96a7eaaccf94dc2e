"""Answers while they are generated: separates reasoning, text and tool calls, and counts tokens and probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from vlpack.engine import EngineAnswer, Handle, TokenLogprob
from vlpack.preprocess import Tokenizer
from vlpack.preprocess.chat_template import CLOSE
from vlpack.runtime.reasoning import ReasoningStream
from vlpack.server.asking import Asked
from vlpack.server.calls import Piece
from vlpack.server.errors import ApiError


@dataclass
class Call:
    """A tool call in an answer: name of the function, and its arguments as JSON text."""

    name: str
    arguments: str = ""


@dataclass
class Said:
    """The parts of an answer that have arrived so far, and how the answer ended.

    Attributes:
        text: text of the answer.
        reasoning: reasoning before the text; None if there is none.
        calls: tool calls in their order.
        answer: the engine's answer; None until it is finished.
        reason: OpenAI's finish_reason: ``stop``, ``length`` or ``tool_calls``.
    """

    text: str = ""
    reasoning: str | None = None
    calls: list[Call] = field(default_factory=list)
    answer: EngineAnswer | None = None
    reason: str = "stop"

    def add(self, piece: Piece) -> None:
        """Adds the next piece of the answer."""
        if piece.kind == "text":
            self.text += piece.text
        elif piece.kind == "reasoning":
            self.reasoning = (self.reasoning or "") + piece.text
        elif piece.kind == "call":
            self.calls.append(Call(piece.text))
        else:
            self.calls[-1].arguments += piece.text

    @property
    def over(self) -> EngineAnswer:
        """The engine's answer, which must be finished."""
        assert self.answer is not None, "it is over"
        return self.answer


async def follow(asked: Asked, handle: Handle, said: Said) -> AsyncIterator[Piece]:
    """Yields the pieces of an answer as they arrive and adds them to ``said``, in the end with the finish_reason.

    Raises:
        ApiError: the answer was interrupted, because the server is shutting down.
        VlpackError: the engine failed.
    """
    reasoning = ReasoningStream(asked.thinks)
    calls = asked.tools.stream() if asked.tools.offered else None
    newlines, begun, cut = "", False, False

    def parts(found: Sequence[tuple[bool, str]], *, last: bool = False) -> list[Piece]:
        nonlocal newlines, begun
        pieces: list[Piece] = []
        for thinking, piece in found:
            if thinking:  # line breaks at the beginning and end of the reasoning are dropped
                text = newlines + piece if said.reasoning or pieces else piece.lstrip("\n")
                kept = text.rstrip("\n")
                newlines = text[len(kept) :]
                if kept:
                    pieces.append(Piece("reasoning", kept))
                continue
            text = piece.lstrip("\n") if reasoning.reasoned and not begun else piece
            begun = begun or bool(text)
            if text:
                pieces += calls.push(text) if calls else [Piece("text", text)]
        if last and calls:
            pieces += calls.flush()
        return pieces

    async for text in handle:
        for piece in parts(reasoning.push(text)):
            if piece.kind == "call" and said.calls and not asked.tools.parallel:
                cut = True
                break
            said.add(piece)
            yield piece
        if cut or (calls and calls.calls and calls.between and not asked.tools.parallel):
            cut = True
            handle.cancel()
            break
    if not cut:
        for piece in parts(reasoning.flush(), last=True):
            said.add(piece)
            yield piece
    said.answer = await handle
    reason = said.answer.finish_reason
    if reason == "interrupted" and not cut:
        raise ApiError(503, "The answer was interrupted, because the server is shutting down.", code="unavailable")
    said.reason = "length" if reason == "length" else "tool_calls" if said.calls else "stop"


async def whole(asked: Asked) -> list[Said]:
    """Waits for all answers of a request and returns them."""

    async def one(handle: Handle) -> Said:
        said = Said()
        async for _ in follow(asked, handle, said):
            pass
        return said

    return list(await asyncio.gather(*map(one, asked.handles)))


async def together(asked: Asked) -> AsyncIterator[tuple[int, Said, Piece | None]]:
    """Yields the pieces of all answers as they arrive: index of the answer, its parts so far, and the new piece.

    None in place of a piece means that the answer is finished.
    """
    waiting: asyncio.Queue[tuple[int, Said, Piece | None] | Exception] = asyncio.Queue()

    async def one(index: int, handle: Handle) -> None:
        said = Said()
        try:
            async for piece in follow(asked, handle, said):
                waiting.put_nowait((index, said, piece))
            waiting.put_nowait((index, said, None))
        except Exception as error:
            waiting.put_nowait(error)

    tasks = [asyncio.create_task(one(index, handle)) for index, handle in enumerate(asked.handles)]
    try:
        left = len(tasks)
        while left:
            found = await waiting.get()
            if isinstance(found, Exception):
                raise found
            left -= found[2] is None
            yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def reasoning_tokens(said: Said, tokenizer: Tokenizer) -> int:
    """The number of tokens of an answer's reasoning, including the tag that ends it."""
    if said.reasoning is None:
        return 0
    tokens, close = said.over.tokens, tokenizer.token_id(CLOSE)
    return tokens.index(close) + 1 if close in tokens else len(tokens)


@cache
def _letters() -> dict[str, int]:
    """The characters with which byte-level tokenizers represent bytes, each with its byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def bytes_of(token: int, tokenizer: Tokenizer) -> bytes:
    """The UTF-8 bytes of a token; they may be only a part of a character."""
    text = tokenizer.token(token) or ""
    letters = _letters()
    if not tokenizer.is_added_token(token) and all(letter in letters for letter in text):
        return bytes(letters[letter] for letter in text)
    return tokenizer.decode([token], skip_special_tokens=False).encode()


def logprob(found: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """The log-probability of a token, and of its likeliest alternatives, in OpenAI's format."""

    def entry(token: int, value: float) -> dict[str, Any]:
        raw = bytes_of(token, tokenizer)
        # JSON has no infinity, so the log-probability of an impossible token is -9999
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(value, -9999.0), "bytes": list(raw)}

    top = [entry(token, value) for token, value in found.top]
    return {**entry(found.token, found.logprob), "top_logprobs": top}
