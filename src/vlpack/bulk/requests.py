"""Rows in OpenAI's batch format: requests for chat completions, which are answered as ``vlpack serve`` answers them."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable
from typing import Any

from vlpack.bulk.form import Words, explained, sentence
from vlpack.bulk.media import MAX_IMAGE_PIXELS, Place
from vlpack.bulk.row import Item, Task
from vlpack.bulk.shards import Row
from vlpack.bulk.written import Layout
from vlpack.engine import Engine
from vlpack.errors import InputError, in_python, option
from vlpack.server.answers import whole
from vlpack.server.asking import Asked, submit
from vlpack.server.chat import ChatFields, asked_for, completion
from vlpack.server.errors import ApiError, told, wrong
from vlpack.server.reading import fields_of
from vlpack.server.settings import Settings

URL = "/v1/chat/completions"
"""The only route that requests may name."""

KEYS = ("custom_id", "method", "url", "body")
"""Keys of a line with a request."""


class Requests:
    """The form of requests in OpenAI's batch format.

    Args:
        model: name of the package; responses name it as their model, whatever model the request names.
        place: which URLs may be downloaded; requests never name files.
        max_tokens: largest number of tokens of an answer for requests without a limit; None for the room in a slot.
        words: function that writes options in errors.
    """

    layout = Layout("openai", "custom_id", "response", lambda response: (response or {}).get("status_code") != 200)
    id_column = "custom_id"

    def __init__(self, model: str, place: Place, max_tokens: int | None, words: Words = in_python) -> None:
        self._model, self._urls, self._most, self._words = model, place.allow_urls, max_tokens, words
        self._settings = Settings(allow_private_urls=place.allow_private_urls, max_image_pixels=MAX_IMAGE_PIXELS)

    def begin(self, engine: Engine, item: Item) -> Callable[[], Row]:
        """Checks a request and submits it, as `vlpack.bulk.form.Form` specifies.

        Raises:
            ApiError: the request is invalid.
            VlpackError: the line is not a request, or the engine refuses it.
        """
        asked = submit(engine, self._asked(item), self._settings)
        return lambda: self._response(asked)

    def _asked(self, item: Item) -> Any:
        if item.error is not None:
            raise item.error
        columns = item.columns
        if columns.get("custom_id") is None:
            raise InputError(f"{item.where} has no 'custom_id'.")
        for name in columns:
            if name not in KEYS:
                raise InputError(f"{item.where} has the unknown key {name[:100]!r}.", f"Known are {', '.join(KEYS)}.")
        if columns.get("method", "POST") != "POST" or columns.get("url") != URL:
            raise InputError(
                f"{item.where} asks for {str(columns.get('url'))[:100]!r}, which is not answered.",
                f"Requests have the method POST and the url {URL!r}.",
            )
        body = columns.get("body")
        given = {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body
        fields = fields_of(given, ChatFields)
        if fields.stream:
            raise wrong("'stream' has no effect in a batch.", "stream")
        ask = asked_for(fields, self._settings, None)
        if self._most is not None:
            ask.options.setdefault("max_tokens", self._most)
        if ask.remote:
            if not self._urls:
                raise InputError(
                    "The request has URLs, which are not downloaded.", f"Allow it: {option('allow_urls', True)}."
                )
            ask.fetch(self._settings)
        return ask

    def _response(self, asked: Asked) -> Row:
        body = completion(self._model, asked, asyncio.run(whole(asked)))
        return {"status_code": 200, "request_id": uuid.uuid4().hex, "body": body}

    def area(self, item: Item) -> int:
        """The length of the request in characters, in place of an area, because encoded images make up most of it."""
        return len(str(item.columns.get("body")))

    def row(self, task: Task, result: Row) -> Row:
        """The row of the output for a response."""
        number = hashlib.sha256(task.key.encode("utf-8", "surrogatepass")).hexdigest()[:24]
        return {"id": f"batch_req_{number}", "custom_id": task.key, "response": result, "error": None}

    def failed(self, task: Task, error: Exception) -> Row:
        """The row of the output for a request that cannot be answered: the response that the server would send."""
        answer = error
        if not isinstance(answer, ApiError):
            answer = told(explained(error))
            answer.message = sentence(explained(error), self._words)  # names options, not fields of a request
        return self.row(task, {"status_code": answer.status, "request_id": uuid.uuid4().hex, "body": answer.body})

    def tokens(self, row: Row) -> int:
        """The number of tokens of the answers in a row of the output."""
        usage = row["response"]["body"].get("usage") or {}
        return int(usage.get("completion_tokens", 0))
