"""Errors in OpenAI's form: ``{"error": {"message": …, "type": …, "param": …, "code": …}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from vlpack.engine import QueueFullError
from vlpack.errors import InputError, OptionError, VlpackError, first_option, in_request

RETRY_SECONDS = 2
"""What Retry-After says where too much is asked at once."""

LONGEST = 1000
"""Characters of an error's message."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        param: the field of the request that it is about, if any.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"  # it may quote the request
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param = param if param is None else param[:LONGEST]
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def busy(message: str, status: int = 429) -> ApiError:
    """The error for a request that may be sent again a little later."""
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(status, message, code="rate_limit_exceeded" if status == 429 else "unavailable", headers=headers)


def too_large(message: str, param: str | None = None) -> ApiError:
    """The error for a request that exceeds a limit of the server."""
    return ApiError(413, message, param=param, code="request_too_large")


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error for a request that cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def sentence(error: VlpackError) -> str:
    """What an error of vlpack says, in the words of requests."""
    return in_request(error.message if error.hint is None else f"{error.message} {error.hint}")


def told(error: VlpackError) -> ApiError:
    """An error of vlpack as an answer."""
    text = sentence(error)
    if isinstance(error, QueueFullError):
        return busy(text)
    if isinstance(error, (InputError, OptionError)):
        long = "more than fit the model's context" in text or "answer included" in text
        return wrong(text, first_option(error.message), "context_length_exceeded" if long else None)
    return ApiError(500, text, code="server_error")


def failed() -> ApiError:
    """The error for a fault of the server itself, whose particulars are in its log and not told to others."""
    return ApiError(500, "The server has failed at this request; its log says why.", code="server_error")
