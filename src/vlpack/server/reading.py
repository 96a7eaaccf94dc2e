"""Reads the JSON of requests within limits and checks it against the fields of a route."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from vlpack.server.errors import ApiError, too_large, wrong
from vlpack.server.settings import Settings

MAX_DEPTH = 64
"""Largest nesting depth of a request's JSON."""

BODY_SECONDS = 60.0
"""Largest number of seconds until the body of a request has arrived."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a surrogate pair alone is not a character

_IN_THREAD = 256 * 1024  # larger JSON, in bytes, is parsed in a thread, so that the event loop is not blocked


class Fields(BaseModel):
    """Base class for the fields of a route; it rejects unknown fields and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


Body = TypeVar("Body", bound=Fields)

UNSUPPORTED = {
    "audio": "models of vlpack generate no audio",
    "function_call": "it was replaced by tool_choice",
    "functions": "it was replaced by tools",
    "logit_bias": "tokens cannot be weighted one by one",
    "prediction": "requests cannot provide draft tokens",
    "web_search_options": "the server has no web search",
    "background": "responses are not stored, so they cannot be fetched later",
    "conversation": "conversations are not stored: send all messages",
    "previous_response_id": "responses are not stored: send all messages",
    "prompt": "prompts are not stored",
    "max_tool_calls": "tools are called by the client",
    "suffix": "models of vlpack only continue texts",
    "best_of": "ask for n answers instead",
}
"""Parameters of OpenAI's protocol that the server does not support, and the reason."""


async def read(request: Request, kind: type[Body], settings: Settings) -> Body:
    """Reads the body of a request and checks the fields of its route.

    Raises:
        ApiError: the body is too large, too slow or not JSON, or has an unknown, unsupported or invalid field.
    """
    kind_of = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind_of != "application/json":  # any web page may send other types without a preflight request
        raise ApiError(415, "The request must have the header Content-Type: application/json.")
    data = await read_bytes(request, settings.max_body)
    try:
        value = await asyncio.to_thread(parse_json, data) if len(data) > _IN_THREAD else parse_json(data)
    except ValueError as error:
        raise wrong(f"The request is not valid JSON: {error}.") from None
    return fields_of(value, kind)


def fields_of(value: Any, kind: type[Body]) -> Body:
    """Checks the JSON of a request against the fields of its route.

    Raises:
        ApiError: it is no object, or has an unknown, unsupported or invalid field.
    """
    if not isinstance(value, dict):
        raise wrong("The request must be a JSON object.")
    # null means the default, as if the field were absent
    given = {name: item for name, item in value.items() if item is not None}
    for name in given:
        if name not in kind.model_fields:
            why = f": {UNSUPPORTED[name]}" if name in UNSUPPORTED else ""
            raise wrong(
                f"The parameter {name!r} is {'not supported' if why else 'unknown'}{why}.", name, "unknown_parameter"
            )
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _wrong_field(error) from None


async def read_bytes(request: Request, most: int) -> bytes:
    """Reads the body of a request.

    Raises:
        ApiError: the body is larger than ``most`` bytes, or does not arrive in time.
    """
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > most:
        _too_large(most)
    data = bytearray()

    async def collect() -> None:
        async for chunk in request.stream():
            if len(data) + len(chunk) > most:
                _too_large(most)
            data.extend(chunk)

    try:
        await asyncio.wait_for(collect(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"The request did not arrive within {BODY_SECONDS:g} seconds.") from None
    return bytes(data)


def _too_large(most: int) -> NoReturn:
    raise too_large(f"The request has more than {most} bytes, which is this server's limit (--max-body).")


def parse_json(data: bytes | str) -> Any:
    """Parses JSON strictly.

    Raises:
        ValueError: the text is not valid JSON, or is nested more than `MAX_DEPTH` levels deep.
    """

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    try:
        value = json.loads(data, parse_constant=constant)
        if isinstance(data, bytes) and _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return value
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _wrong_field(error: ValidationError) -> ApiError:
    """The error response for the first invalid field that pydantic reports."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    places = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in places).lstrip(".")
    if first["type"] == "missing":
        return wrong(f"The parameter {name!r} is missing.", name, "missing_parameter")
    if first["type"] == "extra_forbidden":
        return wrong(f"The parameter {name!r} is unknown.", name, "unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return wrong(f"{name!r} is not usable: {message[:1].lower()}{message[1:]}.", name)
