"""Grammars that force calls in the XML-like form of `vlpack.server.xml_calls`, with arguments that fit a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from vlpack.server.errors import wrong
from vlpack.server.xml_calls import BOOLEANS, branches_of, choices_of, is_text

_AFTER = "\n</parameter>\n"
"""Text after a parameter's value."""
_FREE = r"(?s:.*)"
MAX_PATTERN = 2000
"""Largest number of characters of a pattern, because the time to check one grows with the square."""
_FORMATS = {
    "date": r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    "time": r"[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})",
    "date-time": r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "email": r"[A-Za-z0-9_.+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+",
}
"""Regular expressions of values of ``format`` in a JSON schema."""


def call_rules(name: str, function: Mapping[str, Any], parameters: Mapping[str, Any], style: Any) -> dict[str, str]:
    """The rules of a Lark grammar for the text of a call between its tags, with arguments that match a schema.

    Args:
        name: name of the first rule, and prefix of the others.
        function: the function, with its name.
        parameters: schema of its parameters.
        style: ``x-guidance`` options for values that are written as JSON.

    Returns:
        The rules, by name.

    Raises:
        ApiError: a schema cannot be enforced on text without quotes.
    """
    rules: dict[str, str] = {}
    properties = parameters.get("properties") or {}
    required = set(parameters.get("required") or ())
    order = []
    for index, (key, schema) in enumerate(properties.items()):
        if not key or re.search(r"[>\n]", key):
            raise _not_forced(function, key, "this name")
        rule = f"{name}_p{index}"
        rules[rule] = f"{json.dumps(f'<parameter={key}>' + chr(10))} {rule}v"
        rules |= _value_rules(f"{rule}v", schema, parameters, style, (function, key))
        order.append(rule if key in required else f"{rule}?")
    if missing := sorted(required - properties.keys()):
        raise _not_forced(function, missing[0], "a required parameter without a schema")
    more = parameters.get("additionalProperties", True)
    if more is not False:
        rule = f"{name}_more"
        rules[f"{rule}n"] = r"/[^>\n]+/"
        rules[rule] = f'"<parameter=" {rule}n ">\\n" {rule}v'
        rules |= _value_rules(f"{rule}v", more, parameters, style, (function, "additionalProperties"))
        order.append(f"{rule}*")
    head = json.dumps(f"<function={function['name']}>\n")
    return {name: " ".join([head, *order, '"</function>"']), **rules}


def _value_rules(
    rule: str, schema: Any, root: Mapping[str, Any], style: Any, where: tuple[Mapping[str, Any], str]
) -> dict[str, str]:
    """The rules for a parameter's value and its closing tag.

    Args:
        rule: name of the first rule, and prefix of the others.
        schema: schema of the value.
        root: schema of all parameters, in which references are looked up.
        style: ``x-guidance`` options for values that are written as JSON.
        where: function and name of the parameter, for errors.
    """
    branches = branches_of(schema, root)
    texts = [_pattern(branch, where) for branch in branches if is_text(branch) or choices_of(branch) is not None]
    if schema is False:
        raise _not_forced(*where, "a schema that allows nothing")
    if not branches or _FREE in texts:
        texts, others = [_FREE], []
    else:
        others = [branch for branch in branches if not is_text(branch) and choices_of(branch) is None]
    if others and all(branch.get("type") == "boolean" for branch in others):
        texts, others = [*texts, "|".join(BOOLEANS)], []  # chat templates write Python's True and False
    rules, found = {}, []
    if texts:
        rules[f"{rule}t[lazy]"] = f"/({'|'.join(texts)}){_escaped(_AFTER)}/"
        found.append(f"{rule}t")
    if others:
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        text = json.dumps({"anyOf": others, "x-guidance": style, **definitions})
        rules[f"{rule}j"] = f"%json {text}"
        found.append(f"{rule}j {json.dumps(_AFTER)}")
    return {rule: " | ".join(found), **rules}


def _pattern(schema: Mapping[str, Any], where: tuple[Mapping[str, Any], str]) -> str:
    """The regular expression for texts that match a schema of strings or constants.

    Raises:
        ApiError: the schema has keywords that cannot be expressed.
    """
    chosen = choices_of(schema)
    if chosen is not None:
        texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in chosen]
        return "|".join(map(_escaped, texts))
    limits = [schema.get(key) for key in ("minLength", "maxLength")]
    pattern, form = schema.get("pattern"), schema.get("format")
    if not all(isinstance(one, str | None) for one in (pattern, form)):
        raise _not_forced(*where, "a 'pattern' or 'format' that is not a text")
    if not all(limit is None or (type(limit) is int and limit >= 0) for limit in limits):
        raise _not_forced(*where, "a length that is not a whole number from 0 on")
    if sum([pattern is not None, form is not None, limits != [None, None]]) > 1:
        raise _not_forced(*where, "a text with several of 'pattern', 'format' and lengths")
    if form is not None:
        if form not in _FORMATS:
            raise _not_forced(*where, f"the format {form!r}")
        return _FORMATS[form]
    if pattern is not None:
        return _anywhere(pattern, where)
    if limits != [None, None]:
        least, most = limits
        return f"(?s:.{{{least or 0},{'' if most is None else most}}})"
    return _FREE


def _anywhere(pattern: str, where: tuple[Mapping[str, Any], str]) -> str:
    """A pattern of a JSON schema, which may match anywhere in a text, as an expression for the whole text."""
    if len(pattern) > MAX_PATTERN:
        raise _not_forced(*where, f"a pattern of more than {MAX_PATTERN} characters")
    start, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith(r"\$")
    inner = pattern[start : len(pattern) - end]
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", inner)  # without escapes and classes
    alone = "|" in plain and (start or end) and _outside(plain)  # the anchor belongs to one alternative only
    if re.search(r"[\^$]|\(\?[=!<]", plain) or re.search(r"\\[bBk1-9]", inner) or alone:
        raise _not_forced(*where, f"the pattern {pattern!r}")
    inner = re.sub(r"\\.|/", lambda found: r"\/" if found[0][-1] == "/" else found[0], inner, flags=re.DOTALL)
    return f"{'' if start else _FREE}({inner}){'' if end else _FREE}"


def _outside(pattern: str) -> bool:
    """Whether a pattern has an alternative outside of all parentheses."""
    depth = 0
    for character in pattern:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "|" and not depth:
            return True
    return False


def _escaped(text: str) -> str:
    """A regular expression, for use between slashes, that matches exactly this text."""
    return "".join(c if (c.isalnum() and c.isascii()) or c in " _" else f"\\x{{{ord(c):x}}}" for c in text)


def _not_forced(function: Mapping[str, Any], name: str, what: str) -> Exception:
    """The error for a parameter whose schema cannot be enforced."""
    return wrong(
        f"The parameter {name!r} of the function {function['name']!r} has {what}, to which calls of this model cannot "
        "be constrained. Leave it out of the schema, or do not require calls ('strict', 'tool_choice').",
        "tools",
    )
