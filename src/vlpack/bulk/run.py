"""`vlpack.batch`: answers a question about every row of a data set, exactly once even if runs are interrupted."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from vlpack.bulk.answering import AHEAD, Answerer, EngineOptions, alike
from vlpack.bulk.form import Form, Words, form_of
from vlpack.bulk.media import Place
from vlpack.bulk.output import Output
from vlpack.bulk.question import Question
from vlpack.bulk.row import Ids, Task
from vlpack.bulk.shards import Row, format_of
from vlpack.bulk.source import Source, open_source
from vlpack.bulk.workers import Setting, Workers
from vlpack.errors import OptionError, in_python, option
from vlpack.package.manifest import whole_package
from vlpack.preprocess import VideoOptions
from vlpack.preprocess.literal import CONTROL
from vlpack.runtime.sampling import Sampling, check_number
from vlpack.tasks import GENERATE, manifest_task
from vlpack.version import __version__

PROGRESS_SECONDS = 0.5
"""Shortest time in seconds between two reports of the progress."""


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        rows: number of rows in the output, including those of earlier runs.
        total: number of rows of the input; None if it is not known yet.
        answered: number of rows that this run has finished.
        errors: number of rows in the output that failed.
        seconds: time in seconds since this run began to answer rows.
        rows_per_minute: number of rows that this run finishes in a minute.
        tokens_per_second: number of tokens of answers that this run generates in a second.
        seconds_left: estimated time in seconds until all rows are finished; None if it is not known.
    """

    rows: int = 0
    total: int | None = None
    answered: int = 0
    errors: int = 0
    seconds: float = 0.0
    rows_per_minute: float = 0.0
    tokens_per_second: float = 0.0
    seconds_left: float | None = None


@dataclass
class BatchResult(Progress):
    """The result of a run.

    Attributes:
        output: folder of the output.
        before: number of rows that earlier runs had finished.
        failed: number of rows that failed in this run.
        stopped: whether the run stopped early, because too many rows failed.
        load_seconds: time for loading the package, in seconds.
    """

    output: str = ""
    before: int = 0
    failed: int = 0
    stopped: bool = False
    load_seconds: float = 0.0


class Answers(Protocol):
    """The interface of what answers rows: an engine in this process, several processes, or a Ray cluster."""

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Row]]:
        """Yields each row with its row of the output, as they are finished."""
        ...


def batch(
    package: str | os.PathLike[str],
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    prompt: str | None = None,
    template: str | None = None,
    system: str | None = None,
    schema: Mapping[str, Any] | bool | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    special_tokens: str = CONTROL,
    image_column: str | None = None,
    id_column: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    video_options: VideoOptions | None = None,
    files: str | os.PathLike[str] | None = None,
    allow_urls: bool = False,
    allow_private_urls: bool = False,
    format: str = "jsonl",
    shard_rows: int = 1000,
    limit: int | None = None,
    max_errors: int | None = None,
    retry_errors: bool = False,
    slots: int = 8,
    context: int | None = None,
    threads: int | None = None,
    workers: int = 1,
    ray: str | None = None,
    progress: Callable[[Progress], object] | None = None,
    words: Words = in_python,
) -> BatchResult:
    """Asks a package about every row of a data set and writes the answers into a folder.

    A run that was interrupted in any way resumes if it is started again with the same arguments. Rows that cannot be
    answered get an error in the output and do not end the run.

    Args:
        package: folder of a package that generates text, built for the CPU.
        source: folder or pattern of images, videos and PDFs, file of JSON lines, file in OpenAI's batch format, Parquet
            file, or folder of a Hugging Face data set.
        output: folder for the answers; a new one, or that of an interrupted run.
        prompt: question about the rows that have no ``prompt`` or ``messages`` of their own.
        template: question with names of columns in braces, such as ``Describe {title}.``.
        system: system prompt.
        schema: JSON schema that every answer matches.
        regex: regular expression that every answer matches as a whole.
        choices: texts of which every answer is one.
        max_tokens: largest number of tokens of an answer; None for 512.
        sampling: sampling parameters; None for the package's.
        special_tokens: how special tokens that are written in texts are encoded: as ``control`` tokens, or as plain
            ``text``.
        image_column: column with the image of a row; None for ``image`` or ``images``.
        id_column: column with the id of a row; None for ``id``, and for a hash of the row if it has none.
        min_pixels: smallest area of an image in pixels; None for the package's.
        max_pixels: largest area of an image in pixels; None for the package's. Smaller is faster.
        video_options: sampling of the frames of videos.
        files: folder in which all files that rows name must be; None for the folder of the input.
        allow_urls: whether http(s) URLs in rows are downloaded.
        allow_private_urls: whether these URLs may lead to this machine or its network.
        format: format of the output, ``jsonl`` or ``parquet``.
        shard_rows: number of rows of each file of the output.
        limit: number of rows from the beginning of the input that are answered; None for all.
        max_errors: number of rows that may fail in this run before it stops; None for any number.
        retry_errors: whether rows that failed in an earlier run are answered again.
        slots: number of rows that each process answers at a time.
        context: number of tokens of prompt and answer together; None for what the model and memory allow.
        threads: number of threads of all processes together; None for all cores.
        workers: number of processes that answer rows.
        ray: address of a Ray cluster on which these processes run, ``auto`` or ``local``; None for this machine without
            Ray. The package and the files of rows must be at the same paths on all machines.
        progress: function that is called with the progress about twice a second.
        words: function that writes options in the errors of rows, for interfaces other than Python.

    Returns:
        The result of this run, with counts that include the rows of earlier runs.

    Raises:
        OptionError: an option is wrong, or the output belongs to another package or question, or is in use.
        InputError: the input cannot be read.
        VlpackError: the package cannot be loaded, or the output cannot be written.
    """
    for name, value, low in (
        ("shard_rows", shard_rows, 1),
        ("limit", limit, 1),
        ("max_errors", max_errors, 0),
        ("workers", workers, 1),
        ("slots", slots, 1),
    ):
        check_number(name, value, low, 1024 if name in ("workers", "slots") else 2**31 - 1, whole=True)
    if allow_private_urls and not allow_urls:
        raise OptionError(
            f"{option('allow_private_urls', True)} has no effect without {option('allow_urls', True)}.", "Give both."
        )
    question = Question(
        prompt=prompt,
        template=template,
        system=system,
        schema=schema,
        regex=regex,
        choices=choices,
        max_tokens=max_tokens,
        sampling=sampling or Sampling(),
        special_tokens=special_tokens,
        image_column=image_column,
        id_column=id_column,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        video_options=video_options or VideoOptions(),
    )
    folder = Path(os.path.expanduser(package))
    manifest = whole_package(folder)
    if manifest_task(folder, manifest) != GENERATE:
        raise OptionError(f"{folder} is for the task {manifest_task(folder, manifest)} and generates no text.")
    question.check_constraint()
    inside = None if files is None else os.path.expanduser(files)
    found = open_source(os.fspath(source), inside, os.path.expanduser(output))
    _check_question(question, found)
    for name, useless, kind in (("files", bool(files), "openai"), ("allow_urls", allow_urls, "files")):
        if useless and found.name == kind:
            what = "a folder of files" if kind == "files" else "requests in OpenAI's batch format"
            raise OptionError(f"{option(name)} has no effect on {what}.", "Leave it out.")
    place = Place(os.path.realpath(found.folder), allow_urls, allow_private_urls)
    form = form_of(found.name, question, place, words, folder.resolve().name)
    if found.name == "openai" and format != "jsonl":
        raise OptionError(f"{option('format')} is {format!r}, but answers in OpenAI's batch format are JSON lines.")
    written = Output(
        Path(os.path.expanduser(output)),
        form.layout,
        format_of(format, found.types),
        {"package": _identity(folder, manifest), "question": question.record()},
        _record(os.fspath(source), slots, context, threads, workers),
        shard_rows=shard_rows,
        retry_errors=retry_errors,
    )
    with written:
        run = _Run(written, found, form, question, limit, max_errors, progress)
        started = time.perf_counter()
        first = next(run.tasks, None)  # nothing is loaded if nothing is left to do
        if first is not None:
            options = EngineOptions(slots, context, threads)
            several = Setting(str(folder.resolve()), found.name, folder.resolve().name, question, place, words, options)
            with _answering(several, workers, form, ray) as answers:
                run.result.load_seconds = round(time.perf_counter() - started, 3)
                run.answer(answers, itertools.chain([first], run.tasks), slots * workers)
        return run.end()


class _Run:
    """A run, which takes rows from the input and puts their answers into the output.

    Attributes:
        tasks: rows that are not in the output yet, in the order of the input.
        result: the result so far.
    """

    def __init__(
        self,
        output: Output,
        source: Source,
        form: Form,
        question: Question,
        limit: int | None,
        max_errors: int | None,
        progress: Callable[[Progress], object] | None,
    ) -> None:
        self._output, self._source, self._form = output, source, form
        self._ids, self._limit, self._max_errors = Ids(form.id_column, question.record()), limit, max_errors
        self._report, self._reported = progress, 0.0
        total = source.total if limit is None or source.total is None else min(source.total, limit)
        self.result = BatchResult(
            output.rows, total, errors=output.errors, output=str(output.folder), before=output.rows
        )
        self._began, self._tokens, self._found = time.perf_counter(), 0, 0
        self.tasks = self._pending()

    def _pending(self) -> Iterator[Task]:
        """Yields the rows that must be answered, and takes over those that are in the journal."""
        place = 0
        for item in itertools.islice(self._source.items(), self._limit):
            self._found += 1
            key, checked = self._ids(item)
            if self._output.done(key):
                continue
            if not self._output.keep(place, key):
                yield Task(place, key, checked)
            place += 1
        self.result.total = self._found

    def answer(self, answers: Answers, tasks: Iterator[Task], slots: int) -> None:
        """Answers all rows, and stops early when too many have failed."""
        self._began = time.perf_counter()
        layout = self._form.layout
        for task, row in answers(alike(tasks, self._form.area, AHEAD * slots)):
            self._output.add(task.place, row)
            self.result.answered += 1
            self._tokens += self._form.tokens(row)
            self.result.failed += layout.failed(row.get(layout.status))
            self._tell()
            if self._max_errors is not None and self.result.failed > self._max_errors:
                self.result.stopped = True
                return

    def end(self) -> BatchResult:
        """Writes the last files of the output, and returns the result."""
        self._output.finish()
        self._tell(last=True)
        return self.result

    def _tell(self, *, last: bool = False) -> None:
        """Updates the result and reports it, if the last report is old enough or this is the last one."""
        now, result = time.perf_counter(), self.result
        if not last and now - self._reported < PROGRESS_SECONDS:
            return
        self._reported = now
        result.rows, result.errors = self._output.rows, self._output.errors
        result.seconds = round(now - self._began, 3)
        if result.answered and result.seconds:
            result.rows_per_minute = round(60 * result.answered / result.seconds, 2)
            result.tokens_per_second = round(self._tokens / result.seconds, 2)
            if result.total is not None:
                result.seconds_left = round(max(0, result.total - result.rows) * result.seconds / result.answered, 1)
        if last:
            result.seconds_left = None if result.stopped else 0.0
        if self._report is not None:
            self._report(result)


def _answering(setting: Setting, workers: int, form: Form, ray: str | None) -> AbstractContextManager[Answers]:
    """The object that answers the rows: an engine in this process, several processes, or Ray actors."""
    if ray is not None:
        from vlpack.bulk.cluster import Cluster

        return Cluster(setting, workers, form, ray)
    if workers > 1:
        return Workers(setting, workers, form)
    return Answerer(setting.package, setting.question, form, setting.options)


def _check_question(question: Question, source: Source) -> None:
    """Raises an OptionError if an option has no effect on the input, or if no row can have a question."""
    if source.name == "openai":
        for name in question.record().keys() - {"max_tokens", "min_pixels", "max_pixels", "special_tokens"}:
            raise OptionError(f"{option(name)} has no effect on requests in OpenAI's batch format.", "Leave it out.")
    if source.name == "files":
        if question.prompt is None and question.template is None:
            raise OptionError(
                "There is no question about the files.", f"Give one with {option('prompt')}, such as 'Read the text.'"
            )
        for name in ("image_column", "id_column"):
            if getattr(question, name) is not None:
                raise OptionError(f"{option(name)} has no effect on a folder of files.", "Leave it out.")


def _identity(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The entry about the package in the manifest of an output; its hash covers all files of the package."""
    return {
        "name": folder.resolve().name,
        "sha256": str(manifest.get("sha256")),
        "precision": manifest.get("precision"),
    }


def _record(source: str, slots: int, context: int | None, threads: int | None, workers: int) -> dict[str, Any]:
    """The entry about a run in the manifest of an output."""
    import onnxruntime

    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "input": source,
        "options": {"slots": slots, "context": context, "threads": threads, "workers": workers},
        "versions": {
            "vlpack": __version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
    }


def as_json(result: Progress) -> dict[str, Any]:
    """A result or progress as JSON-like data."""
    return asdict(result)
