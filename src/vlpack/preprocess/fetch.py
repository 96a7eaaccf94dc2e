"""Downloads one small file over http(s), guarding against server-side request forgery.

A URL may come from an untrusted source and must not lead to this machine or its private network.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from vlpack.errors import InputError, option
from vlpack.preprocess.addresses import is_public_address

MAX_DOWNLOAD_BYTES = 64 * 2**20
"""Maximum size of a download, in bytes: 64 MiB."""

_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)


def fetch(
    url: str,
    *,
    allow_private: bool = False,
    timeout: float = 30.0,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
    accept: str = "image/*",
) -> bytes:
    """Downloads the file at an http(s) URL and returns its bytes.

    Every address of the host name must be public, and the connection goes to one of the addresses that were checked,
    so the name cannot point elsewhere between the check and the connection. Redirects get the same checks. Proxies
    from the environment are not used, because the addresses that a proxy connects to cannot be checked here.

    Args:
        url: http or https URL without user name and password.
        allow_private: whether to also connect to loopback, private, link-local and other reserved addresses.
        timeout: seconds for everything after the name look-up, redirects included.
        max_bytes: maximum length of the body, in bytes.
        accept: media types that the server is asked for.

    Raises:
        InputError: the URL is refused or unreachable, or the answer is an error, too slow or too large.
    """
    deadline = time.monotonic() + timeout
    current = url
    for _ in range(_MAX_REDIRECTS + 1):
        parts = _split(current)
        try:
            body, location = _get(parts, allow_private, deadline, max_bytes, accept)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"no complete answer within {timeout:g} s" if time.monotonic() >= deadline else f"{error}"
            raise InputError(f"{_name(parts)} cannot be fetched: {reason}.") from error
        if location is None:
            return body
        try:
            current = urljoin(current, location)
        except ValueError:
            raise InputError(f"{_name(parts)} redirects to {location[:200]!r}, which is not a URL.") from None
    raise InputError(f"{_name(_split(url))} redirects more than {_MAX_REDIRECTS} times.")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"{url[:200]!r} is not a usable http or https URL.")
    if parts.username is not None or parts.password is not None:
        raise InputError("A URL with a user name or password is not fetched.", hint="Download the image yourself.")
    return parts


def _name(parts: SplitResult) -> str:
    # The query is left out of messages: it often carries a signature or key.
    return f"{parts.scheme}://{parts.netloc}{parts.path}"[:200]


def _get(
    parts: SplitResult, allow_private: bool, deadline: float, max_bytes: int, accept: str
) -> tuple[bytes, str | None]:
    """Sends one request and returns (body, None), or (b"", location) where the server redirects to a location."""
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    sock = _connect(host, port, allow_private, deadline)
    connection = http.client.HTTPConnection(host, port)
    try:
        with _closed_at(sock, deadline):
            if parts.scheme == "https":
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
            connection.sock = sock  # already connected: http.client then resolves nothing itself
            target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
            if parts.query:
                target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?")
            headers = {"Accept": accept, "Accept-Encoding": "identity", "User-Agent": "vlpack"}
            headers["Host"] = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            if response.status in _REDIRECTS and (location := response.getheader("Location")):
                return b"", location
            if response.status != 200:
                raise InputError(f"{_name(parts)} answered with status {response.status} {response.reason[:80]}.")
            length = response.length
            body = response.read(max_bytes + 1) if length is None or length <= max_bytes else b""
            if time.monotonic() >= deadline:  # a body without Content-Length just ends when the timer cuts it
                raise TimeoutError
            if len(body) > max_bytes or (length is not None and length > max_bytes):
                raise InputError(f"{_name(parts)} is larger than {max_bytes} bytes, the most that is downloaded.")
            if response.length:  # bytes that Content-Length announced and that did not arrive
                raise InputError(f"{_name(parts)} ended {response.length} bytes early.")
            return body, None
    finally:
        connection.close()
        sock.close()


@contextlib.contextmanager
def _closed_at(sock: socket.socket, deadline: float) -> Iterator[None]:
    """Shuts the socket down at the deadline; a socket timeout alone does not stop a peer that sends a byte a second."""

    def shut() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    # The descriptor moves into the TLS socket, so keep a second handle on the same connection.
    sock = sock.dup()
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        sock.close()


def _connect(host: str, port: int, allow_private: bool, deadline: float) -> socket.socket:
    addresses = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not allow_private:
        for address in addresses:
            if not is_public_address(str(address)):
                raise InputError(
                    f"{host} has the address {address}, which is not public; it is not fetched.",
                    hint=f"Pass {option('allow_private_urls', True)} if you trust the URL.",
                )
    failure: OSError = OSError(f"{host} has no address")
    for address in addresses:
        try:
            return socket.create_connection((str(address), port), timeout=max(0.1, deadline - time.monotonic()))
        except OSError as error:
            failure = error
    raise failure
