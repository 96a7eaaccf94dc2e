"""The command ``vlpack batch``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlpack.cli import console
from vlpack.cli import options as opt
from vlpack.cli.by_name import is_by_name, package_folder
from vlpack.errors import on_command_line

if TYPE_CHECKING:
    from vlpack.bulk import BatchResult, Progress

JSON_SECONDS = 5.0
"""Shortest time in seconds between two lines of progress with ``--json``."""


def batch(
    package: opt.Package,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="Folder or pattern of images, videos and PDFs, file of rows (.jsonl, .parquet) or of OpenAI's batch "
            "format, or folder of a Hugging Face data set; with --ray also a URI.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o", "--output", help="Folder for the answers; an unfinished one is continued. With --ray also a URI."
        ),
    ],
    precision: opt.Precision = None,
    update: opt.Update = False,
    yes: opt.Yes = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Question about every row that has none of its own.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="Question with columns in braces: 'Describe {title}.'; {{ and }} are braces."),
    ] = None,
    system: opt.System = None,
    schema: opt.Schema = None,
    regex: opt.Regex = None,
    choice: opt.Choices = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Maximum number of tokens of an answer. (default: 512)")
    ] = None,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    seed: opt.Seed = None,
    image_column: Annotated[
        str | None,
        typer.Option("--image-column", help="Column with the image of a row. (default: image or images)"),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option("--id-column", help="Column with the id of a row. (default: id, or else a hash of the row)"),
    ] = None,
    files: Annotated[
        str | None,
        typer.Option("--files", help="Folder with the files that rows name. (default: the folder of the input)"),
    ] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Download images that rows give as URLs.")] = False,
    allow_private_urls: opt.PrivateUrls = False,
    fps: opt.Fps = None,
    num_frames: opt.NumFrames = None,
    min_frames: opt.MinFrames = None,
    max_frames: opt.MaxFrames = None,
    total_pixels: opt.TotalPixels = None,
    min_pixels: opt.MinPixels = None,
    max_pixels: opt.MaxPixels = None,
    literal: opt.Literal = False,
    file_format: Annotated[str, typer.Option("--format", help="Format of the output: jsonl or parquet.")] = "jsonl",
    shard_rows: Annotated[
        int | None,
        typer.Option("--shard-rows", help="Number of rows of each file of the output. (default: 1000, with --ray 128)"),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Answer only the first rows of the input.")] = None,
    max_errors: Annotated[
        int | None, typer.Option("--max-errors", help="Stop when more rows than this have failed. (default: never)")
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Answer rows again that failed in an earlier run.")
    ] = False,
    slots: Annotated[int, typer.Option("--slots", help="Number of rows that each process answers at a time.")] = 8,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            help="Tokens of prompt and answer together. (default: what the model and half of the memory allow)",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Number of threads of all processes together. (default: all cores)"),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", help="Number of processes, for machines with several processors.")
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Read, answer and write on a Ray cluster: its address, auto or local.",
        ),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Ask about every row of a data set, such as a folder of images; an interrupted run goes on where it was."""
    folder: str | Path | None = package if "://" in package else None
    if folder is None and not is_by_name(package):
        folder = package_folder(package, precision, update=update)
    from vlpack.bulk import batch as run_batch
    from vlpack.bulk.question import Question
    from vlpack.preprocess import VideoOptions
    from vlpack.runtime.sampling import Sampling

    rules = {"schema": None if schema is None else opt.json_schema(schema), "regex": regex, "choices": choice}
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    if folder is None:  # options are checked first, because the package may have to be downloaded and built
        Question(prompt=prompt, template=template, sampling=sampling)
        folder = package_folder(package, precision, update=update, yes=yes)
    try:
        with _shown(as_json=as_json) as progress:
            result = run_batch(
                folder,
                source,
                output,
                prompt=prompt,
                template=template,
                system=system,
                **rules,  # type: ignore[arg-type]
                max_tokens=max_tokens,
                sampling=sampling,
                special_tokens=opt.special_tokens(literal),
                image_column=image_column,
                id_column=id_column,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                video_options=VideoOptions(fps, num_frames, min_frames, max_frames, total_pixels),
                files=files,
                allow_urls=allow_urls,
                allow_private_urls=allow_private_urls,
                format=file_format,
                shard_rows=shard_rows,
                limit=limit,
                max_errors=max_errors,
                retry_errors=retry_errors,
                slots=slots,
                context=context,
                threads=threads,
                workers=workers,
                ray=ray,
                progress=progress,
                words=on_command_line,
            )
    except BaseException as error:
        if not isinstance(error, Exception) and console.err.is_terminal:
            console.err.print("Finished rows are kept: the same command goes on from here.", style="dim")
        raise
    _show(result, as_json=as_json)
    if result.failed or result.errors:
        raise typer.Exit(1)


@contextmanager
def _shown(*, as_json: bool) -> Iterator[Callable[[Progress], None]]:
    """Yields a function that shows the progress on standard error: one line on a terminal, or lines of JSON."""
    terminal = console.err.is_terminal and not console.err.is_dumb_terminal
    shown = 0.0

    def show(progress: Progress) -> None:
        nonlocal shown
        if as_json:
            if time.monotonic() - shown >= JSON_SECONDS:
                shown = time.monotonic()
                print(json.dumps(_facts(progress)), file=sys.stderr, flush=True)
        elif terminal:
            width = max(console.err.width - 1, 1)
            sys.stderr.write(f"\r{line(progress)[:width].ljust(width)}")
            sys.stderr.flush()

    try:
        yield show
    finally:
        if terminal and not as_json:
            sys.stderr.write("\r" + " " * max(console.err.width - 1, 1) + "\r")
            sys.stderr.flush()


def line(progress: Progress) -> str:
    """The progress on one line."""
    of = "" if progress.total is None else f" of {progress.total}"
    parts = [
        f"{progress.rows}{of} rows",
        f"{progress.rows_per_minute:.1f} a minute",
        f"{progress.tokens_per_second:.1f} tokens/s",
    ]
    if progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    if progress.errors:
        parts.append(f"{progress.errors} error{'s' * (progress.errors != 1)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """A duration in hours, minutes and seconds, such as 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _facts(progress: Progress) -> dict[str, object]:
    """The fields of the progress, without those that only a result has."""
    from vlpack.bulk.progress import Progress as Fields

    return {name: getattr(progress, name) for name in Fields.__dataclass_fields__}


def _show(result: BatchResult, *, as_json: bool) -> None:
    """Prints the summary of a run."""
    from vlpack.bulk.progress import as_json as to_json

    if as_json:
        print(json.dumps(to_json(result)))
        return
    before = f" ({result.before} of them before)" if result.before else ""
    speed = f"; {result.rows_per_minute:.1f} rows a minute, {result.tokens_per_second:.1f} tokens/s"
    console.print_plain(f"{result.rows} rows{before} in {result.output}{speed if result.answered else ''}.")
    if result.errors:
        plural = "s" * (result.errors != 1)
        console.print_plain(
            f"{result.errors} row{plural} failed: the column error says why. --retry-errors tries again."
        )
    if result.stopped:
        console.print_plain("Stopped: more rows failed than --max-errors allows. The same command goes on from here.")
