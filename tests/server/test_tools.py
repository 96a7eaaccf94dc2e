"""Tool calls: parsed from generated text in pieces of any size, and forced by grammars."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.conftest import Running
from vlpack.engine import EngineAnswer, Handle
from vlpack.engine.constraints import Grammars, grammar_of
from vlpack.preprocess import PromptBuilder
from vlpack.server.answers import Said, follow
from vlpack.server.asking import Ask, Asked, _constraint
from vlpack.server.calls import CallStream
from vlpack.server.messages import Conversation
from vlpack.server.tools import Tools, read_tools

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x}\\"y", "b": [1, {"c": 2}]}}\n</tool_call>'
ARGUMENTS = '{"a": "x}\\"y", "b": [1, {"c": 2}]}'


def read(text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of an answer that arrives in pieces of ``size`` characters."""
    stream, said, calls = CallStream(), "", []
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
        ("No call.", "No call.", []),
        ("a < b <tool> c", "a < b <tool> c", []),
        ("white  \n space \n", "white  \n space \n", []),
        (CALL, "", [("f", ARGUMENTS)]),
        (f"Let me see.\n{CALL}", "Let me see.", [("f", ARGUMENTS)]),
        (f"{CALL}\n{CALL}", "", [("f", ARGUMENTS)] * 2),
        (f"{CALL}\n", "", [("f", ARGUMENTS)]),
        (f"{CALL} after", " after", [("f", ARGUMENTS)]),
        ('<tool_call>{"name":"g","arguments":{}}</tool_call>', "", [("g", "{}")]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call>', "", [("g", '{"a": 1}')]),
        ('<tool_call>{"name": "g"}</tool_call>', "", [("g", "{}")]),
        ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>',) * 2 + ([],),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "x', "", [("f", '{"a": "x')]),
        ("<tool_call>\n{", "<tool_call>\n{", []),
        ('<tool_call>{"name": "\\q", "arguments": {}}</tool_call>',) * 2 + ([],),
        ('<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',) * 2 + ([],),
        ('<tool_call>{"arguments": {"a": "é"}, "name": "g"}</tool_call>', "", [("g", '{"a": "\\u00e9"}')]),
        ("It ends with <tool", "It ends with <tool", []),
    ],
)
def test_calls_in_a_text(text: str, said: str, calls: Any, size: int) -> None:
    assert read(text, size) == (said, calls)


def tool(name: str, **schema: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": schema, "required": list(schema)}
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": True}}


TOOLS = [tool("turn", angle={"enum": [90, 180]}), tool("say", word={"enum": ["yes", "no"]})]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_required(stream: bool, seed: int, running: Running) -> None:
    asked: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": seed,
        "temperature": 1.5,
    }
    reply = running.chat([{"role": "user", "content": "Go."}], model="tools", stream=stream, max_tokens=90, **asked)
    if stream:
        deltas = [event["choices"][0]["delta"] for event in reply.events[:-1]]
        parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
        assert [part["index"] for part in parts] == [0] * len(parts)
        assert len({part["id"] for part in parts if "id" in part}) == 1
        name, arguments = parts[0]["function"]["name"], "".join(part["function"]["arguments"] for part in parts)
        assert reply.events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    else:
        choice = reply.json["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
    allowed: dict[str, Any] = {"turn": [{"angle": 90}, {"angle": 180}], "say": [{"word": "yes"}, {"word": "no"}]}
    assert json.loads(arguments) in allowed[name]


def test_tools_that_must_not_be_called(running: Running) -> None:
    """With "none", the prompt is the same as without tools."""
    messages = [{"role": "user", "content": "Go."}]
    plain = running.chat(messages, model="tools").json
    none = running.chat(messages, model="tools", tools=TOOLS, tool_choice="none").json
    assert none["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert none["choices"][0]["message"] == plain["choices"][0]["message"]


@pytest.fixture(scope="module")
def prompts(packages: dict[str, Path]) -> PromptBuilder:
    return PromptBuilder.from_folder(packages["tools"], image_token_id=2060, video_token_id=2061)


@pytest.fixture(scope="module")
def takes(packages: dict[str, Path], prompts: PromptBuilder) -> Callable[[Any, str], bool]:
    """Returns a function that checks whether a whole answer satisfies the constraint in options of the engine."""
    grammars = Grammars(packages["tools"] / "tokenizer.json", 2176, {2050})

    def check(options: Any, text: str) -> bool:
        grammar = grammar_of(**options)
        assert grammar is not None
        constraint = grammars.constraint(grammar)
        for token in prompts.tokenizer.encode(text):
            if not constraint.allowed()[token]:
                return False
            constraint.push(token)
        return constraint.complete

    return check


def constraint(prompts: PromptBuilder, tools: Tools, thinks: bool = False, **fields: Any) -> Any:
    class Engine:
        pass

    engine: Any = Engine()
    engine.prompts = prompts
    return _constraint(engine, Ask(Conversation(), {}, **fields), tools, thinks)


def turn(angle: int) -> str:
    return f'<tool_call>\n{{"name": "turn", "arguments": {{"angle": {angle}}}}}\n</tool_call>'


def test_what_grammars_take(prompts: PromptBuilder, takes: Callable[[Any, str], bool]) -> None:
    required = constraint(prompts, read_tools(TOOLS, "required", None, prompts))
    assert takes(required, turn(90))
    assert takes(required, f"{turn(90)}\n{turn(180)}")
    assert not takes(required, turn(91))
    assert not takes(required, "Hello")
    # only properties that the schema names are allowed
    assert not takes(required, turn(90).replace("90}", '90, "more": 1}'))
    assert not takes(required, turn(90).replace("turn", "burn"))
    one = constraint(prompts, read_tools(TOOLS, "required", False, prompts))
    assert takes(one, turn(90))
    assert not takes(one, f"{turn(90)}\n{turn(180)}")
    named = constraint(prompts, read_tools(TOOLS, {"type": "function", "function": {"name": "say"}}, None, prompts))
    assert not takes(named, turn(90))
    assert takes(named, '<tool_call>\n{"name": "say", "arguments": {"word": "no"}}\n</tool_call>')
    free = constraint(prompts, read_tools(TOOLS, "auto", None, prompts))  # the tools are strict
    assert takes(free, "Hello {")
    assert takes(free, f"I turn. {turn(90)}\n{turn(180)}")
    assert not takes(free, f"I turn. {turn(91)}")
    schema = {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"], "additionalProperties": False}
    either = constraint(prompts, read_tools(TOOLS, "auto", None, prompts), schema=schema)
    assert takes(either, '{"x":null}')
    assert takes(either, turn(90))
    assert not takes(either, "Hello")
    thinking = constraint(prompts, Tools(), True, schema=schema)
    assert takes(thinking, 'I think {.\n</think>\n\n{"x":null}')
    assert not takes(thinking, "I think.\n</think>\n\nHello")
    assert not takes(thinking, '{"x":null}')


def followed(pieces: list[str], *, thinks: bool = False, tools: Tools | None = None) -> tuple[list[Any], Said]:
    """The pieces and the final state of an answer whose text the engine generates in these pieces."""
    handle = Handle(None, None)  # type: ignore[arg-type]
    for piece in pieces:
        handle.push(piece)
    handle.finish(EngineAnswer("".join(pieces), [1], "stop"))
    said = Said()

    async def run() -> list[Any]:
        asked = Asked(None, [handle], tools or Tools(), thinks)  # type: ignore[arg-type]
        return [tuple(piece) async for piece in follow(asked, handle, said)]

    return asyncio.run(run()), said


def test_reasoning_and_calls_apart() -> None:
    offered = Tools(tuple(TOOLS), "auto")
    pieces, said = followed(
        ["\nHm", ",\n", "well\n", "</thi", "nk>\n", "\nI turn.\n", turn(90)[:30], turn(90)[30:]],
        thinks=True,
        tools=offered,
    )
    assert (said.reasoning, said.text, said.reason) == ("Hm,\nwell", "I turn.", "tool_calls")
    assert [(call.name, call.arguments) for call in said.calls] == [("turn", '{"angle": 90}')]
    assert pieces[0] == ("reasoning", "Hm")
    _, said = followed(["<think>\na\n</think>\n\nb"])
    assert (said.reasoning, said.text, said.reason) == ("a", "b", "stop")
    _, said = followed(["\nb <tool_call> c"])
    assert (said.reasoning, said.text) == (None, "\nb <tool_call> c")


def test_one_call_where_several_are_not_wanted() -> None:
    one = Tools(tuple(TOOLS), "auto", parallel=False)
    _, said = followed([turn(90) + "\n" + turn(180)], tools=one)
    assert [call.arguments for call in said.calls] == ['{"angle": 90}']
    assert said.reason == "tool_calls"


def test_names_of_tools(prompts: PromptBuilder) -> None:
    from vlpack.server.errors import ApiError

    for tools, choice, said in (
        ([TOOLS[0], TOOLS[0]], None, "the same name"),
        (TOOLS, {"type": "function", "function": {"name": "burn"}}, "turn, say"),
        (TOOLS, "always", "none, auto, required"),
        ([{**TOOLS[0], "extra": 1}], None, "'extra' is unknown"),
    ):
        with pytest.raises(ApiError, match=said):
            read_tools(tools, choice, None, prompts)
