"""A stand-in for the Hugging Face Hub on this machine: one repository, whose files are those of a folder."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

FIRST, SECOND = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


class LocalHub:
    """What the stand-in serves, and the paths that it was asked for.

    Attributes:
        folder: the files of the repository.
        commit: what its branch main means now.
        asked: method and path of every request.
        address: of the server.
        sizes: sizes that are told in place of the real ones, by file name.
    """

    def __init__(self, folder: Path, repository: str = "org/name") -> None:
        self.folder, self.repository, self.commit = folder, repository, FIRST
        self.asked: list[tuple[str, str]] = []
        self.address = ""
        self.sizes: dict[str, int] = {}

    @property
    def fetched(self) -> list[str]:
        """Names of the files that were downloaded."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path in self.asked
            if method == "GET" and "/resolve/" in path
        ]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Environment variables of a process that uses this Hub, with its caches below ``home``."""
        known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VLPACK_"))}
        ours = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home / "hf"),
            "VLPACK_CACHE": str(home / "vlpack"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "COLUMNS": "300",
            "NO_PROXY": "127.0.0.1",
        }
        return {**known, **ours, **more}


def _handler(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path))
            api = f"/api/models/{hub.repository}"
            parts = path.split("/")
            if path.startswith(f"{api}/revision/") and parts[-1] in ("main", "v1", hub.commit):
                return self.send_json({"id": hub.repository, "sha": hub.commit, "siblings": self.files()})
            if path == api:
                return self.send_json({"id": hub.repository, "sha": hub.commit, "siblings": self.files()})
            if path.startswith(f"{api}/tree/"):
                entries = [
                    {"type": "file", "path": one["rfilename"], "size": one["size"], "oid": one["blobId"]}
                    for one in self.files()
                ]
                return self.send_json(entries)
            place = hub.folder / parts[-1]
            if path.startswith(f"/{hub.repository}/resolve/{hub.commit}/") and place.is_file():
                return self.send_file(place, body=body)
            self.send_json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None

        def files(self) -> list[dict[str, Any]]:
            return [
                {
                    "rfilename": path.name,
                    "size": hub.sizes.get(path.name, path.stat().st_size),
                    "blobId": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in sorted(hub.folder.iterdir())
            ]

        def send_file(self, path: Path, *, body: bool) -> None:
            data = path.read_bytes()
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", hub.commit)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if body:
                self.wfile.write(data[start:])

        def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **(headers or {}),
            }.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


@contextmanager
def serving(folder: Path) -> Iterator[LocalHub]:
    """Serves the files of a folder as the repository ``org/name`` on 127.0.0.1 while the block runs."""
    hub = LocalHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
