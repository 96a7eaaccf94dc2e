"""The command ``vlpack serve``: its messages, which packages it keeps in memory, and its shutdown."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from samples import vlpack
from server.conftest import Running, seen, wrong

HELLO = [{"role": "user", "content": "Hello"}]


def test_packages_are_loaded_when_they_are_first_asked_for(start: Callable[..., Running]) -> None:
    made = start("digits", "tools", "embedding", keep_loaded=1)

    def loaded() -> list[str]:
        return [one["id"] for one in made.ask("/v1/models").json["data"] if one["loaded"]]

    assert loaded() == []
    first = made.chat(seen())
    assert loaded() == ["digits"]
    assert made.chat(HELLO, model="tools").status == 200
    assert loaded() == ["tools"]
    assert made.ask("/v1/embeddings", {"model": "embedding", "input": "a"}).status == 200
    assert loaded() == ["embedding"]
    assert made.chat(seen()).json["choices"] == first.json["choices"]
    text = made.ask("/metrics").data.decode()
    tokens = first.json["usage"]["completion_tokens"]
    # tokens from before the package was closed are included
    assert f'vlpack_answer_tokens_total{{model="digits"}} {2 * tokens}.0' in text


def test_a_package_in_use_stays(start: Callable[..., Running]) -> None:
    made = start("digits", "tools", keep_loaded=1)
    replies: list[Any] = []
    body = {"model": "tools", "messages": HELLO, "max_tokens": 400, "temperature": 0}
    thread = threading.Thread(target=lambda: replies.append(made.ask("/v1/chat/completions", body)))
    thread.start()
    while not made.server.models.served["tools"].loaded:
        time.sleep(0.01)
    assert made.chat(seen()).status == 200
    thread.join()
    assert replies[0].json["usage"]["completion_tokens"] == 400


def test_a_package_that_cannot_be_loaded(
    start: Callable[..., Running], packages: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(packages["digits"], tmp_path / "broken")
    made = start("digits", "tools", keep_loaded=1)
    served = made.server.models.served["digits"]
    served.folder = tmp_path / "broken"
    (tmp_path / "broken" / "tokenizer.json").unlink()
    wrong(made.chat(seen()), 500, "is damaged")
    assert made.chat(HELLO, model="tools").status == 200
    shutil.copyfile(packages["digits"] / "tokenizer.json", tmp_path / "broken" / "tokenizer.json")
    assert made.chat(seen()).status == 200  # loading is tried again


def test_what_the_command_refuses(
    capsys: pytest.CaptureFixture[str], packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = packages["digits"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = vlpack(capsys, "serve", folder, "--port", port)
        assert (done.code, f"cannot listen at port {port}" in done.err, "--port" in done.err) == (2, True, True)
    for arguments, said in (
        ([folder, "--host", "0.0.0.0"], "Set one with --api-key"),
        ([folder, folder], "Two packages have the name 'digits'"),
        ([tmp_path], "is not a vlpack package"),
        ([folder, "--slots", "0"], "--slots is 0"),
        ([folder, "--stall", "1"], "--stall is 1"),
        ([folder, "--api-key", "a", "--no-auth"], "--api-key and --no-auth exclude each other"),
        ([folder, "--allow-origin", "x"], "--allow-origin is 'x'"),
    ):
        done = vlpack(capsys, "serve", *arguments)
        assert (done.code, said in done.err) == (2, True), done.err
        assert "Traceback" not in done.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'vlpack[serve]'" in vlpack(capsys, "serve", folder).err


@pytest.fixture
def command(packages: dict[str, Path]) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Returns a function that runs `vlpack serve` in its own process and returns the process and its address."""
    made: list[subprocess.Popen[str]] = []

    def get(*arguments: str) -> tuple[subprocess.Popen[str], str]:
        line = [sys.executable, "-m", "vlpack", "serve", *arguments, "--port", "0", "--threads", "1"]
        line += ["--context", "4000"]
        environment = {**os.environ, "VLPACK_API_KEY": "k3y"}
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        made.append(process)
        assert process.stdout is not None
        said = process.stdout.readline()
        return process, said.split(" at ")[1].split("/v1")[0]

    yield get
    for process in made:
        process.kill()
        process.communicate()


def stream(address: str, tokens: int) -> Any:
    body = {"model": "other", "messages": HELLO, "max_tokens": tokens, "stream": True, "temperature": 0}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer k3y"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_it_drains(packages: dict[str, Path], command: Callable[..., Any]) -> None:
    """After SIGTERM, running answers are finished and new requests are refused."""
    process, address = command(f"other={packages['tools']}")
    with stream(address, 600) as reply:
        reply.readline()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"{address}/health", timeout=5)
        lines = reply.read().decode().split("\n\n")
    assert lines[-2] == "data: [DONE]"
    assert '"finish_reason":"length"' in lines[-3]
    assert process.wait(20) == 0
    assert process.stderr.read() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_it_does_not_drain_for_ever(packages: dict[str, Path], command: Callable[..., Any]) -> None:
    process, address = command(f"other={packages['tools']}", "--drain-seconds", "0")
    with stream(address, 3900) as reply:
        reply.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_killed_and_started_again(packages: dict[str, Path], command: Callable[..., Any]) -> None:
    process, address = command(f"other={packages['tools']}")
    with stream(address, 3000) as reply:
        reply.readline()
        process.kill()
    _, again = command(f"other={packages['tools']}")
    with stream(again, 3) as reply:
        assert reply.read().decode().endswith("data: [DONE]\n\n")
