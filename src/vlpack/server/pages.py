"""The web page at ``/``: its files, and the route that turns a PDF into images for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from vlpack.errors import InputError
from vlpack.preprocess.pdf import MissingPdfiumError, render
from vlpack.server.errors import ApiError, wrong
from vlpack.server.reading import read_bytes
from vlpack.server.settings import Settings

FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

MAX_PAGES = 20
"""Largest number of pages of a PDF that are rendered."""


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
    try:
        return render(data, 0, MAX_PAGES)
    except MissingPdfiumError:
        raise ApiError(501, "PDFs need pypdfium2 on the server: pip install 'vlpack[serve]'.") from None
    except InputError as error:
        raise wrong(error.message) from None
