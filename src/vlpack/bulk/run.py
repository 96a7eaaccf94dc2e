"""`vlpack.batch`: answers a question about every row of a data set, exactly once even if runs are interrupted."""

from __future__ import annotations

import os
import platform
import posixpath
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vlpack.bulk.answering import EngineOptions
from vlpack.bulk.assignment import Assignment
from vlpack.bulk.form import Words, form_of
from vlpack.bulk.here import answer_here
from vlpack.bulk.media import Place
from vlpack.bulk.node_package import manifest_at
from vlpack.bulk.progress import BatchResult, Progress
from vlpack.bulk.question import Question
from vlpack.bulk.source import Source, open_source
from vlpack.bulk.storage import is_uri, without_secrets
from vlpack.bulk.workers import Setting
from vlpack.errors import OptionError, in_python, option
from vlpack.preprocess import VideoOptions
from vlpack.preprocess.literal import CONTROL
from vlpack.runtime.sampling import Sampling, check_number
from vlpack.tasks import GENERATE, manifest_task
from vlpack.version import __version__


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
    shard_rows: int | None = None,
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
        package: folder of a package that generates text, built for the CPU; with ``ray``, also its URI.
        source: folder or pattern of images, videos and PDFs, file of JSON lines, file in OpenAI's batch format, Parquet
            file, or folder of a Hugging Face data set; with ``ray``, also the URI of a file or folder for pyarrow, such
            as ``s3://bucket/folder``.
        output: folder for the answers; a new one, or that of an interrupted run; with ``ray``, also its URI.
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
        shard_rows: number of rows of each file of the output; None for 1000, or for 128 with Ray.
        limit: number of rows from the beginning of the input that are answered; None for all.
        max_errors: number of rows that may fail in this run before it stops; None for any number.
        retry_errors: whether rows that failed in an earlier run are answered again.
        slots: number of rows that each process answers at a time.
        context: number of tokens of prompt and answer together; None for what the model and memory allow.
        threads: number of threads of all processes together; None for all cores.
        workers: number of processes that answer rows.
        ray: address of a Ray cluster, ``auto`` or ``local``, on which Ray Data reads, answers and writes the rows; None
            for this machine without Ray. Folders of inputs and outputs must be at the same paths on all machines.
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
    there, given, target = os.path.expanduser(package), os.fspath(source), os.path.expanduser(output)
    inside = None if files is None else os.path.expanduser(files)
    if ray is None:
        for text in (there, given, target, inside or ""):
            if is_uri(text) and not text.startswith("http"):  # refused with a better message
                raise OptionError(
                    f"{without_secrets(text)} is a URI, which only Ray reads and writes.",
                    f"Give {option('ray', 'local')}.",
                )
    manifest = manifest_at(there)
    task = manifest_task(Path(there), manifest)
    if task != GENERATE:
        raise OptionError(f"{without_secrets(there)} is for the task {task} and generates no text.")
    question.check_constraint()
    found = open_source(given, inside, target)
    _check_question(question, found)
    for name, useless, kind in (("files", bool(files), "openai"), ("allow_urls", allow_urls, "files")):
        if useless and found.name == kind:
            what = "a folder of files" if kind == "files" else "requests in OpenAI's batch format"
            raise OptionError(f"{option(name)} has no effect on {what}.", "Leave it out.")
    folder = found.folder if is_uri(found.folder) else os.path.realpath(found.folder)
    place = Place(folder, allow_urls, allow_private_urls)
    there = there.rstrip("/") if is_uri(there) else str(Path(there).resolve())
    name = posixpath.basename(there.partition("?")[0]) if is_uri(there) else Path(there).name
    if found.name == "openai" and format != "jsonl":
        raise OptionError(f"{option('format')} is {format!r}, but answers in OpenAI's batch format are JSON lines.")
    assignment = Assignment(
        found,
        target,
        Setting(there, found.name, name, question, place, words, EngineOptions(slots, context, threads)),
        form_of(found.name, question, place, words, name),
        {"package": _identity(name, manifest), "question": question.record()},
        _record(without_secrets(given), slots, context, threads, workers),
        format,
        shard_rows,
        retry_errors,
        limit,
        max_errors,
        workers,
        progress,
    )
    if ray is None:
        return answer_here(assignment)
    from vlpack.bulk.on_ray import answer_on_ray

    return answer_on_ray(assignment, ray)


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


def _identity(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The entry about the package in the manifest of an output; its hash covers all files of the package."""
    return {
        "name": name,
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
