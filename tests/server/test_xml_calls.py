"""Tool calls in Qwen3.5's form: parsed into JSON by the functions' schemas, and forced by grammars."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from architectures.test_family import HYBRID, QWEN3_5
from family import Member, make_member
from server.conftest import Running
from server.test_tools import constraint, followed
from vlpack.builder import build
from vlpack.engine.constraints import Grammars, grammar_of
from vlpack.preprocess import PromptBuilder
from vlpack.server.errors import ApiError
from vlpack.server.settings import Settings
from vlpack.server.tools import Tools, read_tools
from vlpack.server.xml_calls import XmlCallStream, value_of

MEMBER = Member(
    "xml", "Qwen3_5Config", "Qwen3_5ForConditionalGeneration", text=HYBRID | {"max_position_embeddings": 2048},
    vision=QWEN3_5,
)  # fmt: skip
TEMPLATE = """
{%- if tools %}<|im_start|>system
# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Call one so: <tool_call>
<function=NAME>
<parameter=NAME>
VALUE
</parameter>
</function>
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
<function={{ call.function.name }}>
{% for name, value in call.function.arguments | items %}<parameter={{ name }}>
{{ value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
<think>
{% if enable_thinking is defined and not enable_thinking %}
</think>

{% endif %}{% endif %}"""
"""A chat template that thinks by default and has tool calls of Qwen3.5's form."""

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "loud": {"type": "boolean"},
        "list": {"type": "array", "items": {"type": "integer"}},
        "place": {"$ref": "#/$defs/place"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "maybe": {"type": ["string", "null"]},
        "size": {"enum": [1, "one", None]},
        "any": {},
    },
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
}
FUNCTION = {"name": "f", "parameters": SCHEMA}


def call(name: str = "f", **values: str) -> str:
    parts = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parts}</function>\n</tool_call>"


def read(text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of an answer that arrives in pieces of ``size`` characters."""
    stream, said, calls = XmlCallStream([FUNCTION]), "", []
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    for found in [*(one for piece in pieces for one in stream.push(piece)), *stream.flush()]:
        if found.kind == "text":
            said += found.text
        elif found.kind == "call":
            calls.append((found.text, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + found.text)
    return said, calls


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("No call <function=f>", "No call <function=f>", []),
        (call(text="a"), "", [("f", '{"text": "a"}')]),
        (call(), "", [("f", "{}")]),
        (f"I see.\n\n{call(text='a', count='2')}", "I see.", [("f", '{"text": "a", "count": 2}')]),
        (f"{call(text='a')}\n{call(text='b')}\n", "", [("f", '{"text": "a"}'), ("f", '{"text": "b"}')]),
        (f"{call(text='a')} after", " after", [("f", '{"text": "a"}')]),
        (call(text='two\nlines with "quotes" </p> é'), "", [("f", '{"text": "two\\nlines with \\"quotes\\" </p> é"}')]),
        (call(text=""), "", [("f", '{"text": ""}')]),
        (call(text="\n5\n"), "", [("f", '{"text": "\\n5\\n"}')]),
        ("<tool_call><function=f><parameter=text>a</parameter></function></tool_call>", "", [("f", '{"text": "a"}')]),
        ("<tool_call>\n<function=f>\n<parameter=text>\na\n</function>\n</tool_call>", "", [("f", '{"text": "a"}')]),
        ("<tool_call>\n<function=f>\n</tool_call>", "", [("f", "{}")]),
        (call(text="a").replace("</function>", "<parameter=text>\nb\n</parameter>\n</function>"), "",
         [("f", '{"text": "a"}')]),
        ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
        ("<tool_call>\n<function=>\n</tool_call>", "<tool_call>\n<function=>\n</tool_call>", []),
        ("<tool_call>\n<function=f", "<tool_call>\n<function=f", []),
        (call(text="a", count="5")[:60], "", [("f", '{"text": "a"')]),  # cut off: the JSON is not complete
        (call("g", a="5"), "", [("g", '{"a": "5"}')]),  # an unknown function: all its parameters are texts
    ],
)  # fmt: skip
def test_calls_in_a_text(text: str, said: str, calls: Any, size: int) -> None:
    assert read(text, size) == (said, calls)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("text", "5", "5"), ("text", "null", "null"), ("text", "true", "true"),
        ("count", "5", 5), ("count", "-5", -5), ("count", "5.0", 5), ("count", "5.5", "5.5"), ("count", "true", "true"),
        ("share", "5", 5), ("share", "1e3", 1000.0), ("share", "NaN", "NaN"), ("share", "1e999", "1e999"),
        ("loud", "True", True), ("loud", "false", False), ("loud", "yes", "yes"),
        ("list", "[1, 2]", [1, 2]), ("list", '{"a": 1}', '{"a": 1}'), ("list", "[" * 100_000, "[" * 100_000),
        ("list", "[NaN]", "[NaN]"), ("place", '{"x": 1e999}', '{"x": 1e999}'),
        ("place", '{"x": 1}', {"x": 1}),
        ("either", "3", 3), ("either", "None", None), ("either", "x", "x"),
        ("maybe", "x", "x"), ("maybe", "null", None), ("maybe", "3", "3"),
        ("size", "1", 1), ("size", "one", "one"), ("size", "null", None), ("size", "2", "2"),
        ("any", "3", "3"), ("unknown", "3", "3"),
    ],
)  # fmt: skip
def test_what_a_text_stands_for(name: str, text: str, value: Any) -> None:
    ((_, arguments),) = read(call(**{name: text}), 10**6)[1]
    assert json.loads(arguments) == {name: value}
    assert type(json.loads(arguments)[name]) is type(value)


def test_schemas_without_end() -> None:
    endless = {"properties": {"a": {"$ref": "#/properties/a"}, "b": {"$ref": "#/$defs/none"}}}
    stream = XmlCallStream([{"name": "f", "parameters": endless}])
    found = "".join(piece.text for piece in stream.push(call(a="1", b="2")) if piece.kind == "arguments")
    assert json.loads(found) == {"a": "1", "b": "2"}
    # 20 references in each of 8 levels: 20 ** 8 alternatives
    levels: dict[str, Any] = {str(n): {"anyOf": [{"$ref": f"#/$defs/{n + 1}"}] * 20} for n in range(7)}
    many = {"$ref": "#/$defs/0"}
    root = {"properties": {"a": many}, "$defs": {**levels, "7": {"type": "integer"}}}
    assert value_of("1", many, root) == "1"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("xml")
    source = make_member(folder / "source", MEMBER)
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    build(source, folder / "package", precision="fp32", threads=1)
    return folder / "package"


@pytest.fixture(scope="module")
def prompts(package: Path) -> PromptBuilder:
    return PromptBuilder.from_folder(package, image_token_id=2060, video_token_id=2061)


@pytest.fixture(scope="module")
def takes(package: Path, prompts: PromptBuilder) -> Callable[[Any, str], bool]:
    """Returns a function that checks whether a whole answer satisfies the constraint in options of the engine."""
    pytest.importorskip("llguidance")
    grammars = Grammars(package / "tokenizer.json", 2176, {2050})

    def check(options: Any, text: str) -> bool:
        grammar = grammar_of(**options)
        assert grammar is not None
        made = grammars.constraint(grammar)
        for token in prompts.tokenizer.encode(text):
            if not made.allowed()[token]:
                return False
            made.push(token)
        return made.complete

    return check


def tool(name: str, required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*(required or properties)]}
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": True}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string"}, ["a", "", "two\nlines </p>", "5"], []),
        ({"enum": ["red", "light blue", 3]}, ["red", "light blue", "3"], ["green", "re", "4"]),
        ({"const": "a/b"}, ["a/b"], ["a"]),
        ({"type": "integer", "minimum": 0}, ["0", "17"], ["-1", "1.5", "x", ""]),
        ({"type": "number"}, ["0.5", "-3"], ["x"]),
        ({"type": "boolean"}, ["true", "False"], ["yes", "1"]),
        ({"type": "null"}, ["null"], ["x"]),
        ({"type": ["integer", "null"]}, ["3", "null"], ["x"]),
        ({"type": ["string", "null"]}, ["x", "null"], []),
        ({"anyOf": [{"enum": ["auto"]}, {"type": "boolean"}]}, ["auto", "true"], ["x"]),
        ({"type": "array", "items": {"type": "integer"}}, ["[]", "[1, 2]"], ["[1, x]", "1"]),
        ({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}, ['{"x": 1}'],
         ["{}", '{"x": 1, "y": 2}']),
        ({"type": "string", "pattern": "^[a-c]+$"}, ["abc"], ["abd", ""]),
        ({"type": "string", "pattern": "b"}, ["abc", "b"], ["ac"]),
        ({"type": "string", "pattern": "^(a|b/c)$"}, ["a", "b/c"], ["b"]),
        ({"type": "string", "pattern": r"^[^\/]\/\\/$"}, ["a/\\/"], ["a\\/", "//\\/", "a/\\"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc"], ["a", "abcd"]),
        ({"type": "string", "format": "date"}, ["2026-11-28"], ["28.11.2026"]),
        ({}, ["whatever", "3"], []),
    ],
)  # fmt: skip
def test_values_in_grammars(
    schema: Any, right: list[str], wrong: list[str], prompts: PromptBuilder, takes: Callable[[Any, str], bool]
) -> None:
    rules = constraint(prompts, read_tools([tool("f", a=schema)], "required", None, prompts))
    for text in right:
        assert takes(rules, call(a=text)), text
    for text in wrong:
        assert not takes(rules, call(a=text)), text


def test_calls_in_grammars(prompts: PromptBuilder, takes: Callable[[Any, str], bool]) -> None:
    tools = [tool("turn", ("angle",), angle={"enum": [90, 180]}, fast={"type": "boolean"}), tool("say", word={})]
    required = constraint(prompts, read_tools(tools, "required", None, prompts))
    assert takes(required, call("turn", angle="90"))
    assert takes(required, call("turn", angle="90", fast="true"))
    assert takes(required, f"{call('turn', angle='90')}\n{call('say', word='no')}")
    assert not takes(required, call("turn", fast="true"))  # angle is required
    assert not takes(required, call("turn", angle="90", more="1"))
    assert not takes(required, call("burn", angle="90"))
    assert not takes(required, "Hello")
    named = constraint(prompts, read_tools(tools, {"type": "function", "function": {"name": "say"}}, None, prompts))
    assert takes(named, call("say", word="no"))
    assert not takes(named, call("turn", angle="90"))
    free = constraint(prompts, read_tools(tools, "auto", None, prompts))  # the tools are strict
    assert takes(free, f"I turn. {call('turn', angle='90')}")
    assert not takes(free, f"I turn. {call('turn', angle='91')}")
    thinking = constraint(prompts, read_tools(tools, "required", None, prompts), True)
    assert takes(thinking, f"I think.\n</think>\n\n{call('turn', angle='90')}")
    assert not takes(thinking, "I think.\n</think>\n\nHello")
    anything = {"type": "function", "function": {"name": "g"}}
    no_schema = constraint(prompts, read_tools([anything], "required", None, prompts))
    assert takes(no_schema, call("g"))
    assert takes(no_schema, call("g", a="1", b="2"))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "idn-email"},
        {"type": "string", "pattern": "^a|b$"},
        {"type": "string", "pattern": r"a\b"},
        {"type": "string", "pattern": "a", "minLength": 3},
        {"type": "string", "pattern": "[" * 2001 + "]"},
        {"type": "string", "pattern": 5},
        {"type": "string", "format": ["date"]},
        {"type": "string", "minLength": "3"},
        {"type": "string", "maxLength": -3},
        False,
    ],
)
def test_what_cannot_be_forced_is_an_error(schema: Any, prompts: PromptBuilder) -> None:
    with pytest.raises(ApiError, match="'a' of the function 'f' has"):
        constraint(prompts, read_tools([tool("f", a=schema)], "required", None, prompts))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"properties": "x"}, "'properties' must be an object"),
        ({"properties": [{"a": 1}]}, "'properties' must be an object"),
        ({"properties": {}, "required": 5}, "'required' must be a list of names"),
        ({"properties": {}, "required": [["a"]]}, "'required' must be a list of names"),
    ],
)
def test_parameters_that_are_no_schema(parameters: Any, said: str, prompts: PromptBuilder) -> None:
    given = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(ApiError, match=said):
        constraint(prompts, read_tools([given], "required", None, prompts))


def test_reasoning_and_calls_apart() -> None:
    offered = Tools((tool("f", a={"type": "integer"}),), "auto", xml=True)
    pieces, said = followed(["Hm", ",\n</thi", "nk>\n\nI turn.\n\n", call(a="9")[:30], call(a="9")[30:]],
                            thinks=True, tools=offered)  # fmt: skip
    assert (said.reasoning, said.text, said.reason) == ("Hm,", "I turn.", "tool_calls")
    assert [(one.name, one.arguments) for one in said.calls] == [("f", '{"a": 9}')]
    assert pieces[0] == ("reasoning", "Hm")
    one = Tools(offered.tools, "auto", parallel=False, xml=True)
    assert len(followed([f"{call(a='1')}\n{call(a='2')}"], tools=one)[1].calls) == 1


@pytest.fixture(scope="module")
def running(package: Path) -> Iterator[Running]:
    made = Running({"xml": package}, Settings(port=0, context=900, threads=1))
    yield made
    made.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_over_http(stream: bool, running: Running) -> None:
    """A call is forced and comes as JSON; it goes back into the prompt of the next turn, which reuses the states."""
    pytest.importorskip("llguidance")
    tools = [tool("turn", angle={"enum": [90, 180]}, fast={"type": "boolean"})]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Go. " * 60}]
    asked = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 90}
    reply = running.chat(messages, model="xml", stream=stream, **asked)
    if stream:
        deltas = [event["choices"][0]["delta"] for event in reply.events[:-1]]
        parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
        name, arguments = parts[0]["function"]["name"], "".join(part["function"]["arguments"] for part in parts)
    else:
        (made,) = reply.json["choices"][0]["message"]["tool_calls"]
        name, arguments = made["function"]["name"], made["function"]["arguments"]
    assert name == "turn"
    values = json.loads(arguments)
    assert set(values) == {"angle", "fast"}
    assert values["angle"] in (90, 180)
    assert isinstance(values["fast"], bool)
    back = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    messages += [{"role": "assistant", "content": "", "tool_calls": [back]}]
    messages += [{"role": "tool", "tool_call_id": "1", "content": "Done."}]
    again = running.chat(messages, model="xml", tools=tools, max_tokens=5, reasoning_effort="none")
    assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


def test_reasoning_over_http(running: Running) -> None:
    """Thinking is on by default: the answer begins with reasoning, and max_tokens ends it there."""
    reply = running.chat([{"role": "user", "content": "Go."}], model="xml").json
    message = reply["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"] == ""
    plain = running.chat([{"role": "user", "content": "Go."}], model="xml", reasoning_effort="none").json
    assert "reasoning_content" not in plain["choices"][0]["message"]
