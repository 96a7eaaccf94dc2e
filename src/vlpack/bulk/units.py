"""Answers units of rows in any process of a cluster: reads the rows, and writes their shard when all are answered.

Rows and results are sent between processes as pickled bytes, so that Ray Data takes a unit as one row of its own, which
it never divides.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlpack.bulk.answering import AHEAD, Answerer, alike
from vlpack.bulk.form import Form, form_of
from vlpack.bulk.identity import MANIFEST, manifest_of
from vlpack.bulk.plan import Index, Unit, index_of
from vlpack.bulk.row import Ids, Portion, Task
from vlpack.bulk.shards import Row, format_of
from vlpack.bulk.storage import Local, Remote
from vlpack.bulk.workers import TRIES, Setting
from vlpack.bulk.written import repair
from vlpack.errors import OptionError, PackageError, VlpackError
from vlpack.package.manifest import read_manifest


class Job(NamedTuple):
    """What the processes of a run have in common.

    Attributes:
        setting: settings from which an engine and a form of rows are made.
        package_hash: hash of the package.
        place: folder of the output.
        format: name of the format of its shards.
        types: pyarrow types of the columns of the input.
        run: identifier of the run, by which its processes notice that another one has taken over the output.
    """

    setting: Setting
    package_hash: str
    place: Local | Remote
    format: str
    types: dict[str, Any]
    run: str

    def form(self) -> Form:
        """The form of the rows."""
        given = self.setting
        return form_of(given.kind, given.question, given.place, given.words, given.name)

    def ids(self) -> Ids:
        """A new function that gives ids to rows."""
        return Ids(self.form().id_column, self.setting.question.record())


class Done(NamedTuple):
    """The result of a unit.

    Attributes:
        rows: number of rows.
        failed: number of rows that failed.
        tokens: number of tokens of the answers.
        repaired: ids of the rows that replaced failed ones.
    """

    rows: int
    failed: int
    tokens: int
    repaired: list[str]


def indexed(job: Job, portion: Portion) -> Index | VlpackError:
    """The ids of a portion's rows, or the error that ends the run."""
    try:
        return index_of(portion, job.ids())
    except VlpackError as error:
        return error


def read(job: Job, unit: Unit) -> list[Task] | VlpackError:
    """The rows of a unit, or the error that ends the run."""
    try:
        return unit.tasks(job.ids())
    except VlpackError as error:
        return error


class Attempts:
    """Counts how often processes have begun a unit, to find rows that end their processes.

    A unit whose processes have ended `TRIES` - 1 times is answered row by row; a row that ends the process then is not
    tried again.
    """

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}
        self._alone: dict[str, str] = {}
        self._deadly: dict[str, set[str]] = {}

    def begin(self, shard: str) -> tuple[bool, set[str]]:
        """Whether the rows of a unit shall be answered one by one, and the ids of those that are not tried again.

        Raises:
            VlpackError: its processes have ended too often for reasons other than one row.
        """
        self._begun[shard] = self._begun.get(shard, 0) + 1
        deadly = self._deadly.setdefault(shard, set())
        if shard in self._alone:
            deadly.add(self._alone.pop(shard))
        ended = self._begun[shard] - 1 - len(deadly)
        if ended >= 3 * TRIES:
            raise VlpackError(
                f"The processes that answered the rows of {shard} ended {ended} times.",
                "If there was not enough memory, give them fewer rows at a time.",
            )
        return self._begun[shard] >= TRIES, set(deadly)

    def alone(self, shard: str, key: str | None) -> None:
        """Notes which row of a unit is answered now while no other is; None if there is none."""
        if key is None:
            self._alone.pop(shard, None)
        else:
            self._alone[shard] = key


class Station:
    """An engine that answers units and writes their shards.

    Args:
        job: what the run is about.
        folder: folder of the package on this machine.
        attempts: the `Attempts`, or an object with the same methods in another process.

    Raises:
        VlpackError: the package cannot be loaded.
    """

    def __init__(self, job: Job, folder: Path, attempts: Any) -> None:
        self._job, self._attempts, self._form = job, attempts, job.form()
        self._shards = format_of(job.format, job.types)
        given = job.setting
        if read_manifest(folder).get("sha256") != job.package_hash:
            raise PackageError(
                f"The package {given.name} on {socket.gethostname()} is another one than where the run began.",
                "Copy it again, or give a URI, from which every machine copies it.",
            )
        self._answerer = Answerer(folder, given.question, self._form, given.options)

    def answer(self, unit: Unit, tasks: list[Task]) -> Done:
        """Answers the rows of a unit and writes its shard.

        Raises:
            VlpackError: the engine has failed, the shard cannot be written, or another run writes into the output.
        """
        one_by_one, deadly = self._attempts.begin(unit.shard)
        made: list[Row] = [{} for _ in tasks]
        answers = self._one_by_one(unit, tasks, deadly) if one_by_one else self._together(tasks)
        for task, row in answers:
            made[task.place] = row
        try:
            self._check_run()
            layout = self._form.layout
            if unit.repairs:
                repair(self._job.place, self._shards, layout, unit.shard, {layout.id(row): row for row in made})
            else:
                self._job.place.write(unit.shard, self._shards.encode(made))
        except OSError as error:
            raise VlpackError(
                f"The output {self._job.place.name} cannot be written on {socket.gethostname()}: {str(error)[:200]}.",
                "Give a URI, or a folder that all machines share. Finished rows are kept.",
            ) from None
        tokens = sum(map(self._form.tokens, made))
        repaired = [task.key for task in tasks] if unit.repairs else []
        return Done(len(made), sum(map(layout.failed, made)), tokens, repaired)

    def _together(self, tasks: list[Task]) -> Iterator[tuple[Task, Row]]:
        """Answers rows, many at a time."""
        return self._answerer(alike(tasks, self._form.area, AHEAD * self._job.setting.options.slots))

    def _one_by_one(self, unit: Unit, tasks: list[Task], deadly: set[str]) -> Iterator[tuple[Task, Row]]:
        """Answers one row after the other, except those that have ended their process."""
        for task in tasks:
            if task.key in deadly:
                yield (
                    task,
                    self._form.failed(task, VlpackError(f"The process that answered the row ended {TRIES} times.")),
                )
                continue
            self._attempts.alone(unit.shard, task.key)
            yield from self._answerer(iter([task]))
            self._attempts.alone(unit.shard, None)

    def _check_run(self) -> None:
        """Raises an OptionError if another run has begun to write into the output."""
        with self._job.place.open(MANIFEST) as file:
            runs = manifest_of(file.read(), f"{self._job.place.name}/{MANIFEST}")["runs"]
        if not runs or runs[-1].get("run") != self._job.run:
            raise OptionError(f"Another run of vlpack batch writes into {self._job.place.name}.", "Wait for its end.")


def packed(value: Any) -> bytes:
    """A value as pickled bytes."""
    return pickle.dumps(value, protocol=5)


def unpacked(data: Any) -> Any:
    """The value in pickled bytes that another process of the run has made.

    Raises:
        VlpackError: it is one.
    """
    value = pickle.loads(data)
    if isinstance(value, VlpackError):
        raise value
    return value
