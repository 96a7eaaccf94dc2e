"""The server as an ASGI application."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from vlpack.server import chat, completions, pages, responses, retrieval, tokens
from vlpack.server.answers import Said, whole
from vlpack.server.asking import Ask, Asked, Generation, Preparing, submit
from vlpack.server.errors import ApiError
from vlpack.server.events import ClientGoneError, EventStream, as_api_error, while_connected
from vlpack.server.guard import Guard
from vlpack.server.metrics import Metrics
from vlpack.server.models import Models, Served
from vlpack.server.reading import Body, read
from vlpack.server.settings import Settings
from vlpack.tasks import EMBEDDING, GENERATE, RERANKER

BESIDE = 64
"""Number of POST requests accepted beyond those with a slot or in a queue, because their bodies are read first."""


class Server:
    """The server: packages behind the routes of OpenAI's protocol.

    Args:
        packages: name → folder of each package.
        settings: settings of the server.

    Attributes:
        app: the ASGI application.
        models: packages that the server has.
        guard: outermost layer of the application, which checks every request first.

    Raises:
        PackageError: a folder is not a complete package.
    """

    def __init__(self, packages: Mapping[str, Path], settings: Settings) -> None:
        self.settings = settings
        self.models = Models(packages, settings)
        self.metrics = Metrics(self.models)
        self._preparing = Preparing()
        self._fetching = Preparing(16)  # separate, so that slow downloads do not delay requests without URLs
        self._encoding = Preparing(1)  # embedding models and rerankers take one call at a time
        # no pages of FastAPI's own: they load scripts from other servers
        app = FastAPI(title="vlpack", openapi_url=None, docs_url=None, redoc_url=None, lifespan=self._life)
        for path, answer in (
            ("/v1/chat/completions", self._chat),
            ("/v1/completions", self._complete),
            ("/v1/responses", self._respond),
            ("/v1/embeddings", self._embed),
            ("/v1/rerank", self._rerank),
            ("/rerank", self._rerank),
            ("/tokenize", self._tokenize),
            ("/pdf", self._pdf),
        ):
            app.add_api_route(path, self._told(answer), methods=["POST"], response_model=None)
        for path, show in (
            ("/v1/models", self._list),
            ("/v1/models/{name:path}", self._show),
            ("/health", self._health),
            ("/ready", self._ready),
            ("/metrics", self._metrics),
            ("/", pages.index),
            ("/page/{name}", pages.file),
            ("/favicon.ico", pages.icon),
        ):
            app.add_api_route(path, self._told(show), methods=["GET"], response_model=None)
        app.add_exception_handler(HTTPException, _http_error)
        most = len(packages) * (settings.slots + settings.queue) + BESIDE
        self.guard = Guard(app, settings, most)
        self.app: ASGIApp = self.guard

    @asynccontextmanager
    async def _life(self, _: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            self._preparing.close()
            self._encoding.close()
            self._fetching.close()
            await self.models.close()

    def _told(self, answer: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
        """A route that returns errors in OpenAI's format and counts its responses."""

        async def route(request: Request) -> Any:
            path = request.scope["route"].path
            try:
                response = await answer(request)
            except (ClientGoneError, ClientDisconnect):
                response = Response(status_code=499)  # only for the metrics, because the client is gone
            except Exception as error:
                response = as_api_error(error).response()
            self.metrics.answered(path, response.status_code if isinstance(response, Response) else 200)
            return response

        return route

    async def _fields(self, request: Request, kind: type[Body]) -> Body:
        return await read(request, kind, self.settings)

    async def _generate(
        self,
        request: Request,
        fields: Generation,
        ask: Callable[[], Ask],
        answer: Callable[[str, Asked, list[Said]], Any],
        events: Callable[[str, Asked], AsyncIterator[Any]],
    ) -> Any:
        """Responds to a request that generates text, with one JSON object or with a stream of events."""
        served = self.models.named(fields.model, GENERATE)
        kept = AsyncExitStack()
        began = time.perf_counter()

        async def begin() -> Asked:
            await kept.enter_async_context(self.models.use(served))
            wanted = ask()
            if wanted.remote:
                await self._fetching.run(lambda: wanted.fetch(self.settings))
            asked = await self._preparing.run(
                lambda: submit(served.chats, wanted, self.settings), undo=lambda done: done.cancel()
            )
            kept.callback(asked.cancel)
            kept.callback(self.metrics.generated, served, asked, began)
            return asked

        async def all_of_it() -> Any:
            asked = await begin()
            return answer(served.name, asked, await whole(asked))

        try:
            if not fields.stream:
                return JSONResponse(await while_connected(request, all_of_it()))
            asked = await while_connected(request, begin())
            stream = EventStream(events(served.name, asked), kept)
            kept = AsyncExitStack()  # the stream closes it
            return _Streamed(stream)
        finally:
            await kept.aclose()

    async def _chat(self, request: Request) -> Any:
        fields = await self._fields(request, chat.ChatFields)
        client = _client(request, fields)
        return await self._generate(
            request,
            fields,
            lambda: chat.asked_for(fields, self.settings, client),
            chat.completion,
            lambda model, asked: chat.chunks(model, asked, fields),
        )

    async def _complete(self, request: Request) -> Any:
        fields = await self._fields(request, completions.CompletionFields)
        client = _client(request, fields)
        return await self._generate(
            request,
            fields,
            lambda: completions.asked_for(fields, self.settings, client),
            lambda model, asked, said: completions.completion(model, asked, said, fields),
            lambda model, asked: completions.chunks(model, asked, fields),
        )

    async def _respond(self, request: Request) -> Any:
        fields = await self._fields(request, responses.ResponseFields)
        client = _client(request, fields)
        return await self._generate(
            request,
            fields,
            lambda: responses.asked_for(fields, self.settings, client),
            lambda model, asked, said: responses.response(model, asked, said, fields),
            lambda model, asked: responses.events(model, asked, fields),
        )

    async def _embed(self, request: Request) -> Any:
        fields = await self._fields(request, retrieval.EmbeddingFields)
        served = self.models.named(fields.model, EMBEDDING)
        given = fields.input if isinstance(fields.input, list) else [fields.input]
        asked = retrieval.read_inputs(given, "input", self.settings, instruction=True)
        return await self._encode(request, served, asked, partial(retrieval.embeddings, served, fields))

    async def _rerank(self, request: Request) -> Any:
        fields = await self._fields(request, retrieval.RerankFields)
        served = self.models.named(fields.model, RERANKER)
        asked = retrieval.read_inputs([fields.query], "query", self.settings, instruction=False)
        asked += retrieval.read_inputs(fields.documents, "documents", self.settings, instruction=False)
        return await self._encode(request, served, asked, partial(retrieval.ranking, served, fields))

    async def _encode(
        self, request: Request, served: Served, asked: list[Any], answer: Callable[[list[Any]], dict[str, Any]]
    ) -> Any:
        """Responds to a request to an embedding model or reranker, which runs one call at a time."""

        async def work() -> dict[str, Any]:
            async with self.models.use(served):
                inputs = asked
                if any("image" in one for one in inputs):
                    found = await self._fetching.run(lambda: retrieval.fetched(asked, self.settings))
                    inputs = await self._preparing.run(lambda: retrieval.decoded(found, self.settings))
                return await self._encoding.run(lambda: answer(inputs))

        return JSONResponse(await while_connected(request, work()))

    async def _tokenize(self, request: Request) -> Any:
        fields = await self._fields(request, tokens.TokenizeFields)
        served = self.models.named(fields.model, GENERATE)
        ask = tokens.asked_for(fields, self.settings)

        async def count() -> dict[str, Any]:
            async with self.models.use(served):
                if ask.remote:
                    await self._fetching.run(lambda: ask.fetch(self.settings))
                return await self._preparing.run(lambda: tokens.tokenized(served.chats, ask, fields, self.settings))

        return JSONResponse(await while_connected(request, count()))

    async def _pdf(self, request: Request) -> Any:
        return await pages.pdf(request, self.settings)

    async def _list(self, _: Request) -> Any:
        return {"object": "list", "data": [_model(one) for one in self.models.served.values()]}

    async def _show(self, request: Request) -> Any:
        return _model(self.models.named(request.path_params["name"]))

    async def _health(self, _: Request) -> Any:
        return {"status": "ok"}

    async def _ready(self, _: Request) -> Any:
        if self.guard.draining:
            raise ApiError(503, "The server is shutting down.", code="unavailable")
        return {"status": "ready"}

    async def _metrics(self, _: Request) -> Any:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Streamed(Response):
    """An `EventStream` as a response that FastAPI accepts."""

    def __init__(self, stream: EventStream) -> None:
        super().__init__()
        self._stream = stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._stream(scope, receive, send)


def _client(request: Request, fields: Generation) -> object:
    """The identity of the client for its turns in the queue: its address, and the user that the request names."""
    return (request.client.host if request.client else None, fields.asker)


def _model(served: Served) -> dict[str, Any]:
    context = None if served.engine is None else served.engine.context
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "vlpack",
        "task": served.task,
        "loaded": served.loaded,
        "context": context,
    }


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "it is registered for these"
    text = {404: "There is no such address.", 405: "The address takes another method."}.get(error.status_code)
    return ApiError(error.status_code, text or str(error.detail), headers=error.headers).response()
