"""Answers rows on a Ray cluster: actors with an engine each, which Ray restarts if they or their machines fail.

The process that runs the batch reads the input and writes the output, as without Ray, so ids, resuming and the order of
rows are the same. Only rows and answers are sent through Ray: the package and the files that rows name must be at the
same paths on all machines.
"""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

from vlpack.bulk.answering import Answerer
from vlpack.bulk.form import Form, form_of
from vlpack.bulk.row import Task
from vlpack.bulk.shards import Row
from vlpack.bulk.workers import TRIES, Setting
from vlpack.errors import OptionError, VlpackError, option


def require_ray() -> Any:
    """Imports and returns the module ray.

    Raises:
        OptionError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise OptionError("Ray is not installed.", "pip install 'vlpack[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported unless the user asks for it
    import ray

    return ray


class Actor:
    """A Ray actor that answers rows with an engine of its own.

    Args:
        setting: what the actor needs to make an engine.
    """

    def __init__(self, setting: Setting) -> None:
        self._answerer: Answerer | None = None
        self._error: VlpackError | None = None
        try:
            form = form_of(setting.kind, setting.question, setting.place, setting.words, setting.name)
            self._answerer = Answerer(setting.package, setting.question, form, setting.options)
        except VlpackError as error:  # Ray would turn it into text, so `ready` returns it
            self._error = error

    def answer(self, task: Task) -> Row:
        """Answers a row; Ray calls it from several threads at a time."""
        assert self._answerer is not None, "it is ready"
        return self._answerer.submit(task).result()

    def ready(self) -> int | VlpackError:
        """The process id of the actor if it has loaded the package, or the error if it could not."""
        return self._error or os.getpid()


class Cluster:
    """Ray actors that answer rows. Use it as a context manager.

    Args:
        setting: what every actor needs; its threads are those of all actors together, or None for all of the cluster.
        count: number of actors.
        form: form of the rows.
        address: address of the cluster, ``auto`` for the one on this machine, or ``local`` for a new one on this
            machine, which ends with the run.

    Attributes:
        actors: handles of the actors.

    Raises:
        OptionError: Ray is not installed, there is no cluster at the address, or the cluster is too small.
        VlpackError: an actor cannot load the package.
    """

    def __init__(self, setting: Setting, count: int, form: Form, address: str) -> None:
        self._ray, self._form = require_ray(), form
        self._owned = not self._ray.is_initialized()
        if self._owned:
            self._connect(address)
        try:
            threads = self._threads(setting.options.threads, count)
        except BaseException:
            if self._owned:  # the caller has no object yet that could end it
                self._ray.shutdown()
            raise
        self._window = setting.options.slots + max(2, setting.options.slots // 2)
        remote = self._ray.remote(Actor).options(
            num_cpus=threads,
            max_restarts=-1,
            max_task_retries=TRIES - 1,
            max_concurrency=self._window + 1,
            scheduling_strategy="SPREAD",
        )
        options = setting.options._replace(threads=threads)
        self.actors = [remote.remote(setting._replace(options=options)) for _ in range(count)]

    def _connect(self, address: str) -> None:
        """Connects to the cluster; raises an OptionError if there is none."""
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if address == "local":
            quiet["include_dashboard"] = False
        try:
            self._ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise OptionError(
                f"There is no Ray cluster at {address}: {str(error).strip()[:200]}",
                f"Start one with `ray start --head`, or give {option('ray', 'local')}.",
            ) from None

    def _threads(self, given: int | None, count: int) -> int:
        """The number of threads of each actor, which Ray reserves for it.

        Raises:
            OptionError: the cluster has too few cores for the actors.
        """
        cores = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        threads = max(1, (given or sum(cores)) // count)
        threads = min(threads, max(cores, default=0)) if given is None else threads
        while given is None and threads > 1 and sum(core // threads for core in cores) < count:
            threads -= 1
        if threads < 1 or sum(core // threads for core in cores) < count:
            raise OptionError(
                f"{count} actors with {threads} threads do not fit on the cluster, whose machines have {cores} cores.",
                f"Give fewer {option('workers')} or {option('threads')}.",
            )
        return threads

    def __enter__(self) -> Cluster:
        try:
            for found in self._ray.get([actor.ready.remote() for actor in self.actors]):
                if isinstance(found, VlpackError):
                    raise found
        except BaseException as error:
            self.__exit__()
            raise self._cause(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._owned:
            self._ray.shutdown()
            return
        for actor in self.actors:
            self._ray.kill(actor)

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Row]]:
        """Answers rows and yields each with its row of the output, as they are finished.

        Raises:
            VlpackError: an engine has failed.
        """
        running: dict[Any, tuple[Task, int]] = {}
        suspects: deque[Task] = deque()  # rows whose actors failed several times; each is answered alone at the end
        load = [0] * len(self.actors)
        more = True
        while True:
            while more and min(load) < self._window:
                task = next(tasks, None)
                if task is None:
                    more = False
                else:
                    self._send(task, running, load)
            alone = not running
            if alone and not suspects:
                return
            if alone:
                self._send(suspects.popleft(), running, load)
            done, _ = self._ray.wait(list(running), num_returns=1)
            task, number = running.pop(done[0])
            load[number] -= 1
            try:
                yield task, self._ray.get(done[0])
            except self._ray.exceptions.RayActorError as error:
                if alone:
                    failed = VlpackError(f"The actor that answered the row failed: {str(error).splitlines()[0][:200]}")
                    yield task, self._form.failed(task, failed)
                else:
                    suspects.append(task)
            except self._ray.exceptions.RayTaskError as error:
                raise self._cause(error) from None

    def _send(self, task: Task, running: dict[Any, tuple[Task, int]], load: list[int]) -> None:
        """Gives a row to the actor with the fewest rows."""
        number = load.index(min(load))
        load[number] += 1
        running[self.actors[number].answer.remote(task)] = task, number

    def _cause(self, error: BaseException) -> BaseException:
        """The VlpackError that caused an error of Ray, or one that describes it; others are returned unchanged."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, VlpackError):
            return cause
        text = str(error)
        if isinstance(error, self._ray.exceptions.RayError):
            return VlpackError(f"Ray failed: {text.strip().splitlines()[-1][:300]}")
        return error
