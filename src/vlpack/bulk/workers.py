"""Several processes that answer rows, each with an engine on its own cores, for machines with several processors.

The parent reads the input and writes the output. It sends rows to the processes and receives finished rows as pickled
messages over pipes that no other process can open. If a process is killed, its rows are given to a new one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from vlpack.bulk.answering import Answerer, EngineOptions
from vlpack.bulk.form import Form, Words, form_of
from vlpack.bulk.media import Place
from vlpack.bulk.question import Question
from vlpack.bulk.row import Task
from vlpack.bulk.shards import Row
from vlpack.errors import VlpackError
from vlpack.system import available_cores, checked_threads, own_process

TRIES = 3
"""Number of times that a process may be killed while it answers a row, after which the row gets an error."""

_LENGTH = struct.Struct("<Q")
"""Format of the length in bytes that precedes every message in a pipe."""


class Setting(NamedTuple):
    """The settings from which a process makes its engine and its form of rows.

    Attributes:
        package: folder of the package.
        kind: kind of the input.
        name: name of the package.
        question: what is asked about every row.
        place: where the files of rows are.
        words: function that writes options in errors; it must be importable by its name.
        options: options of the engine.
        cores: cores that the process runs on; empty for all.
    """

    package: str
    kind: str
    name: str
    question: Question
    place: Place
    words: Words
    options: EngineOptions
    cores: tuple[int, ...] = ()


class Workers:
    """Processes that answer rows. Use it as a context manager.

    Args:
        setting: what every process needs; its threads are those of all processes together.
        count: number of processes.
        form: form of the rows.

    Raises:
        VlpackError: a process cannot load the package.
    """

    def __init__(self, setting: Setting, count: int, form: Form) -> None:
        self._form, self._told = form, queue.SimpleQueue[tuple[_Worker, Any]]()
        self._early: deque[tuple[_Worker, Any]] = deque()  # messages that came while a new process was loading
        threads = checked_threads(setting.options.threads)
        cores = _cores(count)
        self._workers: list[_Worker] = []
        for number in range(count):
            own = max(1, len(cores[number]) or available_cores() // count)
            if setting.options.threads is not None:
                own = max(1, threads // count)
            options = setting.options._replace(threads=own)
            self._workers.append(_Worker(setting._replace(options=options, cores=cores[number]), self._told))

    def __enter__(self) -> Workers:
        try:
            for worker in self._workers:
                worker.start()
            for _ in self._workers:  # until all packages are loaded
                worker, message = self._told.get()
                if isinstance(message, VlpackError):
                    raise message
                if message is None:
                    raise worker.ended()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Row]]:
        """Answers rows and yields each with its row of the output, as they are finished.

        Raises:
            VlpackError: a process has failed in a way in which a new one would fail, too.
        """
        again: deque[Task] = deque()
        suspects: deque[Task] = deque()  # rows whose processes were killed twice; each is answered alone
        tries: dict[int, int] = {}
        more = True
        while True:
            for worker in sorted(self._workers, key=lambda worker: len(worker.running)):
                alone = any(tries.get(place) == TRIES - 1 for place in worker.running)
                if suspects and not worker.running:
                    worker.send(suspects.popleft())
                    alone = True
                while more and not suspects and not alone and len(worker.running) < worker.window:
                    task = again.popleft() if again else next(tasks, None)
                    if task is None:
                        more = False
                    else:
                        worker.send(task)
            if not any(worker.running for worker in self._workers):
                return
            worker, message = self._early.popleft() if self._early else self._told.get()
            if isinstance(message, VlpackError):
                raise message
            if message is not None:
                place, row = message
                tries.pop(place, None)
                yield worker.running.pop(place), row
                continue
            lost = list(worker.running.values())  # the process was killed
            for task in lost:
                tries[task.place] = tries.get(task.place, 0) + 1
                if tries[task.place] < TRIES:
                    (suspects if tries[task.place] == TRIES - 1 else again).append(task)
                else:
                    yield task, self._form.failed(task, worker.ended())
            more = more or bool(again)
            worker.running.clear()
            worker.start()
            self._ready(worker)

    def _ready(self, worker: _Worker) -> None:
        """Waits until a new process has loaded the package; messages of others stay in order."""
        while True:
            sender, message = self._told.get()
            if sender is worker:
                break
            self._early.append((sender, message))
        if isinstance(message, VlpackError):
            raise message
        if message is None:
            raise worker.ended()


class _Worker:
    """The parent's end of a process that answers rows.

    Args:
        setting: settings of the process.
        told: queue for its messages; None stands for its end.

    Attributes:
        running: rows that the process is answering, by their places.
        window: number of rows that it is given at a time.
    """

    def __init__(self, setting: Setting, told: queue.SimpleQueue[tuple[_Worker, Any]]) -> None:
        self._setting, self._queue = setting, told
        self.running: dict[int, Task] = {}
        self.window = 2 * setting.options.slots + 2
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process; its first message reports that it has loaded the package, or why it could not."""
        self.close()
        command, environment = own_process("vlpack.bulk.workers")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=os.name != "nt"
        )
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        self._write(self._setting)

    def send(self, task: Task) -> None:
        """Gives a row to the process."""
        self.running[task.place] = task
        self._write(task)

    def ended(self) -> VlpackError:
        """The error for a process that has ended."""
        code = None if self._process is None else self._process.wait()
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return VlpackError(
            f"A process that answers rows ended {how}.", "If there was not enough memory, give it fewer rows at a time."
        )

    def close(self) -> None:
        """Ends the process at once."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # what was not sent is lost
                self._process.stdin.close()

    def _write(self, value: Any) -> None:
        """Sends a value to the process."""
        assert self._process is not None, "it was started"
        assert self._process.stdin is not None, "a pipe"
        with contextlib.suppress(OSError):  # it was killed, which the listening thread reports
            _send(self._process.stdin, value)

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Puts the messages of the process into the queue until it ends; runs in a thread of its own."""
        assert process.stdout is not None, "a pipe"
        while True:
            try:
                message = _receive(process.stdout)
            except (EOFError, OSError, pickle.UnpicklingError):
                message = None
            self._queue.put((self, message))
            if message is None:
                process.stdout.close()
                return


def _send(file: IO[bytes], value: Any) -> None:
    """Writes a value into a pipe."""
    data = pickle.dumps(value)
    file.write(_LENGTH.pack(len(data)) + data)
    file.flush()


def _receive(file: IO[bytes]) -> Any:
    """Reads the next value from a pipe; raises an EOFError if the other end has closed it."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    data = file.read(_LENGTH.unpack(head)[0])
    return pickle.loads(data)


def _cores(count: int) -> list[tuple[int, ...]]:
    """The cores of each of several processes; empty if cores cannot be chosen.

    Each process gets cores with adjacent numbers, which usually belong to one processor.
    """
    if not hasattr(os, "sched_setaffinity"):
        return [()] * count
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        return [()] * count
    return [tuple(cores[len(cores) * n // count : len(cores) * (n + 1) // count]) for n in range(count)]


def main() -> None:
    """Answers the rows that arrive on standard input, until the parent closes it or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is handled by the parent, which ends this process
    given, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the output of libraries goes to standard error, so that it does not mix with messages
    setting: Setting = _receive(given)
    if setting.cores and sys.platform != "win32" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, setting.cores)
    form = form_of(setting.kind, setting.question, setting.place, setting.words, setting.name)
    sending = threading.Lock()

    def say(message: Any) -> None:
        with sending:
            _send(out, message)

    try:
        answerer = Answerer(setting.package, setting.question, form, setting.options)
    except VlpackError as error:
        say(error)
        return
    say("ready")
    while True:
        try:
            task: Task = _receive(given)
        except EOFError:
            os._exit(0)  # the parent has ended, so the rows in progress are no longer needed
        future = answerer.submit(task)

        def done(future: Any, place: int = task.place) -> None:
            error = future.exception()
            if error is None:
                say((place, future.result()))
            else:
                say(error if isinstance(error, VlpackError) else VlpackError(f"The engine has failed: {error}"))

        future.add_done_callback(done)
