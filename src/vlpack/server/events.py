"""Streamed responses as server-sent events, and the detection of clients that have disconnected."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import Request
from starlette.types import Receive, Scope, Send

from vlpack.errors import VlpackError
from vlpack.server.errors import ApiError, failed, told

log = logging.getLogger("vlpack.server")

SEND_SECONDS = 60.0
"""Seconds after which a client that reads nothing of a stream is disconnected."""

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client has closed the connection."""


async def _until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Runs ``work`` and returns its result; cancels it if the client disconnects. The body must have been read.

    Raises:
        ClientGoneError: the client disconnected.
    """
    working = asyncio.create_task(work)
    listening = asyncio.create_task(_until_gone(request.receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        await _ended(working, listening)


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream:
    """A response of server-sent events, as an ASGI application.

    Args:
        events: the events, each as `encoded` takes it.
        kept: resources of the response, which are closed when it ends for any reason.
    """

    def __init__(self, events: AsyncIterator[Any], kept: AsyncExitStack) -> None:
        self._events, self._kept = events, kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all events to the client."""
        sending = asyncio.create_task(self._send(send))
        listening = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({sending, listening}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _ended(sending, listening)
            await self._kept.aclose()

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        headers += [(b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        loop, task, late = asyncio.get_running_loop(), asyncio.current_task(), False

        def expire() -> None:
            nonlocal late
            late = True
            assert task is not None, "a coroutine runs in a task"
            task.cancel()

        async def write(data: bytes, more: bool = True) -> None:
            # not asyncio.wait_for, which in Python 3.11 swallows a cancellation that comes when the data has been sent
            limit = loop.call_later(SEND_SECONDS, expire)
            try:
                await send({"type": "http.response.body", "body": data, "more_body": more})
            finally:
                limit.cancel()

        try:
            async for event in self._events:
                await write(encoded(event))
        except asyncio.CancelledError:
            if late:
                return  # the client does not read, so an error could not be sent either
            raise
        except Exception as error:
            await write(encoded(as_api_error(error).body))
        await write(b"", more=False)


def encoded(event: Any) -> bytes:
    """The bytes of an event: ``event`` is its data as text or JSON, or a pair of its name and its JSON."""
    name = b""
    if isinstance(event, tuple):
        name, event = f"event: {event[0]}\n".encode(), event[1]
    text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return name + b"data: " + text.encode("utf-8", "replace") + b"\n\n"


def as_api_error(error: Exception) -> ApiError:
    """The error response for any exception; unexpected ones are logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, VlpackError):
        answer = told(error)
        if answer.status >= 500:
            log.error("%s", error)
        return answer
    log.error("a request failed", exc_info=error)
    return failed()
