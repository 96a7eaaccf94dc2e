"""Errors in OpenAI's format: ``{"error": {"message": …, "type": …, "param": …, "code": …}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from vlpack.engine import QueueFullError
from vlpack.errors import InputError, OptionError, VlpackError, first_option, in_request

RETRY_SECONDS = 2
"""Seconds that the header Retry-After tells a client to wait if the server is busy."""

LONGEST = 1000
"""Largest number of characters of an error message; longer ones are cut off."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: message that says what is wrong and what to do.
        param: field of the request that is wrong; None if it is not about a field.
        code: short identifier of the error for programs; None if there is none.
        headers: additional headers of the response.
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
        """The JSON object of the response."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def busy(message: str, status: int = 429) -> ApiError:
    """The error for a request that may succeed if the client sends it again later."""
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(status, message, code="rate_limit_exceeded" if status == 429 else "unavailable", headers=headers)


def too_large(message: str, param: str | None = None) -> ApiError:
    """The error for a request that exceeds a limit of the server."""
    return ApiError(413, message, param=param, code="request_too_large")


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error for an invalid request, with status 400."""
    return ApiError(400, message, param=param, code=code)


def sentence(error: VlpackError) -> str:
    """The message and hint of a vlpack error as one text, with the names that options have in requests."""
    return in_request(error.message if error.hint is None else f"{error.message} {error.hint}")


def told(error: VlpackError) -> ApiError:
    """The error response for an error of vlpack."""
    text = sentence(error)
    if isinstance(error, QueueFullError):
        return busy(text)
    if isinstance(error, (InputError, OptionError)):
        long = "more than fit the model's context" in text or "answer included" in text
        return wrong(text, first_option(error.message), "context_length_exceeded" if long else None)
    return ApiError(500, text, code="server_error")


def failed() -> ApiError:
    """The error for an internal failure; its details are logged, but not sent to the client."""
    return ApiError(500, "The server failed to process this request; its log says why.", code="server_error")
