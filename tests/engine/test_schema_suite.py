"""The schemas of JSON-Schema-Test-Suite: answers validate with jsonschema, or the schema is refused with a message."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from vlpack import Engine
from vlpack.engine import Handle
from vlpack.errors import OptionError

pytest.importorskip("llguidance")

CASES = json.loads((Path(__file__).parent / "json_schema_test_suite" / "schemas.json").read_text(encoding="utf-8"))
CHECKED = jsonschema.Draft202012Validator.FORMAT_CHECKER


def test_the_suite(engine: Callable[..., Engine]) -> None:
    made = engine(slots=8, context=256)
    asked: list[tuple[dict[str, Any], Handle]] = []
    refused: dict[str, list[str]] = defaultdict(list)
    for case in CASES:
        for seed in (None, 1, 2, 3):
            options: dict[str, Any] = {"temperature": 0} if seed is None else {"temperature": 1.5, "seed": seed}
            try:
                handle = made.submit("Hello", max_tokens=100, schema=case["schema"], wait=True, **options)
            except OptionError as error:
                said = str(error).splitlines()[0]
                assert said.startswith("schema is "), said
                refused[case["group"]].append(said)
                break
            asked.append((case, handle))
    ended = set()
    for case, handle in asked:
        answer = handle.result(60)
        if answer.finish_reason == "stop":
            validator = jsonschema.Draft202012Validator(case["schema"], format_checker=CHECKED)
            wrong = [error.message for error in validator.iter_errors(answer.parsed)]
            assert not wrong, (case, answer.text)
            ended.add((case["group"], case["description"]))
        else:  # a random model may never end an answer if the schema does not bound it
            assert (answer.finish_reason, answer.parsed) == ("length", None)
    taken = {(case["group"], case["description"]) for case, _ in asked}
    assert len(taken) > 160
    assert len(ended) > 0.95 * len(taken)
    # keywords that llguidance does not support are reported, not ignored
    for key in ("not", "if", "contains", "uniqueItems", "dependentRequired", "propertyNames", "unevaluatedProperties"):
        assert any(f'"{key}"' in said for group in refused.values() for said in group), key
    known = {"const", "enum", "required", "items", "pattern", "type", "properties", "prefixItems", "minLength"}
    assert not known & refused.keys()


@pytest.mark.parametrize("schema", [True, {"type": "array", "maxItems": 1.0, "items": {"type": "null"}}], ids=str)
def test_what_json_schema_takes_for_the_same(schema: Any, engine: Callable[..., Engine]) -> None:
    answer = engine().submit("Hello", max_tokens=100, temperature=1.5, seed=2, schema=schema).result(30)
    if answer.finish_reason == "stop":
        jsonschema.validate(answer.parsed, schema)


def test_false(engine: Callable[..., Engine]) -> None:
    with pytest.raises(OptionError, match="schema is false, which no answer obeys"):
        engine().submit("Hello", schema=False)
