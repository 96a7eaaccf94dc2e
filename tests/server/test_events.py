"""Streams of events whose client leaves at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from vlpack.server.events import EventStream


@pytest.mark.parametrize("later", range(-4, 5))
def test_a_stream_ends_when_its_client_leaves(later: int) -> None:
    """The client leaves a few turns of the event loop before or after an event has been sent."""

    async def run() -> bool:
        gone, sent = asyncio.Event(), asyncio.Event()
        closed: list[bool] = []

        async def events() -> AsyncIterator[str]:
            while True:
                yield "event"
                await asyncio.sleep(0)

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                await sent.wait()

        kept = AsyncExitStack()
        kept.callback(lambda: closed.append(True))
        stream = asyncio.create_task(EventStream(events(), kept)({}, receive, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        for happens in (gone, sent) if later < 0 else (sent, gone):
            happens.set()
            for _ in range(abs(later)):
                await asyncio.sleep(0)
        await asyncio.wait([stream], timeout=2)
        ended = stream.done()
        stream.cancel()
        return ended and closed == [True]

    assert asyncio.run(asyncio.wait_for(run(), 10))
