"""Sends many requests to a server at once, some of them invalid or aborted, and measures the server's memory.

Usage: python benchmarks/server_load.py PACKAGE [--requests 2000] [--clients 32] [--output load.json]

PACKAGE must be a package that reads the shipped images (vlpack demo --output digits). The script starts `vlpack serve`
in its own process. It fails if an answer is wrong, if a slot stays in use, or if the memory after all requests is more
than 5% above that after the first tenth.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parents[1] / "examples" / "digits-images"
ANSWERS = json.loads((IMAGES / "answers.json").read_text(encoding="utf-8"))
NAMES = list(ANSWERS)
KINDS = ["right"] * 6 + ["stream", "leaves", "slow", "broken", "large", "key"]


def message(name: str, url: str | None = None) -> list[dict[str, Any]]:
    data = base64.b64encode((IMAGES / name).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": url or f"data:image/png;base64,{data}"}}
    return [{"role": "user", "content": [image, {"type": "text", "text": "Read the digits."}]}]


class Client:
    """A client that sends requests of many kinds to a server on this machine."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.seconds: list[float] = []

    def __call__(self, index: int) -> str:
        chance = random.Random(index)
        kind = chance.choice(KINDS)
        name = NAMES[index % len(NAMES)]
        fields: dict[str, Any] = {"messages": message(name), "temperature": 0, "max_tokens": 40}
        if kind == "leaves":
            self._leave({**fields, "stream": bool(index % 2), "max_tokens": 400}, chance.random() / 5)
            return kind
        if kind == "broken":
            fields["messages"] = message(name, "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA")
        data = (
            b" " * (1 << 20)
            if kind == "large"
            else json.dumps({**fields, "stream": kind in ("stream", "slow")}).encode()
        )
        began = time.perf_counter()
        status, text = self._ask(data, "wrong" if kind == "key" else "k3y", slow=kind == "slow")
        if kind in ("broken", "large", "key"):
            return kind if status == {"broken": 400, "large": 413, "key": 401}[kind] else f"status {status} to {kind}"
        if status != 200:
            return f"status {status}: {text[:200]}"
        if kind == "right":
            self.seconds.append(time.perf_counter() - began)
            said = json.loads(text)["choices"][0]["message"]["content"]
        else:
            events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
            said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        return kind if said.split() == ANSWERS[name]["read"].split() else f"wrong: {name}: {said!r}"

    def _head(self, key: str) -> dict[str, str]:
        return {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def _ask(self, data: bytes, key: str, slow: bool) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        try:
            connection.request("POST", "/v1/chat/completions", data, self._head(key))
            reply = connection.getresponse()
            pieces = []
            while piece := reply.read1(64) if slow else reply.read():
                pieces.append(piece)
                time.sleep(0.01 if slow else 0)
            return reply.status, b"".join(pieces).decode()
        finally:
            connection.close()

    def _leave(self, fields: dict[str, Any], seconds: float) -> None:
        data = json.dumps(fields).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in self._head("k3y").items()]
        with socket.create_connection(("127.0.0.1", self._port)) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + data)
            time.sleep(seconds)

    def figures(self) -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("GET", "/metrics", headers=self._head("k3y"))
        text = connection.getresponse().read().decode()
        return {name: float(value) for name, value in re.findall(r"^(\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)}


def resident(pid: int) -> int:
    """The resident memory of a process in bytes (Linux)."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    command = [sys.executable, "-m", "vlpack", "serve", given.package, "--port", "0", "--api-key", "k3y"]
    command += ["--queue", "256", "--max-body", "200000", "--context", "512"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(re.search(r":(\d+)/v1", server.stdout.readline())[1])  # type: ignore[index]
        client = Client(port)
        counted: Counter[str] = Counter()
        memory = []
        began = time.perf_counter()
        tenth = given.requests // 10
        with ThreadPoolExecutor(given.clients) as pool:
            for start in range(0, given.requests, tenth):
                counted.update(pool.map(client, range(start, start + tenth)))
                memory.append(resident(server.pid))
        seconds = time.perf_counter() - began
        end = time.monotonic() + 30
        while client.figures()["vlpack_slots_busy"] and time.monotonic() < end:
            time.sleep(0.1)
        figures = client.figures()
    finally:
        server.terminate()
        code = server.wait(60)
    unexpected = [kind for kind in counted if kind not in KINDS]
    result = {
        "requests": given.requests,
        "clients": given.clients,
        "seconds": round(seconds, 1),
        "answered": dict(counted),
        "memory": memory,
        "growth": memory[-1] / memory[0] - 1,
        "median_seconds": statistics.median(client.seconds),
        "slots_busy": figures["vlpack_slots_busy"],
        "exit_code": code,
    }
    print(json.dumps(result, indent=1))
    if given.output:
        given.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if unexpected or result["slots_busy"] or code or result["growth"] > 0.05:
        sys.exit("The server did not behave as expected.")


if __name__ == "__main__":
    main()
