"""Answers the rows of a batch with Ray Data: its tasks read the rows, and actors with an engine each answer them.

The process that runs the batch only plans. First, tasks compute the ids of all rows. The rows that are not in the
output yet are divided into units, one for each shard. Then Ray Data reads the units on the cluster, gives them to the
actors, and returns what they have done. An actor writes the shard of a unit itself when all its rows are answered. If
an actor or its machine fails, Ray restarts the actor and gives its unit to another one, which writes the same shard.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import ray
from ray import data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vlpack.bulk.cluster import Cluster
from vlpack.bulk.node_package import PackageFiles, copied, node_package
from vlpack.bulk.plan import Index, Unit
from vlpack.bulk.row import Portion
from vlpack.bulk.source import Source
from vlpack.bulk.storage import is_uri
from vlpack.bulk.units import Attempts, Done, Job, Station, indexed, packed, read, unpacked
from vlpack.errors import VlpackError

_READ = "vlpack.read"
"""Column with the pickled result of a task that reads."""


class Calls(Datasource):  # type: ignore[misc]
    """A source of Ray Data whose rows are the pickled results of calls, each made by a task of its own.

    Args:
        function: function that is called; it must be importable by its name.
        job: first argument of every call.
        parts: second arguments of the calls.
    """

    def __init__(self, function: Callable[[Job, Any], Any], job: Job, parts: Sequence[Any]) -> None:
        super().__init__()
        self._function, self._job, self._parts = function, ray.put(job), parts

    def estimate_inmemory_data_size(self) -> None:
        """None, because the size is not known before the calls are made."""

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """A task for each call."""
        return [
            ReadTask(
                _Call(self._function, self._job, part, place),
                BlockMetadata(num_rows=1, size_bytes=None, exec_stats=None, input_files=None),
            )
            for place, part in enumerate(self._parts)
        ]


class _Call:
    """A call of a function, whose result becomes a block of one row."""

    def __init__(self, function: Callable[[Job, Any], Any], job: Any, part: Any, place: int) -> None:
        self._function, self._job, self._part, self._place = function, job, part, place

    def __call__(self) -> list[pyarrow.Table]:
        made = packed((self._part, self._function(ray.get(self._job), self._part)))
        return [pyarrow.table({"place": [self._place], _READ: pyarrow.array([made], pyarrow.large_binary())})]


class Actor:
    """The class that Ray Data gives units to; a VlpackError becomes a result, because Ray would make a text of it.

    Args:
        job: what the run is about.
        attempts: handle of the Ray actor with the `Attempts`.
        files: handle of the Ray actor with the `PackageFiles`; None if the package is at a URI.
    """

    def __init__(self, job: Job, attempts: Any, files: Any) -> None:
        self._station: Station | VlpackError
        try:
            self._station = Station(job, _folder(job.setting.package, files), _RemoteAttempts(attempts))
        except VlpackError as error:
            self._station = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answers units and returns what was done, pickled."""
        made = []
        for given in batch[_READ]:
            try:
                unit, found = unpacked(given)
                for failure in (self._station, found):
                    if isinstance(failure, VlpackError):
                        raise failure
                assert isinstance(self._station, Station), "an error was raised"
                made.append(packed(self._station.answer(unit, found)))
            except VlpackError as error:
                made.append(packed(error))
        return {"done": np.array(made, object)}


class _RemoteAttempts:
    """`Attempts` in an actor of Ray."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def begin(self, shard: str) -> Any:
        try:
            return ray.get(self._handle.begin.remote(shard))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, VlpackError) else error) from None

    def alone(self, shard: str, key: str | None) -> None:
        ray.get(self._handle.alone.remote(shard, key))


def _folder(package: str, files: Any) -> Path:
    """The folder of the package on this machine; if it is not there, it is copied from the machine of the run."""
    if files is None or Path(package).is_dir():
        return node_package(package)

    def chunks(name: str) -> Iterator[bytes]:
        start = 0
        while part := ray.get(files.read.remote(name, start)):
            yield part
            start += len(part)

    return copied(package, chunks)


def index(source: Source, job: Job) -> Iterator[tuple[Portion, Index]]:
    """Computes the ids of all rows of an input on the cluster.

    Yields:
        The portions of the input in order, each with the ids of its rows.

    Raises:
        VlpackError: the input cannot be read.
    """
    with _settings(in_order=True):
        portions = list(source.portions())
        found = data.read_datasource(Calls(indexed, job, portions), override_num_blocks=len(portions))
        for batch in found.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            for made in batch[_READ]:
                portion, ids = unpacked(made.as_py())
                if isinstance(ids, VlpackError):
                    raise ids
                yield portion, ids


def answer(units: Sequence[Unit], job: Job, cluster: Cluster, count: int, threads: int) -> Iterator[Done]:
    """Answers units on the cluster and writes their shards.

    Args:
        units: the units.
        job: what the run is about.
        cluster: the cluster.
        count: number of actors.
        threads: number of threads of each.

    Yields:
        What was done, unit by unit, as they are finished.

    Raises:
        VlpackError: an actor cannot go on.
    """
    attempts = ray.remote(Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    helpers = [attempts]
    files = None
    if not is_uri(job.setting.package):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        files = ray.remote(PackageFiles).options(num_cpus=0, scheduling_strategy=here).remote(job.setting.package)
        helpers.append(files)
    job = job._replace(setting=job.setting._replace(options=job.setting.options._replace(threads=threads)))
    try:
        with _settings(in_order=False):
            found = data.read_datasource(
                Calls(read, job, units),
                override_num_blocks=len(units),
                num_cpus=0,  # the actors have reserved all cores
                concurrency=2 * count,
            ).map_batches(
                Actor,
                fn_constructor_args=(job, attempts, files),
                compute=data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=2),
                num_cpus=threads,
                batch_size=None,
                batch_format="numpy",
                zero_copy_batch=True,
            )
            for batch in found.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
                yield from map(unpacked, batch["done"])
    except Exception as error:
        raise cluster.cause(error) from None
    finally:
        for helper in helpers:
            ray.kill(helper)


@contextlib.contextmanager
def _settings(*, in_order: bool) -> Iterator[None]:
    """Sets what pipelines need in Ray Data's context, and sets it back at the end.

    Args:
        in_order: whether results are in the order of their tasks.
    """
    context = data.DataContext.get_current()
    log = logging.getLogger("ray.data")
    level = log.level
    log.setLevel(logging.ERROR)
    before = context.enable_progress_bars, context.execution_options.preserve_order, context.target_max_block_size
    context.enable_progress_bars = False
    context.execution_options.preserve_order = in_order
    context.target_max_block_size = None  # a block is a unit, whatever its size
    try:
        yield
    finally:
        log.setLevel(level)
        context.enable_progress_bars, context.execution_options.preserve_order, context.target_max_block_size = before
