"""A jinja2 environment with bounds on time and memory, for chat templates, which are untrusted programs.

jinja2's own sandbox only keeps a template away from Python's internals: nested loops, macros that call themselves and
`"x" * 10**10` all pass. Here every loop iteration, call, filter and concatenation counts as a step, the time is
limited, every value is bounded, and the result of an operation that multiplies (products, padding, join, replace …) is
estimated before it runs. These bounds cannot catch memory taken by many values or long work within one step; those are
bounded by the separate process in which unknown templates are rendered (``template_process.py``).
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 500_000
"""Maximum loop iterations, calls and filters of one rendering; a long conversation takes some thousands."""

MAX_SECONDS = 30.0
"""Maximum seconds of one rendering; a long conversation takes some milliseconds."""

MAX_CHARACTERS = 16 * 2**20
"""Maximum length of a text (in characters) or list (in items) that a template builds, and of the rendered text."""

_MAX_NUMBER = 2**53  # enough for any id or timestamp; keeps ** and << from building gigabyte integers
_MAX_PADDING = 10_000  # numbers given to calls and filters: indent(4), batch(3), center(80) …
_AMPLIFIERS = frozenset({"join", "replace", "indent", "format", "format_map", "tojson", "string", "pprint"})
_REMOVED_FILTERS = ("urlize", "wordwrap", "random")  # they take quadratic time or have no use in a prompt
_LONG_FORMAT = re.compile(r"\d{5,}")  # "%99999d" and "{:>99999}" build text from digits


class ChatTemplateError(Exception):
    """Base class of the ways in which a template can fail. The message is a part of a sentence."""


class BrokenTemplateError(ChatTemplateError):
    """The source text is not a valid template."""


class StoppedTemplateError(ChatTemplateError):
    """The template was stopped because it exceeded a bound."""


class RefusedTemplateError(ChatTemplateError):
    """The template fails on the given variables, or refuses them with raise_exception."""


class Template:
    """A compiled chat template, rendered in this process with bounds.

    Args:
        source: jinja source text.

    Raises:
        BrokenTemplateError: the text is not a valid template.
    """

    def __init__(self, source: str) -> None:
        self._environment = BoundedEnvironment()
        try:
            self._template = self._environment.compile_template(source)
        except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise BrokenTemplateError(str(error) or type(error).__name__) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Renders the template and returns the text.

        Args:
            variables: the template's variables, as plain JSON values.

        Raises:
            StoppedTemplateError: the template exceeds a bound.
            RefusedTemplateError: the template fails on these variables, or refuses them with raise_exception.
        """
        try:
            return self._environment.render_bounded(self._template, variables)
        except (SecurityError, RecursionError, MemoryError, OverflowError) as error:
            reason = "it recurses too deeply" if isinstance(error, RecursionError) else str(error) or "out of memory"
            raise StoppedTemplateError(reason) from error
        except Exception as error:  # a template is a program: any operation in it can fail on any value
            raise RefusedTemplateError(str(error)) from error


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The jinja2 environment of transformers/utils/chat_template_utils.py, with bounds.

    A template that exceeds a bound raises jinja2's SecurityError.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.steps = 0
        self._deadline = math.inf
        self._rendering = threading.Lock()  # the step counter belongs to the environment: one rendering at a time
        self.filters["tojson"] = _tojson
        self.filters = {
            name: self._bounded_filter(name, filter_)
            for name, filter_ in self.filters.items()
            if name not in _REMOVED_FILTERS
        }
        self.filters[_STEP] = self._step_filter
        self.filters[_CONCAT] = self._concatenate
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda format_: datetime.now().strftime(format_),
            dict=dict,
            namespace=_Namespace,
        )
        del self.globals["lipsum"]

    def compile_template(self, source: str) -> jinja2.Template:
        """Compiles a template and inserts a step counter into its loops.

        A malformed template raises jinja2's TemplateSyntaxError or a RecursionError.
        """
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            if loop.test is not None:  # iterations that the test skips take time too
                loop.test = nodes.And(_step_node(loop.test), loop.test).set_lineno(loop.lineno)
            loop.body.insert(0, nodes.ExprStmt(_step_node(loop)).set_lineno(loop.lineno))
        _replace_concatenations(tree)
        # Nodes made here lack the environment that the compiler asks them for.
        tree.set_environment(self)
        return self.from_string(tree)

    def render_bounded(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Renders a template piece by piece, so that an endless text stops at MAX_CHARACTERS."""
        pieces: list[str] = []
        length = 0
        with self._rendering:
            self.steps = 0
            self._deadline = time.monotonic() + MAX_SECONDS
            for piece in template.generate(variables):
                self.step()
                length += len(piece)
                _check_length(length)
                pieces.append(piece)
        return "".join(pieces)

    @jinja2.pass_context  # without the context jinja2 would evaluate the filter once, when compiling
    def _step_filter(self, _context: object, _value: object) -> bool:
        self.step()
        return True

    def step(self) -> None:
        """Counts one step; raises a SecurityError beyond MAX_STEPS or MAX_SECONDS."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it takes longer than {MAX_SECONDS:g} seconds")

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Hook of jinja2: performs every call that a template makes, with checked arguments and result."""
        self.step()
        if obj not in (_raise_exception, self.globals["range"]):  # jinja2 bounds range itself
            _check_arguments(args, kwargs)
        if getattr(obj, "__name__", None) in _AMPLIFIERS:
            # For str.format jinja2 returns its own function, which wraps the method.
            subject = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
            _check_amplifier(obj.__name__, subject, args, kwargs)
        return _checked(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Hook of jinja2: performs the operators in `intercepted_binops`, bounded before they allocate."""
        self.step()
        for value, times in ((left, right), (right, left)):
            if operator == "*" and hasattr(value, "__len__") and isinstance(times, int):
                _check_length(len(value) * times)
        if operator == "**" and not (_is_small(left, 1000) and _is_small(right, 15)):
            raise SecurityError("a power is too large")
        if operator == "%" and isinstance(left, str):
            _check_arguments(right if isinstance(right, tuple) else (right,), {})
            _check_amplifier("format", left, (right,), {})
        return _checked(super().call_binop(context, operator, left, right))

    def _concatenate(self, values: list[Any]) -> str:
        self.step()
        _check_length(_weight(values))
        return "".join(map(str, values))

    def _bounded_filter(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        takes_context = hasattr(filter_, "jinja_pass_arg")

        @functools.wraps(filter_)  # also copies the mark that makes jinja2 pass its context first
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.step()
            _check_arguments(args, kwargs)
            if name in _AMPLIFIERS and len(args) > takes_context:
                context, (subject, *rest) = args[:takes_context], args[takes_context:]
                if isinstance(subject, Iterator):  # from `map` and `select`; estimating its length would use it up
                    subject = list(itertools.islice(subject, MAX_CHARACTERS))
                _check_amplifier(name, subject, tuple(rest), kwargs)
                args = (*context, subject, *rest)
            return _checked(filter_(*args, **kwargs))

        return bounded


_STEP, _CONCAT = "vlpack step", "vlpack concatenate"  # the space keeps templates from naming them


class _Generation(Extension):
    """`{% generation %}`, with which training marks the assistant's words; for inference only its content counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """jinja2's namespace without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without a parameter name, so that namespace(self=…) works
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
    # jinja2's own filter escapes HTML, which is not what models were trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _step_node(at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(nodes.Const(None), _STEP, [], [], None, None, lineno=at.lineno)


def _replace_concatenations(tree: nodes.Node) -> None:
    """Replaces every `a ~ b` in the tree by a filter that checks the length; jinja2 has no hook for `~`."""
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


def _check_amplifier(name: str, subject: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Checks an upper bound of the result of an operation that multiplies text, before the operation runs."""
    values = (*args, *kwargs.values())
    weight = _weight(subject) + _weight(values)
    text = subject if isinstance(subject, str) else ""
    if name == "replace" and len(values) >= 2:
        weight += text.count(str(values[0])) * _weight(values[1])
    elif name == "join" and values:  # a list of texts and a separator, in either order
        weight += _count(subject) * _count(values[0])
    elif name in ("indent", "tojson", "pprint"):
        numbers = [value for value in values if isinstance(value, int)]
        weight *= 1 + max([4, *numbers] if name == "indent" else [*numbers, 0])
        weight += (text.count("\n") + 1) * _weight(values)
    elif name in ("format", "format_map"):
        if _LONG_FORMAT.search(text):
            raise SecurityError("a format has a width of five or more digits")
        weight *= 1 + text.count("%") + text.count("{")
    _check_length(weight)


def _weight(value: Any) -> int:
    """Approximate number of characters of a value when it is written out; counting stops beyond MAX_CHARACTERS."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (list, tuple, dict)):
        return 32
    total = 2
    for item in value.items() if isinstance(value, dict) else value:
        total += 2 + _weight(item)
        if total > MAX_CHARACTERS:
            break
    return total


def _count(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 1


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
