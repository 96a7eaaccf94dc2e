"""Runs the server of ``vlpack serve``: listens, responds to requests, and lets running answers end at shutdown."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import uvicorn

from vlpack.errors import OptionError, option
from vlpack.server.app import Server
from vlpack.server.settings import Settings


def listen(settings: Settings) -> socket.socket:
    """A socket that listens at the settings' host and port.

    Raises:
        OptionError: the port is in use, or the host is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        if hasattr(signal, "SIGHUP"):  # on Windows this option would let two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        raise OptionError(
            f"The server cannot listen at port {settings.port} of {settings.host}: {error.strerror or error}.",
            f"Choose another one with {option('port')}; 0 takes a free one.",
        ) from None
    sock.set_inheritable(False)
    return sock


class _Uvicorn(uvicorn.Server):
    """uvicorn's server with a callback for the beginning of its shutdown."""

    ending: Callable[[], None] = staticmethod(lambda: None)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Handles a signal: after the first one, running answers may end; a second one interrupts them."""
        self.ending()
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def serve(packages: Mapping[str, Path], settings: Settings, ready: Callable[[str], object]) -> None:
    """Serves packages until SIGINT or SIGTERM, then accepts no new requests and returns when running ones have ended.

    Args:
        packages: name → folder of each package.
        settings: settings of the server.
        ready: function that is called with the server's address when it listens.

    Raises:
        OptionError: the server cannot listen at the host and port.
        PackageError: a folder is not a complete package.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    server = Server(packages, settings)
    sock = listen(settings)
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.drain_seconds),
        h11_max_incomplete_event_size=64 * 1024,
        lifespan="on",
    )
    runner = _Uvicorn(config)

    def ending() -> None:
        server.guard.draining = True

    runner.ending = ending
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:  # uvicorn raises the signal again when it has ended
            signal.signal(number, lambda *_: None)
        ready(f"http://{shown}:{port}")
        runner.run(sockets=[sock])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sock.close()
