"""Batches over files in OpenAI's batch format, whose requests are answered as the server answers them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bulk.conftest import rows_of, write_rows
from samples import ANSWERS, IMAGES, READ
from vlpack import Sampling
from vlpack.bulk import BatchResult
from vlpack.errors import OptionError

Ask = Callable[..., BatchResult]


def request(key: Any, name: str = "00.png", **fields: Any) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode((IMAGES / name).read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": READ}]
    body = {"model": "gpt-x", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 20}
    return {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": {**body, **fields}}


@pytest.fixture
def plain(ask: Ask) -> Ask:
    """Returns a function that runs a batch without the options that each request has itself."""
    return lambda *arguments, **options: ask(*arguments, **{"max_tokens": None, "sampling": None, **options})


def test_requests_get_responses(plain: Ask, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    rows = [request(f"r{name}", name) for name in sorted(ANSWERS)[:5]]
    rows += [request("two", n=2, logprobs=True), request("json", response_format=form)]
    result = plain(write_rows(tmp_path / "rows.jsonl", rows))
    assert (result.rows, result.errors) == (7, 0)
    assert result.tokens_per_second > 0
    found = rows_of(tmp_path / "out")
    assert [row["custom_id"] for row in found] == [row["custom_id"] for row in rows]
    assert len({row["id"] for row in found}) == 7
    for row, name in zip(found, sorted(ANSWERS), strict=False):
        response = row["response"]
        assert (row["error"], response["status_code"]) == (None, 200)
        body = response["body"]
        if row["custom_id"].startswith("r"):
            assert (body["object"], body["model"]) == ("chat.completion", "digits")
            assert body["choices"][0]["message"]["content"].split() == ANSWERS[name]["read"].split()
            assert body["usage"]["completion_tokens"] > 0
    assert len(found[5]["response"]["body"]["choices"]) == 2
    assert found[5]["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert json.loads(found[6]["response"]["body"]["choices"][0]["message"]["content"])["n"] in (1, 2)
    assert plain(tmp_path / "rows.jsonl").answered == 0


def test_requests_that_are_wrong(plain: Ask, tmp_path: Path) -> None:
    remote = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]
    local = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]
    rows: list[Any] = [
        request("good"),
        request("good"),
        request("unknown", flavour=1),
        request("stream", stream=True),
        request("remote", messages=remote),
        request("local", messages=local),
        request("long", messages=[{"role": "user", "content": "word " * 300}]),
        {**request("route"), "url": "/v1/embeddings"},
        {**request("extra"), "priority": 1},
        {**request("body"), "body": []},
        {"url": "/v1/chat/completions", "method": "POST", "body": {}},
        "{",
    ]
    result = plain(write_rows(tmp_path / "rows.jsonl", rows))
    found = rows_of(tmp_path / "out")
    assert result.errors == 11
    assert [row["response"]["status_code"] for row in found] == [200] + [400] * 11
    said = [row["response"]["body"]["error"]["message"] for row in found[1:]]
    for message, part in zip(
        said,
        [
            "An earlier row has the same custom_id",
            "'flavour' is unknown",
            "'stream' has no effect in a batch",
            "URLs, which are not downloaded",
            "files are not read",
            "room for 200",
            "asks for '/v1/embeddings', which is not answered",
            "unknown key 'priority'",
            "must be a JSON object",
            "has no 'custom_id'",
            "line 12 is not JSON",
        ],
        strict=True,
    ):
        assert part in message, message
    assert found[6]["response"]["body"]["error"]["code"] == "context_length_exceeded"


def test_options_that_requests_have_themselves(plain: Ask, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [request("a", max_tokens=None)])
    sampling = Sampling(temperature=0)
    for options in ({"prompt": "x"}, {"system": "x"}, {"sampling": sampling}, {"choices": ["a"]}, {"files": tmp_path}):
        with pytest.raises(OptionError, match="has no effect on requests in OpenAI's batch format"):
            plain(path, **options)
    with pytest.raises(OptionError, match="answers in OpenAI's batch format are JSON lines"):
        plain(path, format="parquet")
    plain(path, max_tokens=1)  # for requests without a limit
    (row,) = rows_of(tmp_path / "out")
    assert row["response"]["body"]["usage"]["completion_tokens"] == 1


def test_without_fastapi(plain: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [request("a")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"needs fastapi and pydantic.*\n.*pip install 'vlpack\[serve\]'"):
        plain(path)
