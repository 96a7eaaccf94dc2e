"""Tools of requests, and grammars that force tool calls.

Models write calls as JSON (`vlpack.server.calls`) or in an XML-like form (`vlpack.server.xml_calls`); which one they
were taught, their chat template shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlpack.preprocess import PromptBuilder
from vlpack.preprocess.chat_template import CLOSE
from vlpack.server.calls import CLOSE_CALL, OPEN_CALL, CallStream
from vlpack.server.errors import wrong
from vlpack.server.xml_calls import MARK, XmlCallStream
from vlpack.server.xml_grammar import call_rules

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
# the format of json.dumps, on which the models were trained
_AS_TAUGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Args:
        tools: tools in OpenAI's format, which chat templates accept.
        choice: ``none``, ``auto``, ``required``, or the name of a function that must be called.
        parallel: whether an answer may contain several tool calls.
        xml: whether the model writes calls in the XML-like form.
    """

    tools: tuple[dict[str, Any], ...] = ()
    choice: str = "none"
    parallel: bool = True
    xml: bool = False

    def stream(self) -> CallStream:
        """A parser of an answer's tool calls."""
        return XmlCallStream([tool["function"] for tool in self.tools]) if self.xml else CallStream()

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools for the chat template; None if there are none, or the model must not call them."""
        return list(self.tools) if self.tools and self.choice != "none" else None

    @property
    def forced(self) -> bool:
        """Whether the answer must be a tool call."""
        return self.choice not in ("none", "auto")

    def grammar(self, prompts: PromptBuilder) -> dict[str, str] | None:
        """The rules of a Lark grammar for the answer, by name, including ``start``; None if the answer is free.

        The grammar allows only calls of offered tools with arguments that match their schemas. Unless a call is forced,
        it also allows any text around them.
        """
        strict = any(tool["function"].get("strict") for tool in self.tools)
        if not self.offered or not (self.forced or strict):
            return None
        named = [tool for tool in self.tools if self.choice in ("auto", "required", tool["function"]["name"])]
        opened, closed = (_as_terminal(prompts, text) for text in (OPEN_CALL, CLOSE_CALL))
        rules = {"call": f'{opened} "\\n" body "\\n" {closed}'}
        rules["body"] = " | ".join(f"body_{index}" for index in range(len(named)))
        for index, tool in enumerate(named):
            function = tool["function"]
            if self.xml:
                parameters = _closed(function.get("parameters") or {"type": "object"})
                rules |= call_rules(f"body_{index}", function, parameters, _AS_TAUGHT)
            else:
                rules[f"body_{index}"] = f"%json {json.dumps(_call_schema(function))}"
        one = not self.parallel or self.choice not in ("auto", "required")
        if self.forced:
            rules["start"] = "call" if one else 'call ("\\n" call)*'
        else:
            rules["TEXT"] = r"/(?s:.*)/"
            rules["start"] = f"TEXT (call {'' if one else 'TEXT'}){'?' if one else '*'}"
        return rules


def _as_terminal(prompts: PromptBuilder, text: str) -> str:
    """A tag as a terminal of a Lark grammar: its special token if the tokenizer has one, else its text."""
    token = prompts.tokenizer.token_id(text)
    return text if token is not None and prompts.tokenizer.is_added_token(token) else json.dumps(text)


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _closed(function.get("parameters") or {"type": "object"})
    definitions = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        "x-guidance": _AS_TAUGHT,
        **definitions,
    }


def _closed(schema: Any) -> Any:
    """Copies a schema with additionalProperties set to false in each object with properties, unless it is set already.

    Functions accept only the arguments that their schemas name, but many clients omit additionalProperties, and a model
    could then write arguments without end.
    """
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    done = {
        key: value if key in ("const", "enum", "default", "examples") else _closed(value)
        for key, value in schema.items()
    }
    if isinstance(schema.get("properties"), Mapping) and schema.get("type") == "object":
        done.setdefault("additionalProperties", False)
    return done


def lark(rules: Mapping[str, str], prompts: PromptBuilder, *, thinks: bool) -> str:
    """Joins rules to a Lark grammar; with ``thinks`` it allows any reasoning first and applies after its end."""
    lines = [f"{name}: {rule}" for name, rule in rules.items() if name != "start"]
    if thinks:
        lines += [f'start: THOUGHT {_as_terminal(prompts, CLOSE)} "\\n\\n" answer', f"answer: {rules['start']}"]
        lines.append(r"THOUGHT: /(?s:.*)/")
    else:
        lines.append(f"start: {rules['start']}")
    return "\n".join(lines)


def read_tools(tools: Sequence[Any], choice: Any, parallel: bool | None, prompts: PromptBuilder) -> Tools:
    """Checks the tools of a request and returns them.

    Raises:
        ApiError: a tool is invalid, tool_choice names none of them, or the package's chat template has no tools.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise wrong("'tool_choice' asks for a call, but there are no 'tools'.", "tool_choice")
        return Tools()
    names = [_checked(tool, f"tools[{place}]") for place, tool in enumerate(tools)]
    if len(set(names)) < len(names):
        raise wrong("Two of the 'tools' have the same name.", "tools")
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        chosen = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") != "function" or chosen not in names:
            raise wrong(f"'tool_choice' must name a function of the 'tools': {', '.join(names)}.", "tool_choice")
    else:
        chosen = "auto" if choice is None else choice
        if chosen not in ("none", "auto", "required"):
            raise wrong(
                "'tool_choice' must be none, auto, required, or an object that names a function.", "tool_choice"
            )
        if chosen in names:  # a function named "auto" could be selected only by an object
            raise wrong(f"A tool has the name {chosen!r}, which has another meaning in 'tool_choice'.", "tools")
    source = prompts.chat_template.source
    if "tools" not in source or OPEN_CALL not in source:
        raise wrong("The package's chat template does not support tools, so the model would not see them.", "tools")
    return Tools(tuple(dict(tool) for tool in tools), chosen, parallel is not False, MARK in source)


def _checked(tool: Any, where: str) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise wrong(f"{where} must be a function: an object with the 'type' function and 'function'.", where)
    for name in (*(key for key in tool if key not in ("type", "function")),):
        raise wrong(f"{where}: the field {name!r} is unknown.", where)
    for name in function:
        if name not in ("name", "description", "parameters", "strict"):
            raise wrong(f"{where}.function: the field {name!r} is unknown.", where)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise wrong(f"{where}.function.name must have 1 to 64 letters, digits, '_', '.' and '-'.", where)
    if parameters is not None and not isinstance(parameters, Mapping):
        raise wrong(f"{where}.function.parameters must be a JSON schema.", where)
    if not isinstance((parameters or {}).get("properties"), Mapping | None):
        raise wrong(f"{where}.function.parameters: 'properties' must be an object.", where)
    required = (parameters or {}).get("required") or []
    if not isinstance(required, list) or not all(isinstance(one, str) for one in required):
        raise wrong(f"{where}.function.parameters: 'required' must be a list of names.", where)
    if not isinstance(function.get("description"), str | None) or not isinstance(function.get("strict"), bool | None):
        raise wrong(f"{where}.function: 'description' must be a text, and 'strict' true or false.", where)
    return name
