"""Checks that every request passes first: its key, its origin, and the number of requests in progress."""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlpack.server.errors import ApiError, busy
from vlpack.server.settings import Settings

OPEN_PATHS = ("/", "/health", "/ready", "/favicon.ico")
"""Paths that need no key, besides the files of the page: browsers and health checks request them without one."""

PAGE = "/page/"

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Guard:
    """An ASGI application that checks requests before another one responds to them.

    Requests without the right key are refused; keys are compared in constant time. A server that only this machine can
    reach also refuses requests for other host names, because a foreign web page could reach it through one (DNS
    rebinding). Requests from web pages of other origins are refused unless the settings allow the origin.

    Args:
        app: application that responds to accepted requests.
        settings: settings of the server.
        most: largest number of POST requests in progress.

    Attributes:
        draining: whether the server is shutting down and refuses new requests.
    """

    def __init__(self, app: ASGIApp, settings: Settings, most: int) -> None:
        self._app, self._settings, self._most = app, settings, most
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())
        self._active = 0
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Responds to a request with an error, or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        allowed = origin if origin in self._settings.allow_origins else None

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = list(_HEADERS)
                if allowed is not None:
                    more = [*more[:3], (b"access-control-allow-origin", allowed.encode()), (b"vary", b"Origin")]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        try:
            self._check_from(headers, origin, allowed)
            if allowed is not None and scope["method"] == "OPTIONS":
                await answer({"type": "http.response.start", "status": 204, "headers": list(_PREFLIGHT)})
                await answer({"type": "http.response.body", "body": b""})
                return
            path = scope["path"]
            if path not in OPEN_PATHS and not (path.startswith(PAGE) and scope["method"] in ("GET", "HEAD")):
                self._check_key(headers.get("authorization", ""))
            counted = scope["method"] == "POST"
            if counted and self._active >= self._most:
                raise busy(f"{self._active} requests are on their way, and no more than {self._most} may be.")
        except ApiError as error:
            await error.response()(scope, receive, answer)
            return
        self._active += counted
        try:
            await self._app(scope, receive, answer)
        finally:
            self._active -= counted

    def _check_key(self, said: str) -> None:
        if self._key is None:
            return
        scheme, _, key = said.partition(" ")
        same = hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._key)
        if scheme.lower() != "bearer" or not same:
            text = "The key is wrong." if key else "A key is needed: send the header Authorization: Bearer KEY."
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, text, code="invalid_api_key", headers=headers)

    def _check_from(self, headers: dict[str, str], origin: str | None, allowed: str | None) -> None:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname if host.count("[") <= 1 else None
        if self._settings.is_local and name not in (*_LOCAL, self._settings.host):
            raise ApiError(403, "This server responds only to the names localhost and 127.0.0.1.", code="wrong_host")
        if origin is not None and allowed is None and urlsplit(origin).netloc != host:
            raise ApiError(
                403, f"Web pages of {origin[:100]} may not use this server (--allow-origin).", code="wrong_origin"
            )


_PREFLIGHT = (
    (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
    (b"access-control-allow-headers", b"authorization, content-type"),
    (b"access-control-max-age", b"600"),
)


def _digest(key: bytes) -> bytes:
    """The hash of a key, so that comparing keys takes the same time whatever their lengths."""
    return hashlib.sha256(key).digest()
