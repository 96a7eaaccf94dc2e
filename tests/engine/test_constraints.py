"""Constrained decoding: answers match the schema, regular expression, grammar or choices, even with random weights."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jsonschema
import pydantic
import pytest

from vlpack import Engine, Sampling
from vlpack.engine.constraints import Constraint
from vlpack.errors import OptionError, VlpackError

pytest.importorskip("llguidance")

GREEDY = Sampling(temperature=0)
TEXT = {"type": "string", "maxLength": 5}
SCHEMAS: list[dict[str, Any]] = [
    {"enum": ["red", "green", 3, None]},
    {"type": "boolean"},
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {
        "type": "object",
        "properties": {"name": TEXT, "tags": {"type": "array", "items": TEXT, "maxItems": 2}, "open": {"type": "null"}},
        "required": ["name", "tags"],
        "additionalProperties": False,
    },
    {"anyOf": [{"const": "none"}, {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}]},
    {
        "$defs": {"leaf": {"type": "string", "pattern": "^[a-c]{2,4}$"}},
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/leaf"}, "date": {"type": "string", "format": "date"}},
        "required": ["left", "date"],
        "additionalProperties": False,
    },
]


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without additional properties, because a random model would never stop adding them."""
    if "anyOf" in schema:
        return {"anyOf": [closed(each) for each in schema["anyOf"]]}
    return {**schema, "additionalProperties": False} if "properties" in schema else schema


def test_json_schemas(engine: Callable[..., Engine]) -> None:
    made = engine(slots=4)
    asked = [(closed(schema), seed) for schema in SCHEMAS for seed in (None, 1, 2)]
    handles = [
        made.submit("Hello", max_tokens=200, schema=schema, **({"temperature": 0} if seed is None else _wild(seed)))
        for schema, seed in asked
    ]
    free = made.submit("Hello", max_tokens=30, sampling=GREEDY)
    texts = set()
    for (schema, _), handle in zip(asked, handles, strict=True):
        answer = handle.result(60)
        assert answer.finish_reason == "stop", answer.text
        jsonschema.validate(answer.parsed, schema)
        assert json.loads(answer.text) == answer.parsed
        assert (
            answer.text == json.dumps(answer.parsed, separators=(",", ":"), ensure_ascii=False) or "\\" in answer.text
        )
        texts.add(answer.text)
    assert len(texts) > len(SCHEMAS)
    assert free.result(60).tokens == engine().submit("Hello", max_tokens=30, sampling=GREEDY).result(60).tokens


def _wild(seed: int) -> dict[str, Any]:
    return {"temperature": 1.5, "seed": seed}


class Invoice(pydantic.BaseModel, extra="forbid"):
    number: int = pydantic.Field(ge=0, le=9999)
    paid: bool


def test_a_pydantic_class(engine: Callable[..., Engine]) -> None:
    answer = engine().submit("Hello", max_tokens=60, temperature=0, schema=Invoice).result(60)
    assert isinstance(answer.parsed, Invoice)
    assert answer.parsed == Invoice.model_validate_json(answer.text)

    class Never(Invoice):
        @pydantic.field_validator("number")
        @classmethod
        def refuse(cls, value: int) -> int:
            raise ValueError(f"{value} is no number of ours")

    with pytest.raises(VlpackError, match="is no number of ours"):
        engine().submit("Hello", max_tokens=60, temperature=0, schema=Never).result(60)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_regex_grammar_and_choices(seed: int, engine: Callable[..., Engine]) -> None:
    made, options = engine(), {"max_tokens": 50, **_wild(seed)}
    text = made.submit("Hello", regex=r"\d{4}-[A-Z]{2}(a|b)?", **options).result(60).text
    assert re.fullmatch(r"\d{4}-[A-Z]{2}(a|b)?", text)
    lark = 'start: "<" WORD ("," WORD)? ">"\nWORD: /[a-z]{1,3}/'
    assert re.fullmatch(r"<[a-z]{1,3}(,[a-z]{1,3})?>", made.submit("Hello", lark=lark, **options).result(60).text)
    choices = ["a.b", "c|d", "(é)", "two words\n"]
    answer = made.submit("Hello", choices=choices, **options).result(60)
    assert (answer.text in choices, answer.finish_reason, answer.parsed) == (True, "stop", None)


def test_a_choice_that_is_the_beginning_of_another(engine: Callable[..., Engine]) -> None:
    """If one choice is the beginning of another, the answer may end there or continue."""
    found = {engine().submit("Hello", choices=["a", "ab"], **_wild(seed)).result(60).text for seed in range(12)}
    assert found <= {"a", "ab"}


def test_an_answer_that_is_cut_off_is_not_parsed(engine: Callable[..., Engine]) -> None:
    schema = {"type": "array", "items": {"enum": ["long", "words"]}, "minItems": 9}
    answer = engine().submit("Hello", max_tokens=5, temperature=0, schema=schema).result(60)
    assert (answer.finish_reason, answer.parsed, len(answer.tokens)) == ("length", None, 5)


def test_a_grammar_that_fails_during_an_answer_is_reported(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> Any:
        raise OptionError("regex cannot be followed further: too complex")

    made = engine()
    other = made.submit("Hello", max_tokens=300, sampling=GREEDY)
    with monkeypatch.context() as patched:
        patched.setattr(Constraint, "allowed", fail)
        with pytest.raises(OptionError, match="too complex"):
            made.submit("Hello", regex="a*").result(60)
    assert made.submit("Hello", regex="aa", max_tokens=5).result(60).text == "aa"
    other.cancel()
    assert other.result(30).finish_reason == "interrupted"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"regex": "(("}, "regex is not usable: .*unclosed group"),
        ({"lark": "start: nothing"}, 'lark is not usable: .*unknown name: "nothing"'),
        ({"schema": {"type": "strange"}}, "schema is not usable: .*strange"),
        ({"schema": "{}"}, "must be a JSON schema or a pydantic class"),
        ({"schema": {"enum": [b"bytes"]}}, "schema is not JSON"),
        ({"choices": []}, "choices is"),
        ({"choices": "ab"}, "choices is 'ab'; it must be a list"),
        ({"regex": ""}, "regex is ''"),
        ({"lark": 5}, "lark is 5"),
        ({"regex": "a", "choices": ["b"]}, "regex and choices are both given"),
    ],
    ids=str,
)
def test_unusable_constraints_are_refused_at_once(options: Any, said: str, engine: Callable[..., Engine]) -> None:
    with pytest.raises(OptionError, match=said):
        engine().submit("Hello", **options)


def test_without_llguidance(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError, match=r"need llguidance.*\n.*pip install 'vlpack\[engine\]'"):
        made.submit("Hello", regex="a")
    assert made.submit("Hello", max_tokens=2).result(30).tokens
