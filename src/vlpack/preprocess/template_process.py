"""A chat template that is rendered in a process of its own, where its memory and its time can be bounded.

Python cannot bound a stranger's program from inside: a list of lists that doubles, a comparison of two of them, a
template of a hundred thousand macros take any memory or time within one step. See ``template_worker.py``.
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
"""Bytes that the process may have beyond what it begins with; a long conversation takes some ten million."""

MAX_SECONDS = 20.0
"""Longest time for one prompt, or for reading the template; a prompt takes a millisecond."""

START_SECONDS = 60.0
"""Longest time for the process to start and read the template, on a machine that is busy with other things."""

MAX_ANSWER = 8 * sandbox.MAX_CHARACTERS
"""Most bytes of an answer: a character takes up to six."""

_WORKER = Path(template_worker.__file__)
_ENVIRONMENT = ("TZ", "LANG", "LC_ALL", "PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""Variables that the process gets. Tokens and keys are not among them."""


class TemplateProcess:
    """A template in a process of its own, with `vlpack.preprocess.template_sandbox.Template`'s methods.

    The process is started at once and kept for the next prompts; one that had to be ended is started again.

    Args:
        source: the jinja text.

    Raises:
        BrokenTemplateError: the text is not a template, or reading it takes too much memory or time.
        StoppedTemplateError: no process can be started.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._ready()

    def render(self, variables: Mapping[str, Any]) -> str:
        """The rendered text.

        Args:
            variables: plain JSON.

        Raises:
            StoppedTemplateError: it takes too much memory or time, or makes too long a text.
            RefusedTemplateError: it cannot render these variables, or says that it will not.
        """
        with self._lock:
            worker = self._ready()
            try:
                answer = worker.ask(variables, MAX_SECONDS)
            except BaseException:  # an interruption, too: the next answer would be this one's
                self.close()
                raise
            return _text_of(answer)

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _ready(self) -> _Worker:
        """The running process; a new one after the last has ended, or in a copy of this process."""
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
    """A process that runs ``template_worker.py``, and a thread that reads its answers."""

    def __init__(self) -> None:
        if not sys.executable:
            raise sandbox.StoppedTemplateError("there is no Python to run it apart from this program")
        options: dict[str, Any] = {"start_new_session": True}  # Control-C is for this program alone
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NO_WINDOW}
        try:
            self._process = subprocess.Popen(
                # -I: nothing of the current folder or the environment is imported; -S: what is needed is told
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
        """Whether it runs, and belongs to this process: a fork shares pipes, and would take each other's answers."""
        return self._parent == os.getpid() and self._process.poll() is None

    def ask(self, message: Mapping[str, Any], seconds: float) -> Any:
        """Its answer to a message; a StoppedTemplateError where there is none in time."""
        deadline = time.monotonic() + seconds
        assert self._process.stdin is not None, "a pipe"
        try:
            template_worker.write(self._process.stdin, message)
        except OSError:
            raise self._ended() from None
        while True:
            try:
                data = self._answers.get(timeout=0.05)  # a wait without an end hears no Control-C on Windows
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
        """Resident bytes where the system does not heed a limit of its own for them; 0 where it does."""
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
        what = "took too much memory or time" if code < 0 else "could not be run, or took too much memory"
        return sandbox.StoppedTemplateError(f"it {what}: its process ended with {code}")


def _read_answers(stream: Any, answers: queue.Queue[bytes | None]) -> None:
    """Put each answer into the queue, and None after the last or in place of one that is too long."""
    while True:
        try:
            size = int.from_bytes(head, "little") if len(head := stream.read(8)) == 8 else -1
            data = stream.read(size) if 0 <= size <= MAX_ANSWER else b""
        except (OSError, ValueError):  # closed meanwhile
            size, data = -1, b""
        if size < 0 or len(data) != size:
            answers.put(None)
            return
        answers.put(data)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # of what was not sent any more
                stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _text_of(answer: Any) -> str:
    """An answer's text, or the exception that it names."""
    if isinstance(answer, dict):
        if isinstance(text := answer.get("text"), str):
            return text
        kinds = {kind.__name__: kind for kind in sandbox.ChatTemplateError.__subclasses__()}
        if answer.get("error") in kinds:
            raise kinds[answer["error"]](str(answer.get("message"))[:2000])
    raise sandbox.StoppedTemplateError("its process answered something else than a text")
