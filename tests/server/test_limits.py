"""Access and limits of a server, and its behaviour when clients disconnect or do not read."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from samples import IMAGES
from server.conftest import Running, seen, wrong
from vlpack import Engine
from vlpack.errors import OptionError
from vlpack.server.asking import submit
from vlpack.server.settings import Settings

LONG = [{"role": "user", "content": "Hello"}]


def test_a_key(start: Callable[..., Running]) -> None:
    made = start(api_key="s3cret")
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        wrong(made.ask(path), 401, "A key is needed")
        wrong(made.ask(path, Authorization="Bearer wrong"), 401, "The key is wrong.")
        wrong(made.ask(path, Authorization="Basic s3cret"), 401, "The key is wrong.")
    wrong(made.ask("/v1/chat/completions", {}), 401, "A key is needed")
    assert made.ask("/v1/models", Authorization="Bearer s3cret").status == 200
    assert [made.ask(path).status for path in ("/health", "/ready", "/")] == [200, 200, 200]


def test_other_machines_need_a_key() -> None:
    with pytest.raises(OptionError, match="no key is set"):
        Settings(host="0.0.0.0")
    with pytest.raises(OptionError, match="exclude each other"):
        Settings(api_key="a", no_auth=True)
    with pytest.raises(OptionError, match="not empty"):
        Settings(host="0.0.0.0", api_key=" ")
    assert not Settings(host="0.0.0.0", no_auth=True).is_local
    assert not Settings(host="::", api_key="a").is_local
    assert all(Settings(host=host).is_local for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"))


def test_web_pages_of_others(start: Callable[..., Running]) -> None:
    made = start(allow_origins=("https://ours.example",))
    assert made.ask("/health", Origin=made.url).status == 200
    wrong(made.ask("/health", Origin="https://theirs.example"), 403, "may not use this server")
    wrong(made.ask("/health", Origin="null"), 403, "may not use this server")
    wrong(made.ask("/health", Host="rebound.example"), 403, "localhost and 127.0.0.1")
    allowed = made.ask("/health", Origin="https://ours.example")
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://ours.example"
    connection = http.client.HTTPConnection("127.0.0.1", made.port)
    connection.request("OPTIONS", "/v1/models", headers={"Origin": "https://ours.example"})
    assert connection.getresponse().status == 204


def test_bodies_that_are_too_large(start: Callable[..., Running]) -> None:
    made = start(max_body=10_000)
    wrong(made.ask("/v1/chat/completions", b" " * 10_001), 413, "more than 10000 bytes")
    connection = http.client.HTTPConnection("127.0.0.1", made.port, timeout=20)
    connection.request(
        "POST",
        "/v1/chat/completions",
        (b" " * 1000 for _ in range(20)),
        {"Content-Type": "application/json", "Transfer-Encoding": "chunked"},
        encode_chunked=True,
    )
    assert connection.getresponse().status == 413


def png(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asked(*urls: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Read."}]}]


def test_images_that_are_too_much(start: Callable[..., Running], tmp_path: Path) -> None:
    made = start(max_images=2, max_image_pixels=10_000, max_prompt=1000)
    wrong(made.chat(asked(*[png(32, 32)] * 3)), 413, "has 3 images and videos")
    wrong(made.chat(asked(png(200, 51))), 413, "200x51 = 10200 pixels; at most 10000", "messages[0].content[0]")
    wrong(made.chat([{"role": "user", "content": "x" * 1001}]), 413, "characters; this server takes 1000")
    wrong(made.chat(asked("data:image/png;base64,AAAAAAAAAAAAAAAA")), 400, "not an image of a known format")
    wrong(made.chat(asked("data:image/png;base64,%%%")), 400, "invalid base64")
    wrong(made.chat(asked("data:text/plain,hello")), 400, "not base64")
    broken = base64.b64encode((IMAGES / "00.png").read_bytes()[:200]).decode()
    wrong(made.chat(asked("data:image/png;base64," + broken)), 400, "damaged or truncated")


def test_files_of_the_machine_are_never_read(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes((IMAGES / "00.png").read_bytes())
    for url in (str(path), path.as_uri(), "00.png", f"DATA/../{path}", "ftp://x/a.png", ""):
        wrong(running.chat(asked(url)), 400, "files are not read")
    for part in (
        {"type": "image", "path": str(path)},
        {"type": "image_url", "image_url": {"url": "", "path": str(path)}},
        {"type": "video_url", "video_url": str(path)},
        {"type": "video_url", "video_url": {"url": path.as_uri()}},
    ):
        assert running.chat([{"role": "user", "content": [part]}]).status == 400
    for item in (str(path), {"image": str(path)}):
        reply = running.ask("/v1/embeddings", {"model": "embedding", "input": [item]})
        assert reply.status == (200 if isinstance(item, str) else 400)  # a path in a message is only text


def test_urls_of_the_private_network_are_not_fetched(running: Running) -> None:
    for host in ("127.0.0.1", "localhost", "2130706433"):
        wrong(running.chat(asked(f"http://{host}:{running.port}/favicon.ico")), 400, "which is not public")
    wrong(running.chat(asked("http://127.0.0.1/")), 400, "--allow-private-urls of the server")


def test_urls_are_fetched_where_that_is_allowed(start: Callable[..., Running]) -> None:
    class Files(threading.Thread):
        def __init__(self) -> None:
            super().__init__(daemon=True)
            self.socket = socket.create_server(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/00.png"

        def run(self) -> None:
            while True:
                connection, _ = self.socket.accept()
                connection.recv(4096)
                data = (IMAGES / "00.png").read_bytes()
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
                connection.close()

    files = Files()
    files.start()
    reply = start(allow_private_urls=True).chat(asked(files.url))
    assert reply.json["usage"]["prompt_tokens"] > 20


def slowly(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes steps of an engine slow: a tiny model would be through before a busy machine looks at what it does."""
    step = engine._graphs.run

    def slow(*arguments: Any) -> Any:
        time.sleep(0.02)
        return step(*arguments)

    monkeypatch.setattr(engine._graphs, "run", slow)


def test_a_full_queue(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    made = start("tools", slots=1, queue=1)
    made.chat(LONG, model="tools", max_tokens=1)
    slowly(made.server.models.served["tools"].chats, monkeypatch)
    body = {"model": "tools", "messages": LONG, "max_tokens": 150}
    threads = [threading.Thread(target=made.ask, args=("/v1/chat/completions", body)) for _ in range(2)]
    threads[0].start()
    engine = made.server.models.served["tools"].chats
    _until(lambda: engine.occupancy.busy == 1)
    threads[1].start()
    _until(lambda: engine.occupancy.waiting == 1)
    reply = made.chat(LONG, model="tools")
    wrong(reply, 429, "1 requests wait for a slot")
    assert int(reply.headers["Retry-After"]) >= 1
    assert reply.json["error"]["type"] == "rate_limit_error"
    for thread in threads:
        thread.join()


def test_too_many_connections_at_once(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    made = start()
    monkeypatch.setattr(made.server.guard, "_most", 0)
    reply = made.chat(LONG)
    wrong(reply, 429, "requests are on their way")
    assert reply.headers["Retry-After"]


def _until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def leaving(running: Running, body: dict[str, Any], after: Callable[[], bool]) -> None:
    """Sends a request and closes the connection as soon as ``after`` returns true."""
    data = json.dumps({"model": "tools", "messages": LONG, "max_tokens": 550, **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n"
    connection = socket.create_connection(("127.0.0.1", running.port))
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
    _until(after)
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream: bool, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.chat(LONG, model="tools", max_tokens=1)
    engine = running.server.models.served["tools"].chats
    running.idle("tools")
    slowly(engine, monkeypatch)
    before = engine.counters.answer_tokens
    leaving(running, {"stream": stream, "n": 4}, lambda: engine.occupancy.busy == 4)
    running.idle("tools")
    assert engine.counters.answer_tokens - before < 4 * 550
    assert running.server.models.served["tools"].users == 0


def test_a_client_that_leaves_while_its_prompt_is_made(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that makes the prompt continues and submits the request, which is then cancelled."""
    entered, left = threading.Event(), threading.Event()
    asked: list[Any] = []

    def slow(*arguments: Any) -> Any:
        entered.set()
        assert left.wait(20)
        asked.append(submit(*arguments))
        return asked[0]

    monkeypatch.setattr("vlpack.server.app.submit", slow)
    leaving(running, {}, entered.is_set)
    served = running.server.models.served["tools"]
    _until(lambda: served.users == 0)
    left.set()
    _until(lambda: bool(asked))
    assert asked[0].handles[0].result(20).finish_reason == "interrupted"


def test_a_client_that_leaves_while_its_package_loads(start: Callable[..., Running]) -> None:
    made = start("tools")
    served = made.server.models.served["tools"]
    leaving(made, {}, lambda: served.users == 1)
    _until(lambda: served.users == 0)
    assert made.chat(LONG, model="tools").status == 200


def test_a_client_that_does_not_read(running: Running) -> None:
    """The client's answer is generated anyway, and its slot is free afterwards."""
    body = json.dumps({"model": "tools", "messages": LONG, "max_tokens": 500, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", running.port))
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        _until(lambda: running.server.models.served["tools"].users == 1)
        running.idle("tools")
        assert running.chat(seen()).status == 200


def test_one_that_takes_nothing_is_let_go(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlpack.server.events.SEND_SECONDS", 0.3)
    served = running.server.models.served["tools"]
    body = {"model": "tools", "messages": LONG, "max_tokens": 500, "stream": True, "n": 4, "temperature": 1.5}
    data = json.dumps({**body, "logprobs": True, "top_logprobs": 20}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", running.port))
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        _until(lambda: served.users == 1)
        _until(lambda: served.users == 0, 60)


def test_a_body_that_never_ends(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlpack.server.reading.BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
        connection.settimeout(20)
        assert b"408" in connection.recv(1000)


def test_a_fault_of_the_server_is_told_without_particulars(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the particulars")

    monkeypatch.setattr("vlpack.server.app.submit", fail)
    reply = running.chat(LONG)
    wrong(reply, 500, "its log says why")
    assert b"particulars" not in reply.data
    monkeypatch.undo()
    assert running.chat(LONG).status == 200
