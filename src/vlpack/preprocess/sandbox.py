"""A jinja2 environment in which a chat template, which is a stranger's program, can neither run away nor fill memory.

jinja2's own sandbox keeps a template from Python's internals, and nothing else: nested loops, macros that call
themselves and `"x" * 10**10` all pass. Here every loop turn, call and filter costs a step, every value built is bounded,
and numbers that would size a padding or a power are refused. What is left to one step is at most a bounded value's work.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 1_000_000
"""Loop turns, calls and filters of one rendering; a long conversation takes some thousands, this many about a second."""

MAX_CHARACTERS = 16 * 2**20
"""Longest text and longest list (in items) that a template may build; the whole rendering counts as one."""

_MAX_NUMBER = 2**53  # enough for any id or timestamp; keeps ** and << from building gigabyte integers
_MAX_PADDING = 100_000  # numbers given to calls and filters: indent(4), batch(3), center(80) …
_LONG_FORMAT = re.compile(r"\d{5,}")  # "%99999d" and "{:>99999}" build text from digits


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of transformers/utils/chat_template_utils.py, with bounds.

    A template that exceeds one raises jinja2's SecurityError. Not for concurrent renderings: the steps are counted on
    the environment.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.steps = 0
        self.filters["tojson"] = _tojson
        self.filters = {name: self._bounded_filter(filter_) for name, filter_ in self.filters.items()}
        self.filters[_STEP] = self.step
        self.filters[_CONCAT] = self._concatenate
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda format_: datetime.now().strftime(format_),
            dict=dict,
            namespace=_Namespace,
        )
        del self.globals["lipsum"]

    def compile_template(self, source: str) -> jinja2.Template:
        """Compiles a template with its loops counted; TemplateSyntaxError or RecursionError on a bad one."""
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            if loop.test is not None:  # turns that the test skips cost time too
                loop.test = nodes.And(_step_node(loop.test), loop.test).set_lineno(loop.lineno)
            loop.body.insert(0, nodes.ExprStmt(_step_node(loop)).set_lineno(loop.lineno))
        _replace_concatenations(tree)
        # Nodes made here lack the environment that the compiler asks them for.
        tree.set_environment(self)
        return self.from_string(tree)

    def render_bounded(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The rendered text, built piece by piece so that an endless one stops at MAX_CHARACTERS."""
        self.steps = 0
        pieces: list[str] = []
        length = 0
        for piece in template.generate(variables):
            self.step()
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise SecurityError(f"the text grows beyond {MAX_CHARACTERS} characters")
            pieces.append(piece)
        return "".join(pieces)

    def step(self, _value: object = None) -> bool:
        """Counts one step; SecurityError when there are too many."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        return True

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call that a template makes passes here (jinja2's hook)."""
        self.step()
        if obj is not _raise_exception:
            _check_arguments(args, kwargs)
        return _checked(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operators of `intercepted_binops` pass here (jinja2's hook); checked before they allocate."""
        self.step()
        for value, times in ((left, right), (right, left)):
            if operator == "*" and hasattr(value, "__len__") and isinstance(times, int):
                _check_length(len(value) * times)
        if operator == "**" and not (_is_small(left, 1000) and _is_small(right, 15)):
            raise SecurityError("a power is too large")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_arguments(right if isinstance(right, tuple) else (right,), {})
        return _checked(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Attribute access (jinja2's hook); a format string is checked when its method is taken."""
        if isinstance(obj, str) and attribute in ("format", "format_map"):
            _check_format(obj)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Subscript access (jinja2's hook), which falls back to attributes."""
        if isinstance(obj, str) and argument in ("format", "format_map"):
            _check_format(obj)
        return super().getitem(obj, argument)

    def _concatenate(self, values: list[Any]) -> str:
        self.step()
        texts = [str(value) for value in values]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def _bounded_filter(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(filter_)  # also copies the mark that makes jinja2 pass its context first
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.step()
            _check_arguments(args, kwargs)
            if filter_ is _REPLACE:
                text, old, new = (str(value) for value in (*args[1:4], "", "", "")[:3])
                _check_length(len(text) + (text.count(old)) * len(new))
            if filter_ is _FORMAT and args:
                _check_format(str(args[0]))
            return _checked(filter_(*args, **kwargs))

        return bounded


_STEP, _CONCAT = "vlpack step", "vlpack concatenate"  # the space keeps templates from naming them
_REPLACE = jinja2.filters.FILTERS["replace"]
_FORMAT = jinja2.filters.FILTERS["format"]


class _Generation(Extension):
    """`{% generation %}`, with which training marks the assistant's words; for inference only its content counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """jinja2's namespace without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # type: ignore[misc]  # noqa: N805 - allows namespace(self=…)
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes HTML, which is not what models were trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _step_node(at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(nodes.Const(None), _STEP, [], [], None, None, lineno=at.lineno)


def _replace_concatenations(tree: nodes.Node) -> None:
    """Turns every `a ~ b` into a filter that checks the length; jinja2 has no hook for it."""
    for child in list(tree.iter_child_nodes()):
        _replace_concatenations(child)
    for field, value in list(tree.iter_fields()):
        if isinstance(value, nodes.Concat):
            setattr(tree, field, _concat_node(value))
        elif isinstance(value, list):
            value[:] = [_concat_node(item) if isinstance(item, nodes.Concat) else item for item in value]


def _concat_node(node: nodes.Concat) -> nodes.Filter:
    return nodes.Filter(nodes.List(node.nodes), _CONCAT, [], [], None, None, lineno=node.lineno)


def _check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > _MAX_PADDING:
            raise SecurityError(f"a number of {_MAX_PADDING} or more is passed to a call or filter")


def _check_format(text: str) -> None:
    if _LONG_FORMAT.search(text):
        raise SecurityError("a format has a width of five or more digits")


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise SecurityError(f"a value grows beyond {MAX_CHARACTERS} characters or items")


def _checked(value: Any) -> Any:
    if isinstance(value, (str, list, tuple, dict)):
        _check_length(len(value))
    elif isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise SecurityError("a number grows too large")
    return value


def _is_small(value: object, limit: int) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= limit


__all__ = ["BoundedEnvironment", "SecurityError", "TemplateError", "TemplateRuntimeError"]
