"""The web page at ``/``: its files, and the route that turns a PDF into images for it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from vlpack.server import pdf_worker
from vlpack.server.errors import ApiError, wrong
from vlpack.server.reading import read_bytes
from vlpack.server.settings import Settings

FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

PDF_SECONDS = 60.0
"""Largest number of seconds for rendering a PDF."""


def _send(name: str) -> Response:
    path = FOLDER / name
    kind = _TYPES.get(path.suffix)
    if kind is None or path.name != name or not path.is_file():
        raise ApiError(404, "There is no such address.")
    return Response(path.read_bytes(), media_type=f"{kind}; charset=utf-8", headers={"Cache-Control": "no-cache"})


async def index(_: Request) -> Response:
    """The HTML file of the page."""
    return _send("index.html")


async def icon(_: Request) -> Response:
    """The icon of the page."""
    return _send("icon.svg")


async def file(request: Request) -> Response:
    """Any file of the page, by name."""
    return _send(request.path_params["name"])


async def pdf(request: Request, settings: Settings) -> Any:
    """Renders a PDF and responds with its pages as ``data:`` URIs of JPEG images.

    Raises:
        ApiError: the body is not a valid PDF, or rendering it exceeds the limits of memory or time.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/pdf":
        raise ApiError(415, "The request must have the header Content-Type: application/pdf.")
    data = await read_bytes(request, settings.max_body)
    return JSONResponse({"pages": await asyncio.to_thread(_drawn, data)})


def _drawn(data: bytes) -> list[str]:
    command = [sys.executable, "-I", pdf_worker.__file__]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=PDF_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise wrong(f"The PDF's pages were not rendered within {PDF_SECONDS:g} seconds.") from None
    if done.returncode == pdf_worker.MISSING:
        raise ApiError(501, "PDFs need pypdfium2 on the server: pip install 'vlpack[serve]'.")
    if done.returncode:
        raise wrong("The PDF is damaged, protected, or needs too much memory.")
    return done.stdout.decode("ascii").split()
