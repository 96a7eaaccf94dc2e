"""Renders an untrusted chat template in a separate process, where its memory and time can be bounded.

Python cannot bound an untrusted program from inside: a list of lists that doubles, a comparison of two such lists or a
template of a hundred thousand macros can take any amount of memory or time within one step. The process runs
``template_worker.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlpack.preprocess import template_sandbox as sandbox
from vlpack.preprocess import template_worker

MAX_MEMORY = 1 << 30
"""Maximum bytes of memory beyond what the process has after its start; a long conversation takes about ten million."""

MAX_SECONDS = 20.0
"""Maximum seconds to render one prompt; normally it takes a millisecond."""

START_SECONDS = 60.0
"""Maximum seconds for the process to start and compile the template, generous for a busy machine."""

MAX_ANSWER = 8 * sandbox.MAX_CHARACTERS
"""Maximum bytes of an answer; in JSON a character takes up to six."""

_WORKER = Path(template_worker.__file__)
_ENVIRONMENT = ("TZ", "LANG", "LC_ALL", "PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""Environment variables that are passed to the process. They hold no tokens or keys."""


class TemplateProcess:
    """A compiled chat template in a separate process, with the interface of `template_sandbox.Template`.

    The process starts at once and is kept for later prompts. After it had to be ended, the next prompt starts another.

    Args:
        source: jinja source text.

    Raises:
        BrokenTemplateError: the text is not a template, or compiling it takes too much memory or time.
        StoppedTemplateError: the process cannot be started.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._ready()

    def render(self, variables: Mapping[str, Any]) -> str:
        """Renders the template and returns the text.

        Args:
            variables: the template's variables, as plain JSON values.

        Raises:
            StoppedTemplateError: rendering takes too much memory or time, or the text is too long.
            RefusedTemplateError: the template fails on these variables, or refuses them with raise_exception.
        """
        with self._lock:
            worker = self._ready()
            try:
                answer = worker.ask(variables, MAX_SECONDS)
            except BaseException:  # also after an interruption: the next prompt would read this one's answer
                self.close()
                raise
            return _text_of(answer)

    def close(self) -> None:
        """Ends the process, if it runs."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _ready(self) -> _Worker:
        """Returns the running worker; starts one if there is none, if it has ended, or after a fork."""
        if self._worker is not None and self._worker.usable():
            return self._worker
        worker = _Worker()
        try:
            first = {
                "path": [os.path.abspath(place) for place in sys.path],
                "source": self._source,
                "memory": MAX_MEMORY,
                "seconds": int(2 * MAX_SECONDS),
            }
            _text_of(worker.ask(first, START_SECONDS))
        except sandbox.StoppedTemplateError as error:
            worker.end()
            raise sandbox.BrokenTemplateError(f"{error}, before anything was rendered") from None
        except BaseException:
            worker.end()
            raise
        self._worker = worker
        return worker


class _Worker:
    """A process that runs ``template_worker.py``, with a thread that reads its answers."""

    def __init__(self) -> None:
        if not sys.executable:
            raise sandbox.StoppedTemplateError("there is no Python to run it in a separate process")
        options: dict[str, Any] = {"start_new_session": True}  # Control-C must not reach the worker
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NO_WINDOW}
        try:
            self._process = subprocess.Popen(
                # -I: import nothing from the current folder or environment; -S: sys.path comes with the first message
                [sys.executable, "-I", "-S", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                **options,
            )
        except OSError as error:
            raise sandbox.StoppedTemplateError(f"no process can be started for it: {error.strerror or error}") from None
        self._parent = os.getpid()
        self._answers: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=_read_answers, args=(self._process.stdout, self._answers), daemon=True).start()
        self.end = weakref.finalize(self, _end, self._process)

    def usable(self) -> bool:
        """Whether the worker runs and was started by this process.

        A forked process shares the pipes with its parent, and each would read the other's answers.
        """
        return self._parent == os.getpid() and self._process.poll() is None

    def ask(self, message: Mapping[str, Any], seconds: float) -> Any:
        """Sends a message and returns the answer; StoppedTemplateError if none arrives within ``seconds``."""
        deadline = time.monotonic() + seconds
        assert self._process.stdin is not None, "a pipe"
        try:
            template_worker.write(self._process.stdin, message)
        except OSError:
            raise self._ended() from None
        while True:
            try:
                data = self._answers.get(timeout=0.05)  # on Windows, a wait without a timeout ignores Control-C
                break
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise sandbox.StoppedTemplateError(f"it takes longer than {seconds:g} seconds") from None
                if self._memory() > MAX_MEMORY:
                    raise sandbox.StoppedTemplateError("it takes too much memory") from None
        if data is None:
            raise self._ended()
        return json.loads(data.decode("utf-8", "surrogatepass"))

    def _memory(self) -> int:
        """Resident bytes of the worker on systems that do not enforce memory limits (Windows, macOS); else 0."""
        if sys.platform == "win32":
            import psutil

            with contextlib.suppress(psutil.Error):
                return int(psutil.Process(self._process.pid).memory_info().rss)
        elif sys.platform == "darwin":
            with contextlib.suppress(OSError, ValueError):
                asked = ["ps", "-o", "rss=", "-p", str(self._process.pid)]
                return int(subprocess.run(asked, capture_output=True, check=False).stdout) * 1024
        return 0

    def _ended(self) -> sandbox.StoppedTemplateError:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return sandbox.StoppedTemplateError("its text is too long")
        what = "took too much memory or time" if code < 0 else "could not be run or took too much memory"
        return sandbox.StoppedTemplateError(f"it {what}: its process ended with code {code}")


def _read_answers(stream: Any, answers: queue.Queue[bytes | None]) -> None:
    """Puts each answer into the queue, and None when the stream ends or an answer is too long."""
    while True:
        try:
            size = int.from_bytes(head, "little") if len(head := stream.read(8)) == 8 else -1
            data = stream.read(size) if 0 <= size <= MAX_ANSWER else b""
        except (OSError, ValueError):  # the stream was closed meanwhile
            size, data = -1, b""
        if size < 0 or len(data) != size:
            answers.put(None)
            return
        answers.put(data)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # closing flushes what was not sent, which the ended process cannot take
                stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _text_of(answer: Any) -> str:
    """The text in an answer; raises the exception that the answer names, if it names one."""
    if isinstance(answer, dict):
        if isinstance(text := answer.get("text"), str):
            return text
        kinds = {kind.__name__: kind for kind in sandbox.ChatTemplateError.__subclasses__()}
        if answer.get("error") in kinds:
            raise kinds[answer["error"]](str(answer.get("message"))[:2000])
    raise sandbox.StoppedTemplateError("its process returned an answer without a text")
