"""Many clients at once: some disconnect, do not read or send invalid requests, and the others get correct answers."""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from samples import ANSWERS
from server.conftest import Running, seen

REQUESTS, CLIENTS = 200, 32


def test_many_clients_and_faults(start: Callable[..., Running]) -> None:
    made = start("digits", slots=4, queue=256, api_key="k", max_body=200_000)
    names = list(ANSWERS)
    authorized = {"Authorization": "Bearer k"}

    def body(index: int, **fields: object) -> bytes:
        asked = {"model": "digits", "messages": seen(names[index % len(names)]), "temperature": 0, "max_tokens": 40}
        return json.dumps({**asked, **fields}).encode()

    def open_one(index: int, **fields: object) -> socket.socket:
        data = body(index, **fields)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n"
        head += "Content-Type: application/json\r\nAuthorization: Bearer k\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", made.port))
        connection.settimeout(60)
        connection.sendall(head.encode() + data)
        return connection

    def one(index: int) -> str:
        kind = random.Random(index).choice(["right"] * 5 + ["stream", "leaves", "slow", "broken", "large", "key"])
        path = "/v1/chat/completions"
        if kind == "leaves":
            with open_one(index, stream=bool(index % 2), max_tokens=400):
                time.sleep(random.Random(index).random() / 5)
        elif kind == "slow":
            text = b""
            with open_one(index, stream=True) as connection:
                while not text.endswith(b"0\r\n\r\n"):
                    time.sleep(0.01)
                    text += connection.recv(64)
            assert b"data: [DONE]" in text
        elif kind == "broken":
            messages = seen()
            messages[0]["content"][0]["image_url"]["url"] = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA"
            reply = made.ask(path, body(index, messages=messages), **authorized)
            assert reply.status == 400
        elif kind == "large":
            assert made.ask(path, b" " * 200_001, **authorized).status == 413
        elif kind == "key":
            assert made.ask(path, body(index), Authorization="Bearer wrong").status == 401
        else:
            reply = made.ask(path, body(index, stream=kind == "stream"), **authorized)
            if kind == "stream":
                said = "".join(event["choices"][0]["delta"].get("content", "") for event in reply.events[:-1])
            else:
                said = reply.json["choices"][0]["message"]["content"]
            right = said.split() == ANSWERS[names[index % len(names)]]["read"].split()
            return kind if right else f"wrong: {names[index % len(names)]} {said!r}"
        return kind

    with ThreadPoolExecutor(CLIENTS) as pool:
        counted = Counter(pool.map(one, range(REQUESTS)))
    assert sum(counted.values()) == REQUESTS
    assert not [kind for kind in counted if kind.startswith("wrong")], counted
    assert len(counted) == 7
    made.idle("digits")
    served = made.server.models.served["digits"]
    end = time.monotonic() + 20
    while served.users or made.server.guard._active:
        assert time.monotonic() < end, (served.users, made.server.guard._active)
        time.sleep(0.02)
