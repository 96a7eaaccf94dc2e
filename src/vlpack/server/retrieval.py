"""The routes ``/v1/embeddings`` and ``/v1/rerank``: their fields and responses."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from vlpack.runtime.retrieval import Embedder, Reranker
from vlpack.server.errors import too_large, wrong
from vlpack.server.media import Downloads, check_images, image_part, read_image
from vlpack.server.models import Served
from vlpack.server.reading import Fields
from vlpack.server.settings import Settings

MAX_INPUTS = 2048
"""Largest number of inputs or documents of a request."""


class EmbeddingFields(Fields):
    """Fields of a request to ``/v1/embeddings``."""

    model: str | None = None
    input: str | list[Any] | dict[str, Any]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    user: str | None = None


class RerankFields(Fields):
    """Fields of a request to ``/v1/rerank``."""

    model: str | None = None
    query: str | dict[str, Any]
    documents: list[Any] = Field(min_length=1)
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = False
    instruction: str | None = None
    prompt_name: str | None = None
    user: str | None = None


def read_inputs(given: list[Any], name: str, settings: Settings, *, instruction: bool) -> list[Any]:
    """Checks inputs and returns them as objects with ``text``, ``image`` (a list of `ImagePart`) and ``instruction``.

    An input of a request is a text, or an object whose ``image`` is a URL or a list of URLs.

    Raises:
        ApiError: an input is invalid, or the inputs exceed a limit of the server.
    """
    if not given:
        raise wrong(f"'{name}' is empty.", name)
    if len(given) > MAX_INPUTS:
        raise too_large(f"'{name}' has {len(given)} entries; this server takes {MAX_INPUTS} at most.", name)
    if all(isinstance(item, int) for item in given):
        raise wrong(f"'{name}' must be texts or objects, not tokens.", name)
    known = ("text", "image", "instruction") if instruction else ("text", "image")
    parts: list[dict[str, Any]] = []
    size = images = 0
    for place, item in enumerate(given):
        where = f"{name}[{place}]" if len(given) > 1 else name
        part = {"text": item} if isinstance(item, str) else item
        if not isinstance(part, Mapping) or not part or any(key not in known for key in part):
            raise wrong(f"{where} must be a text, or an object with {', '.join(known)}.", where)
        for key in ("text", "instruction"):
            if not isinstance(part.get(key, ""), str):
                raise wrong(f"{where}.{key} must be a text.", f"{where}.{key}")
            size += len(part.get(key, ""))
        shown = part.get("image", [])
        urls = [image_part(url, f"{where}.image") for url in (shown if isinstance(shown, list) else [shown])]
        images += len(urls)
        parts.append({**part, **({"image": urls} if urls else {})})
    if size > settings.max_prompt:
        raise too_large(f"'{name}' has {size} characters; this server takes {settings.max_prompt} at most.", name)
    check_images(images, settings)
    return parts


def fetched(inputs: list[Any], settings: Settings) -> list[Any]:
    """Downloads the images of inputs that are given as URLs; blocks."""
    download = Downloads(settings)
    return [{**one, **({"image": [*map(download, one["image"])]} if "image" in one else {})} for one in inputs]


def decoded(inputs: list[Any], settings: Settings) -> list[Any]:
    """Decodes the images of inputs for `vlpack.runtime.retrieval`; blocks."""
    images = [[read_image(part, settings) for part in one.get("image", ())] for one in inputs]
    return [{**one, **({"image": found} if found else {})} for one, found in zip(inputs, images, strict=True)]


def embeddings(served: Served, fields: EmbeddingFields, inputs: list[Any]) -> dict[str, Any]:
    """Computes the response of ``/v1/embeddings``; blocks, and must not be called twice at the same time."""
    model = served.encoder
    assert isinstance(model, Embedder), "it was asked for its task"
    before = model.tokens
    rows = model.embed(
        inputs,
        instruction=fields.instruction,
        prompt=fields.prompt_name,
        dimensions=fields.dimensions,
        special_tokens="text",
    )
    used = model.tokens - before
    encoded = fields.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode() if encoded else row.tolist(),
        }
        for index, row in enumerate(rows)
    ]
    tokens = {"prompt_tokens": used, "total_tokens": used}
    return {"object": "list", "model": served.name, "data": data, "usage": tokens}


def ranking(served: Served, fields: RerankFields, inputs: list[Any]) -> dict[str, Any]:
    """Computes the response of ``/v1/rerank``, best document first; blocks; only one call at a time.

    Args:
        served: loaded reranker.
        fields: fields of the request.
        inputs: query, followed by the documents.
    """
    query, *documents = inputs
    model = served.encoder
    assert isinstance(model, Reranker), "it was asked for its task"
    before = model.tokens
    scores = model.score(
        query, documents, instruction=fields.instruction, prompt=fields.prompt_name, special_tokens="text"
    )
    used = model.tokens - before
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: fields.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if fields.return_documents:
        for result in results:
            document = fields.documents[result["index"]]
            result["document"] = {"text": document} if isinstance(document, str) else document
    tokens = {"prompt_tokens": used, "total_tokens": used}
    return {"id": f"rerank-{uuid.uuid4().hex}", "model": served.name, "results": results, "usage": tokens}
