"""Fixtures: servers on free ports of this machine, with packages that are built for the tests."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from retrieval import make_vision
from samples import DIGITS, IMAGES
from tiny import Tiny, make_checkpoint
from vlpack.builder import build
from vlpack.server.app import Server
from vlpack.server.run import listen
from vlpack.server.settings import Settings

TEMPLATE = """
{%- if tools %}<|im_start|>system
Functions:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Call one so: <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""A chat template that supports tools in the same way as Qwen3's."""


def data_uri(path: Path, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def seen(name: str = "00.png", question: str = "Read the digits.") -> list[dict[str, Any]]:
    """Messages with one of the shipped images, which the shipped checkpoint reads."""
    image = {"type": "image_url", "image_url": {"url": data_uri(IMAGES / name)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packages by name: one that reads digits, one whose template supports tools, an embedding model, a reranker."""
    folder = tmp_path_factory.mktemp("served")
    build(DIGITS, folder / "digits", precision="fp32", threads=1)
    source = make_checkpoint(folder / "source", Tiny(seed=1))
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    build(source, folder / "tools", precision="fp32", threads=1)
    shutil.rmtree(source)
    for task in ("embedding", "reranker"):
        source = make_vision(folder / f"{task}-source")
        build(source, folder / task, precision="fp32", threads=1, task=task)
    return {name: folder / name for name in ("digits", "tools", "embedding", "reranker")}


@dataclass
class Reply:
    """A response over HTTP."""

    status: int
    headers: Any
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def message(self) -> str:
        return str(self.json["error"]["message"])

    @property
    def events(self) -> list[Any]:
        """The data of all server-sent events in the response."""
        lines = [line[6:] for line in self.data.decode().split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Running:
    """A server that runs in a thread of this process.

    Attributes:
        url: address of the server.
        server: the server object.
    """

    def __init__(self, packages: dict[str, Path], settings: Settings) -> None:
        self.server = Server(packages, settings)
        self._socket = listen(settings)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.server.app, log_level="critical", lifespan="on"))
        self._thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)

    def ask(self, path: str, body: Any = None, **headers: str) -> Reply:
        """Sends a POST request with JSON, or with bytes unchanged; without a body, a GET request."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if data is not None else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, given)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return Reply(reply.status, reply.headers, reply.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.headers, error.read())

    def chat(self, messages: Any, model: str = "digits", **fields: Any) -> Reply:
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 20, **fields}
        return self.ask("/v1/chat/completions", body)

    def idle(self, model: str = "digits") -> None:
        """Waits until no request is running; fails if a slot stays in use."""
        engine = self.server.models.served[model].chats
        end = time.monotonic() + 20
        while engine.occupancy.busy or engine.occupancy.waiting:
            assert time.monotonic() < end, engine.occupancy
            time.sleep(0.02)

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self._thread.join(20)
        self._socket.close()
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def running(packages: dict[str, Path]) -> Iterator[Running]:
    """A server with all packages."""
    made = Running(packages, Settings(port=0, context=600, threads=1))
    yield made
    made.close()


@pytest.fixture
def start(packages: dict[str, Path]) -> Iterator[Callable[..., Running]]:
    """Returns a function that starts a server with these packages and settings; it ends after the test."""
    made: list[Running] = []

    def get(*names: str, **settings: Any) -> Running:
        chosen = {name: packages[name] for name in names or ("digits",)}
        made.append(Running(chosen, Settings(**{"port": 0, "context": 512, "threads": 1, **settings})))
        return made[-1]

    yield get
    for one in made:
        one.close()


def wrong(reply: Reply, status: int, said: str, param: str | None = None) -> None:
    """Checks that a response is an error in OpenAI's format with this status, text and param."""
    assert reply.status == status, reply.data
    error = reply.json["error"]
    assert said in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param
