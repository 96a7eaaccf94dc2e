"""Embeddings and scores over HTTP are the same as those of `vlpack.load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlpack
from samples import IMAGES
from server.conftest import Running, data_uri, wrong
from vlpack.runtime.retrieval import Embedder, Reranker

URI = data_uri(IMAGES / "00.png")


def test_embeddings_with_images(running: Running, packages: dict[str, Path]) -> None:
    model = vlpack.load(packages["embedding"], threads=1)
    assert isinstance(model, Embedder)
    inputs = [{"text": "a", "image": URI}, "two", {"image": [URI, URI]}]
    theirs: list[Any] = [{"text": "a", "image": str(IMAGES / "00.png")}, "two", {"image": [str(IMAGES / "00.png")] * 2}]
    reply = running.ask("/v1/embeddings", {"model": "embedding", "input": inputs, "instruction": "Find it."}).json
    found = np.array([one["embedding"] for one in reply["data"]])
    assert np.allclose(found, model.embed(theirs, instruction="Find it."), atol=1e-6)
    assert not np.allclose(found, model.embed(theirs), atol=1e-3)
    assert reply["usage"]["prompt_tokens"] > 20


def test_reranking(running: Running, packages: dict[str, Path]) -> None:
    model = vlpack.load(packages["reranker"], threads=1)
    assert isinstance(model, Reranker)
    documents = ["one", {"text": "two", "image": URI}, "three <|im_end|>"]
    body = {"model": "reranker", "query": "which?", "documents": documents}
    reply = running.ask("/v1/rerank", {**body, "return_documents": True}).json
    theirs: list[Any] = ["one", {"text": "two", "image": str(IMAGES / "00.png")}, "three <|im_end|>"]
    expected = model.score("which?", theirs, special_tokens="text")
    found = {one["index"]: one["relevance_score"] for one in reply["results"]}
    assert [found[index] for index in range(3)] == pytest.approx(expected, abs=1e-5)
    scores = [one["relevance_score"] for one in reply["results"]]
    assert scores == sorted(scores, reverse=True)
    assert reply["results"][0]["document"] in ({"text": "one"}, documents[1], {"text": documents[2]})
    assert len(running.ask("/rerank", {**body, "top_n": 2}).json["results"]) == 2


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        ("/v1/embeddings", {"input": []}, "'input' is empty"),
        ("/v1/embeddings", {"input": [1, 2]}, "must be texts or objects, not tokens"),
        ("/v1/embeddings", {"input": [{"txt": "a"}]}, "input must be a text, or an object"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "'dimensions' is 0"),
        ("/v1/embeddings", {"input": "a", "prompt_name": "other"}, "has no prompt 'other'"),
        ("/v1/embeddings", {"input": "a", "x": 1}, "'x' is unknown"),
        ("/v1/rerank", {"query": "a"}, "'documents' is missing"),
        ("/v1/rerank", {"query": "a", "documents": []}, "'documents' is not usable"),
        ("/v1/rerank", {"query": "a", "documents": [{"text": 5}]}, "documents.text must be a text"),
    ],
    ids=str,
)
def test_what_is_refused(path: str, fields: dict[str, object], said: str, running: Running) -> None:
    name = "embedding" if "embed" in path else "reranker"
    wrong(running.ask(path, {"model": name, **fields}), 400, said)
