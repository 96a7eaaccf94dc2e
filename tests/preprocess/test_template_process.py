"""The template process stops templates that the sandbox alone does not stop, and renders harmless ones unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samples import DIGITS
from vlpack.errors import CheckpointError, InputError, VlpackError
from vlpack.preprocess import ChatTemplate, template_process
from vlpack.preprocess.known_templates import is_known

NEST = "{% set s = namespace(v=[1]) %}{% for i in range(60) %}{% set s.v = [s.v, s.v] %}{% endfor %}"
TEXT = "{% set s = namespace(v='x') %}{% for i in range(23) %}{% set s.v = s.v ~ s.v %}{% endfor %}"
LOOP = "{% for a in range(90000) %}" + "x" * 1000 + "{% endfor %}"
ESCAPES = {
    "nested lists, printed": NEST + "{{ s.v }}",
    "nested lists, compared": NEST + "{% set t = namespace(v=[1]) %}{% for i in range(60) %}"
    "{% set t.v = [t.v, t.v] %}{% endfor %}{{ s.v == t.v }}",
    "nested lists, sorted": NEST + "{{ [s.v, s.v] | sort }}",
    "nested lists as text": NEST + "{{ (s.v | string) | length }}",
    "many lists": "{% set s = namespace(v=[]) %}{% for i in range(500) %}"
    "{% set s.v = s.v + [[0] * 16000000] %}{% endfor %}{{ s.v | length }}",
    "many texts": TEXT + "{% set t = namespace(v=[]) %}{% for i in range(500) %}"
    "{% set t.v = t.v + [s.v + 'x'] %}{% endfor %}{{ t.v | length }}",
    "a set block": "{% set s = namespace(v='') %}{% for i in range(9) %}{% set x %}" + LOOP + "{{ s.v }}{% endset %}"
    "{% set s.v = x %}{% endfor %}",
    "translate": TEXT + "{% set t = s.v.translate({120: 'y' * 10000}) %}",
    "expandtabs": TEXT.replace("'x'", r"'\t'") + "{% set t = s.v.expandtabs(9999) %}",
    "bytes replaced": TEXT + "{% set t = s.v.encode().replace('x'.encode(), ('y' * 10000).encode()) %}",
    "bytes joined": TEXT + "{% set t = s.v.encode().join(['y'.encode()] * 10000) %}",
    "dates": "{% for i in range(99) %}{% set t = strftime_now('%99999Y' * 10000) %}{% endfor %}{{ 1 }}",
    "macros": "{% macro a() %}{% endmacro %}" * 200_000,
    "a long sum": "{{ " + "~".join("a" * 400_000) + " }}",
    "deep": "{{ " + "-" * 100_000 + "1 }}",
}


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes limits so small that they are reached quickly."""
    monkeypatch.setattr(template_process, "MAX_SECONDS", 3.0)
    monkeypatch.setattr(template_process, "START_SECONDS", 6.0)
    monkeypatch.setattr(template_process, "MAX_MEMORY", 256 << 20)


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("name", ESCAPES)
def test_templates_that_escape_the_sandbox_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[Any] = []
    made = template_process._Worker.__init__

    def remember(worker: Any) -> None:
        made(worker)
        workers.append(worker._process)

    monkeypatch.setattr(template_process._Worker, "__init__", remember)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"evil\.jinja (was stopped|is not a usable)"):
        ChatTemplate(ESCAPES[name], where="evil.jinja").render([])
    assert time.monotonic() - started < 25
    assert len(workers) == 1
    time.sleep(0.1)
    if (
        sys.platform == "linux" and workers[0].poll() is None
    ):  # the process stopped the template and freed the memory by itself
        status = Path(f"/proc/{workers[0].pid}/status").read_text()
        assert int(status.partition("VmRSS:")[2].split()[0]) < 400 << 10
        workers[0].kill()


HONEST = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<' ~ p.image ~ '>' }}{% endfor %}{% endif %}"
    "{% endfor %}{{ tools | tojson }}{{ extra.a[1] }}{{ documents is none }}"
)
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "é李𝄞 \x00 \ud800 \u2028 'quoted' \"\\"},
    {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "image": np.zeros(3)}]},
]


def test_a_harmless_template_gives_the_same_text() -> None:
    inside, apart = (ChatTemplate(HONEST, {"bos_token": "<s>"}, isolated=isolated) for isolated in (False, True))
    options: dict[str, Any] = {"tools": [{"name": "é", "n": 1.5}], "extra": {"a": [1, True]}}
    expected = inside.render(CONVERSATION, **options)
    assert "<<ndarray>>" in expected
    assert [apart.render(CONVERSATION, **options) for _ in range(3)] == [expected] * 3


def test_refusals_and_broken_templates() -> None:
    template = ChatTemplate("{{ raise_exception('no ' ~ messages|length) }}", where="t.jinja", isolated=True)
    for _ in range(2):  # the process continues after an error
        with pytest.raises(InputError, match=r"t\.jinja cannot render these messages: no 1"):
            template.render([{"role": "user", "content": "x"}])
    with pytest.raises(CheckpointError, match=r"t\.jinja is not a usable jinja template: .*unexpected"):
        ChatTemplate("{{ for }}{{", where="t.jinja")


def test_a_process_that_ended_is_started_again() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    expected = template.render(CONVERSATION)
    process = template._template._worker._process  # type: ignore[union-attr]
    process.kill()
    process.wait()
    assert template.render(CONVERSATION) == expected
    template._template.close()  # type: ignore[union-attr]
    assert template.render(CONVERSATION) == expected


@pytest.mark.usefixtures("tight")
def test_after_a_template_was_stopped_the_next_prompt_is_right() -> None:
    template = ChatTemplate("{% if messages[0].content == 'long' %}" + NEST + "{{ s.v }}{% endif %}{{ 'right' }}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="was stopped"):
            template.render([{"role": "user", "content": "long"}])
        assert template.render([{"role": "user", "content": "x"}]) == "right"


def test_an_interruption_leaves_no_output_for_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    get = template_process.queue.Queue.get

    def interrupt(self: Any, *arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(template_process.queue.Queue, "get", get)
        raise KeyboardInterrupt

    monkeypatch.setattr(template_process.queue.Queue, "get", interrupt)
    with pytest.raises(KeyboardInterrupt):
        template.render([{"role": "user", "content": "first"}])
    assert template.render([{"role": "user", "content": "second"}]) == "second"


def test_threads_share_a_process() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    wrong: list[Any] = []

    def ask(name: str) -> None:
        wrong.extend(name for _ in range(50) if template.render([{"role": "user", "content": name}]) != name)

    threads = [threading.Thread(target=ask, args=(f"thread {number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_process_gets_no_secrets_and_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os\nfrom vlpack.preprocess import ChatTemplate\n"
        "template = ChatTemplate('{{ 1 }}')\nprocess = template._template._worker._process\n"
        "print(process.pid, b'hf_secret' in open(f'/proc/{process.pid}/environ', 'rb').read(), flush=True)\n"
        "os._exit(0)\n"  # as if the program was killed
    )
    environment = {**os.environ, "HF_TOKEN": "hf_secret"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    pid, secret = done.stdout.split()
    assert secret == "False"
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and b"template_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the process outlives its parent"
        time.sleep(0.05)


def test_without_a_python_executable(monkeypatch: pytest.MonkeyPatch) -> None:
    for executable in ("", "/nowhere/python"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(VlpackError, match=r"no Python to run it|no process can be started"):
            ChatTemplate("{{ 1 }}")


def test_known_templates_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (DIGITS / "chat_template.jinja").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "executable", "")
    assert is_known(source)
    assert is_known(source.rstrip() + "\n\n")
    assert not is_known(source + "x")
    assert ChatTemplate(source).render([{"role": "user", "content": "x"}])
