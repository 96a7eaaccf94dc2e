"""The JSON of requests: read within limits, and checked against the fields that a route takes."""

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
"""How deeply the JSON of a request may be nested."""

BODY_SECONDS = 60.0
"""How long the body of a request may take to arrive."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # of which half alone is no character

_IN_THREAD = 256 * 1024  # bytes of JSON whose parsing would hold the event loop up


class Fields(BaseModel):
    """Base class of what routes take: no field beside those that it names, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


Body = TypeVar("Body", bound=Fields)

UNSUPPORTED = {
    "audio": "models of vlpack make no sound",
    "function_call": "it was replaced by tool_choice",
    "functions": "it was replaced by tools",
    "logit_bias": "tokens cannot be weighted one by one",
    "prediction": "nothing can be drafted by a request",
    "web_search_options": "there is no search",
    "background": "answers are not kept, so they cannot be fetched later",
    "conversation": "conversations are not kept: send all messages",
    "previous_response_id": "answers are not kept: send all messages",
    "prompt": "there are no stored prompts",
    "max_tool_calls": "tools are called by the client",
    "suffix": "models of vlpack do not fill gaps",
    "best_of": "ask for n answers instead",
}
"""Parameters of OpenAI's protocol that are known and not supported, and why."""


async def read(request: Request, kind: type[Body], settings: Settings) -> Body:
    """The body of a request as the fields of its route.

    Raises:
        ApiError: it is too large or slow, no JSON, or has a field that is unknown, unsupported or of another type.
    """
    kind_of = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind_of != "application/json":  # other types could be sent by any web page, without asking
        raise ApiError(415, "The request must have the header Content-Type: application/json.")
    data = await read_bytes(request, settings.max_body)
    try:
        value = await asyncio.to_thread(parse_json, data) if len(data) > _IN_THREAD else parse_json(data)
    except ValueError as error:
        raise wrong(f"The request is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise wrong("The request must be a JSON object.")
    # like an absent one, null is the default
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
    """The body of a request.

    Raises:
        ApiError: it is larger than ``most`` bytes, or does not come in time.
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
    raise too_large(f"The request has more than {most} bytes, which is the most that this server takes (--max-body).")


def parse_json(data: bytes | str) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is not valid, or nested more than `MAX_DEPTH` deep.
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
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _wrong_field(error: ValidationError) -> ApiError:
    """The first thing that is wrong with the fields, as a sentence."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    places = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in places).lstrip(".")
    if first["type"] == "missing":
        return wrong(f"The parameter {name!r} is missing.", name, "missing_parameter")
    if first["type"] == "extra_forbidden":
        return wrong(f"The parameter {name!r} is unknown.", name, "unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return wrong(f"{name!r} is not usable: {message[:1].lower()}{message[1:]}.", name)
