"""Images are loaded from all kinds of sources, and unsafe or damaged ones are refused."""

from __future__ import annotations

import base64
import http.server
import io
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlpack.errors import InputError
from vlpack.preprocess import MAX_IMAGE_PIXELS, fetch, load_image
from vlpack.preprocess.addresses import is_public_address

from .image_files import exif, noise


def encoded(image: Image.Image | None = None, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or noise(40, 30)).save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded()


def same(image: Image.Image) -> bool:
    return image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(noise(40, 30)))


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_kind_of_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "http_like name.png"
    path.write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    sources: list[Any] = [
        path,
        str(path),
        PNG,
        bytearray(PNG),
        text,
        lines,
        "data:image/png;base64," + text,
        noise(40, 30),
    ]
    sources += [np.asarray(noise(40, 30)), np.asarray(noise(40, 30))[::1, :, :].copy(order="F")]
    for source in sources:
        assert same(load_image(source))
    monkeypatch.chdir(tmp_path)
    assert same(load_image("http_like name.png"))


def test_pil_images_are_not_changed() -> None:
    image = Image.open(io.BytesIO(encoded(noise(40, 30), "JPEG", exif=exif(6))))
    assert load_image(image).size == (30, 40)
    assert image.size == (40, 30)
    assert image.getexif()[0x0112] == 6


def test_the_file_is_closed_and_can_be_deleted(tmp_path: Path) -> None:
    for kind in ("png", "gif", "webp"):
        path = tmp_path / f"frames.{kind}"
        noise(40, 30).save(path, save_all=True, append_images=[noise(40, 30, seed=2)])
        image = load_image(path)
        path.unlink()
        assert image.resize((20, 15)).size == (20, 15)
        assert getattr(image, "fp", None) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "not an image"),
        (b"not an image at all", "not an image"),
        (PNG[:200], "damaged"),
        (encoded(noise(300, 200), "JPEG")[:2000], "damaged"),
        (png_claiming(100_000, 100_000), str(MAX_IMAGE_PIXELS)),
        (png_claiming(20_000, 8_948), str(20_000 * 8_948)),
        (png_claiming(0, 10), "damaged|not an image|empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[H, W, 3\]"),
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (Image.new("RGB", (0, 4)), "empty"),
        (17, "int"),
        (None, "NoneType"),
        ("nowhere.png", r"nowhere\.png"),
        ("no\0where.png", "no image file"),
        ("", "no image file"),
        ("file:///etc/hostname", "only http"),
        ("ftp://example.com/a.png", "only http"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,@@@", "invalid base64"),
        ("data:image/png;base64," + base64.b64encode(b"no image in here").decode(), "not an image"),
        ("http://", "not a usable"),
        ("http://[::1", "not a usable"),
        ("https://user:secret@example.com/a.png", "user name"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_unusable_sources_are_refused(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_image(source)  # type: ignore[arg-type]


def test_refused_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(PNG[:200])
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path in (broken, pipe, tmp_path, tmp_path / "missing.png"):
        with pytest.raises(InputError, match=path.name):
            load_image(path)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match="pixels"):
        load_image(png_claiming(60_000, 60_000))


def test_the_limit_applies_even_if_pillow_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(InputError, match=f"20000x9000 = 180000000 pixels; at most {MAX_IMAGE_PIXELS}"):
        load_image(png_claiming(20_000, 9_000))


def test_too_much_base64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlpack.preprocess.image_source.MAX_ENCODED_BYTES", 100)
    with pytest.raises(InputError, match="at most 100"):
        load_image(base64.b64encode(PNG).decode())


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/redirect/"):
            left = int(path.rpartition("/")[2])
            self.answer(302, b"", Location=f"/redirect/{left - 1}" if left else "/a%20b.png?x=1")
        elif path == "/elsewhere":
            self.answer(302, b"", Location="file:///etc/hostname")
        elif path == "/broken":
            self.answer(302, b"", Location="http://[")
        elif path == "/large":
            self.answer(200, b"x" * 5000)
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 5000)
        elif path == "/short":
            self.answer(200, PNG[:100], **{"Content-Length": "5000"})
        elif path == "/drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        elif path == "/a%20b.png":
            self.answer(200, PNG)
        else:
            self.answer(404, b"no")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.handle_error = lambda *args: None  # type: ignore[method-assign]  # clients hang up on purpose
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_images_from_urls(server: str) -> None:
    assert same(load_image(server + "/a b.png", allow_private_urls=True))
    assert same(load_image(server.replace("http:", "HTTP:") + "/redirect/4", allow_private_urls=True))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "404"),
        ("/redirect/5", "more than 5 times"),
        ("/elsewhere", "not a usable"),
        ("/broken", "redirects to 'http://\\['"),
        ("/large", "larger than 2000"),
        ("/endless", "larger than 2000"),
        ("/short", "cannot be fetched|early"),
        ("/drip", "0.5 s"),
    ],
)
def test_bad_responses_are_refused(server: str, path: str, message: str) -> None:
    start = time.monotonic()
    limit = 10_000 if path == "/short" else 2000
    with pytest.raises(InputError, match=message):
        fetch.fetch(server + path, allow_private=True, timeout=0.5, max_bytes=limit)
    assert time.monotonic() - start < 3


def test_private_addresses_are_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    port = server.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"):
        with pytest.raises(InputError, match=r"not public|cannot be fetched"):
            load_image(f"http://{host}:{port}/a.png")


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.215.14", "10.0.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: answers)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    with pytest.raises(InputError, match=r"10\.0\.0\.7"):
        load_image("http://example.com/a.png")


def test_the_connection_goes_to_the_checked_address(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up, connected = [], []

    def getaddrinfo(host: str, *args: object, **kwargs: object) -> list[object]:
        looked_up.append(host)
        address = (
            "93.184.215.14" if len(looked_up) == 1 else "127.0.0.1"
        )  # a name that resolves to another address the second time
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))]

    def create_connection(address: tuple[str, int], **kwargs: object) -> socket.socket:
        connected.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    with pytest.raises(InputError, match="no network in tests"):
        load_image("http://example.com/a.png")
    assert (looked_up, connected) == (["example.com"], [("93.184.215.14", 80)])


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("::ffff:93.184.215.14", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("192.0.0.192", False),
        ("64:ff9b:1::7f00:1", False),
        ("fec0::1", False),
        ("::ffff:0:7f00:1", False),
        ("::ffff:0:0:7f00:1", False),
        ("192.0.0.9", False),
        ("192.88.99.1", False),
        ("168.63.129.16", False),
        ("100.100.100.200", False),
        ("198.19.0.1", False),
        ("203.0.113.5", False),
        ("240.0.0.1", False),
        ("239.1.2.3", False),
        ("2001:0:7f00:1::1", False),
        ("2001:2::1", False),
        ("2001:db8::1", False),
        ("2002:5db8:d70e::", False),
        ("3fff::1", False),
        ("5f00::1", False),
        ("100::1", False),
        ("fd00:ec2::254", False),
        ("ff0e::1", False),
        ("64:ff9b::a00:1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::5db8:d70e", True),
        ("1.1.1.1", True),
        ("192.0.1.1", True),
        ("223.255.255.255", True),
        ("2a00:1450:4001:82a::200e", True),
        ("2001:4860:4860::8888", True),
        ("not an address", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public_address(address) is public


@pytest.mark.parametrize("address", ["192.0.0.192", "64:ff9b:1::7f00:1", "fec0::1", "::ffff:0:7f00:1"])
def test_urls_with_unusual_forms_of_private_addresses_are_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(kind, socket.SOCK_STREAM, 6, "", (address, 80))])
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    with pytest.raises(InputError, match="which is not public"):
        load_image("http://example.com/a.png")
