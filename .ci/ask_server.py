"""Starts `vlpack serve` with a package of the digits model and asks it to read an image as JSON; fails if it does not.

Usage: python .ci/ask_server.py VLPACK PACKAGE
VLPACK is the program, PACKAGE a folder. The server listens on a free port of this machine and is stopped in the end.
"""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "examples" / "digits-images"
SCHEMA = {
    "type": "object",
    "properties": {"digits": {"type": "string", "pattern": "^[0-9]$"}},
    "required": ["digits"],
    "additionalProperties": False,
}
WAIT = 60
"""Largest number of seconds until the server listens."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def request(base: str, path: str, body: dict[str, object] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(base + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=WAIT) as answer:
        return bytes(answer.read())


def main(vlpack: str, package: str) -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([vlpack, "serve", package, "--port", str(port)])
    try:
        for _ in range(WAIT * 10):
            try:
                request(base, "/health")
                break
            except OSError:
                time.sleep(0.1)
        image = base64.b64encode((IMAGES / "00.png").read_bytes()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": "Read the digits."},
        ]
        body: dict[str, object] = {
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "digits", "schema": SCHEMA}},
        }
        answer = json.loads(request(base, "/v1/chat/completions", body))["choices"][0]["message"]["content"]
        counted = b"vlpack_answer_tokens_total{" in request(base, "/metrics")
    finally:
        server.terminate()
        ended = server.wait(WAIT)
    print(f"the answer is {answer}, metrics: {counted}, exit code {ended}")
    digits = json.loads(answer)["digits"]
    sys.exit(not (len(digits) == 1 and digits.isdigit() and counted and ended == 0))


if __name__ == "__main__":
    main(*sys.argv[1:])
