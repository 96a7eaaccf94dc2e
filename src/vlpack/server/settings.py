"""The settings of a server: its address, access, and limits."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from vlpack.errors import OptionError, option
from vlpack.runtime.sampling import check_number


@dataclass(frozen=True)
class Settings:
    """The settings of a server. None stands for a default that depends on the packages or the machine.

    Args:
        host: address or host name to listen at.
        port: TCP port; 0 chooses a free one.
        api_key: key that requests must send as ``Authorization: Bearer …``; None accepts requests without a key.
        no_auth: whether no key is required although other machines can connect.
        slots: number of answers that each package generates at a time.
        context: number of tokens of prompt and answer together that fit into a slot.
        threads: number of threads of onnxruntime.
        queue: largest number of requests per package that wait for a slot.
        stall: largest slowdown of running answers by prompts, as in `vlpack.Engine`.
        keep_loaded: number of packages in memory; the least recently used one is closed to load another.
        max_body: largest body of a request, in bytes.
        max_images: largest number of images and videos of a request.
        max_image_pixels: largest area of an image before it is resized, in pixels.
        max_prompt: largest number of characters of the texts of a request.
        drain_seconds: largest number of seconds that running answers continue after SIGTERM.
        allow_private_urls: whether image URLs may lead to this machine or its network.
        allow_origins: origins of other web pages that may use the server from a browser.

    Raises:
        OptionError: a value is out of its range, or others could connect without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    no_auth: bool = False
    slots: int = 4
    context: int | None = None
    threads: int | None = None
    queue: int = 64
    stall: float = 4.0
    keep_loaded: int | None = None
    max_body: int = 32 * 2**20
    max_images: int = 32
    max_image_pixels: int = 64_000_000
    max_prompt: int = 1_000_000
    drain_seconds: float = 30.0
    allow_private_urls: bool = False
    allow_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("slots", 1, 1024),
            ("queue", 1, 100_000),
            ("keep_loaded", 1, 1000),
            ("max_body", 1024, 2**31),
            ("max_images", 0, 10_000),
            ("max_image_pixels", 1, 178_956_970),
            ("max_prompt", 1, 12 * 2**20),
        ):
            check_number(name, getattr(self, name), low, high, whole=True)
        check_number("stall", self.stall, 2, math.inf)
        check_number("drain_seconds", self.drain_seconds, 0, 86400)
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isascii()):
            raise OptionError(f"{option('api_key')} must be ASCII text that is not empty.")
        if self.api_key is not None and self.no_auth:
            raise OptionError(f"{option('api_key')} and {option('no_auth')} exclude each other.", "Give one of them.")
        if not self.is_local and self.api_key is None and not self.no_auth:
            raise OptionError(
                f"Other machines can connect to {self.host}, but no key is set.",
                f"Set one with {option('api_key')} or the environment variable VLPACK_API_KEY, or allow access without "
                f"one with {option('no_auth', True)}.",
            )
        for origin in self.allow_origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise OptionError(
                    f"{option('allow_origin')} is {origin!r}; it must be an origin.", "For example https://example.org"
                )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
