"""Hostile chat templates are stopped quickly and without taking much memory."""

from __future__ import annotations

import functools
import time
import tracemalloc

import numpy as np
import pytest

from vlpack.errors import CheckpointError, InputError, VlpackError
from vlpack.preprocess import chat_template

ChatTemplate = functools.partial(chat_template.ChatTemplate, isolated=False)
"""Renders in this process, where the sandbox's bounds are the only protection."""

BIG = "{% set s = namespace(v='x') %}{% for i in range(23) %}{% set s.v = s.v ~ s.v %}{% endfor %}"
"""The beginning of a template that makes ``s.v`` 8 million characters long, which is allowed; more must be stopped."""
LINES = BIG.replace("'x'", "'\\n'").replace("23", "21")
"""The beginning of a template that makes ``s.v`` two million empty lines."""

RUNAWAYS = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "loops that skip every turn": "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}"
    "{% endfor %}",
    "range": "{{ range(10**9) | list }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for a in range(999) recursive %}{{ loop(range(999)) }}{% endfor %}",
    "output": "{% for a in range(90000) %}" + "x" * 1000 + "{% endfor %}",
    "repeated text": "{{ 'x' * 10**9 }}",
    "repeated text, reversed": "{{ 10**9 * 'x' }}",
    "repeated list": "{{ ([0] * 10**9) | length }}",
    "doubled text": BIG + "{{ s.v ~ s.v }}",
    "added text": "{% set s = namespace(v='x') %}{% for i in range(60) %}{% set s.v = s.v + s.v %}{% endfor %}",
    "added lists": "{% set s = namespace(v=[1]) %}{% for i in range(60) %}{% set s.v = s.v + s.v %}{% endfor %}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "growing number": "{% set s = namespace(v=9) %}{% for i in range(90000) %}{% set s.v = s.v * s.v %}{% endfor %}",
    "center": "{{ 'x' | center(10**9) }}",
    "rjust": "{{ 'x'.rjust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "percent format": "{{ '%999999999d' % 1 }}",
    "percent format star": "{{ '%*d' % (999999999, 1) }}",
    "percent format many": BIG + "{{ ('%s' * 1000) % ((s.v,) * 1000) }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "format nested": "{{ '{:>{w}}'.format(1, w=999999999) }}",
    "format many": BIG + "{{ ('{0}' * 1000).format(s.v) }}",
    "format by subscript": "{{ 'x{:>999999999}'['format'](1) }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "format_map": BIG + "{{ ('{a}' * 1000).format_map({'a': s.v}) }}",
    "join filter": BIG + "{{ ([s.v] * 1000) | join }}",
    "join filter, generator": BIG + "{{ ([{'a': s.v}] * 1000) | map(attribute='a') | join }}",
    "join filter, attribute": BIG + "{{ ([{'a': s.v}] * 1000) | join(attribute='a') }}",
    "join separator": BIG + "{{ ([''] * 1000) | join(s.v) }}",
    "join method": BIG + "{{ s.v.join([''] * 1000) }}",
    "join method, list": BIG + "{{ ''.join([s.v] * 1000) }}",
    "replace filter": BIG + "{{ s.v | replace('x', 'y' * 1000) }}",
    "replace method": BIG + "{{ s.v.replace('', 'y' * 1000) }}",
    "indent": LINES + "{{ s.v | indent(9999) }}",
    "indent by a text": LINES + "{{ s.v | indent('xxxxxxxxxx') }}",
    "pprint": BIG + "{{ ([s.v] * 1000) | pprint }}",
    "tojson": BIG + "{{ ([s.v] * 1000) | tojson }}",
    "string": BIG + "{{ ([s.v] * 1000) | string }}",
    "concatenated list": BIG + "{{ ([s.v] * 1000) ~ '' }}",
}


@pytest.mark.parametrize("name", RUNAWAYS)
def test_runaway_templates_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vlpack.preprocess.template_sandbox.MAX_STEPS", 20_000
    )  # fewer steps, because measuring memory makes them slow
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(VlpackError) as caught:
            ChatTemplate(RUNAWAYS[name], where="models/evil.jinja").render([])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(caught.value, CheckpointError), caught.value
    assert "models/evil.jinja was stopped" in str(caught.value)
    assert peak < 600e6
    assert "longer than" not in str(caught.value)
    assert "memory" not in str(caught.value)  # stopped by a bound, not because memory ran out
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("preamble", [BIG, LINES])
def test_the_first_steps_of_runaway_templates_are_allowed(preamble: str) -> None:
    """Each hostile template starts with allowed steps; if those were refused, its hostile step would not be tested."""
    assert ChatTemplate(preamble + "{{ s.v | length }}").render([]) in (str(2**23), str(2**21))
    begun = [name for name, source in RUNAWAYS.items() if source.startswith(preamble)]
    assert len(begun) >= 2
    for name in begun:
        assert RUNAWAYS[name].count("{{") == 1, f"{name} may be stopped by another of its expressions"


@pytest.mark.parametrize(
    "operand",
    [
        "('%s' * 1000)",
        "((s.v,) * 1000)",
        "('{0}' * 1000)",
        "('{a}' * 1000)",
        "([s.v] * 1000)",
        "([{'a': s.v}] * 1000) | map(attribute='a')",
        "([''] * 1000)",
        "'y' * 1000",
    ],
)
def test_large_strings_of_runaway_templates_are_allowed(operand: str) -> None:
    assert ChatTemplate(BIG + "{% set x = " + operand + " %}{{ 'built' }}").render([]) == "built"


def test_the_time_limit_stops_slow_templates_of_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlpack.preprocess.template_sandbox.MAX_SECONDS", 0.0)
    with pytest.raises(CheckpointError, match="0 seconds"):
        ChatTemplate("{% for a in range(5) %}{{ a }}{% endfor %}").render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ namespace.__init__.__globals__.os.system('true') }}",
        "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ strftime_now.__globals__ }}",
        "{% include '/etc/hostname' %}",
        "{{ 0 | vlpack step }}",
    ],
)
def test_python_internals_are_out_of_reach(source: str) -> None:
    try:
        text = ChatTemplate(source).render([{"role": "user", "content": "x"}])
    except VlpackError:
        return
    assert text == ""  # jinja2 renders some of them as an undefined value


def test_objects_in_messages_are_out_of_reach() -> None:
    message = {"role": "user", "content": [{"type": "image", "image": np.zeros(3)}], "tags": ("a", np.float64(1))}
    template = ChatTemplate("{{ messages[0].content[0].image }}{{ messages[0].content[0].image.tofile }}")
    assert template.render([message]) == "<ndarray>"


def test_a_template_may_refuse_messages() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate: ' ~ messages|length) }}", where="t.jinja")
    with pytest.raises(InputError, match=r"t\.jinja.*roles must alternate: 1"):
        template.render([{"role": "user", "content": "x"}])
    with pytest.raises(InputError, match=r"t\.jinja"):
        ChatTemplate("{{ messages[0].a.b.c }}", where="t.jinja").render([{"role": "user"}])


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{", "{% extends 'x' %}{% nonsense %}", "{{ " + "(" * 5000, "{{ x | none }}"]
)
def test_broken_templates_name_the_file(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"t\.jinja is not a usable"):
        ChatTemplate(source, where="t.jinja")


def test_long_conversations_are_rendered() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 2000}] * 1000
    assert len(template.render(messages)) > 9_000_000


def test_steps_are_counted_separately_for_each_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlpack.preprocess.template_sandbox.MAX_STEPS", 500)
    template = ChatTemplate("{% for a in range(100) %}{{ a }}{% endfor %}")
    assert len({template.render([]) for _ in range(20)}) == 1


def test_the_time_limit_is_per_rendering() -> None:
    now = ChatTemplate("{{ strftime_now('%Y') }}").render([])
    assert now == time.strftime("%Y")
