"""Verbs that judge a package: verify, eval, bench."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vlpack import cli_options as opt
from vlpack import console, console_measure
from vlpack.errors import InputError, OptionError


def verify(
    package: Annotated[Path, typer.Argument(help="Folder of a package.")],
    reference: Annotated[str, typer.Option("--reference", help="Checkpoint it should be: a folder or a Hub id.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Ask this; again for more.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", metavar="IMAGE", help="With these images; again for more.")
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option("--video", metavar="VIDEO", help="With these videos; again for more.")
    ] = None,
    cases: Annotated[
        Path | None, typer.Option("--cases", help='JSONL file: {"prompt": "…", "images": ["a.png"]} a line.')
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=4096, help="Of each greedy answer.")] = 32,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Keep one module of the reference in memory at a time. (default: where it is large for this machine)",
        ),
    ] = None,
    threads: opt.Threads = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="FOLDER|HUB_ID", help="Adapter that was merged; again for another."),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write a page to look at: report.html.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Compare a package with its checkpoint in transformers; exit with 1 where it is not the model."""
    from vlpack.image_arguments import image_files
    from vlpack.verification import verify as run_verify
    from vlpack.verification.cases import from_file, own

    if report is not None and not report.absolute().parent.is_dir():  # told before the work
        raise OptionError(f"There is no folder {report.absolute().parent} for the report.")
    images = [file for name in image or [] for file in image_files(name)]
    given = (prompt or [], images, video or [])
    if cases is not None and any(given):
        raise OptionError("--cases has its own prompts and images.", "Leave --prompt, --image and --video away.")
    asked = from_file(cases) if cases else own(*given) if any(given) else None
    result = run_verify(
        package,
        reference,
        cases=asked,
        tokens=tokens,
        streamed=stream,
        threads=threads,
        lora=lora or (),
        say=console.say_progress,
    )
    console_measure.show_verification(result, report, as_json=as_json)
    if not result.ok:
        raise typer.Exit(1)


def evaluate(
    package: Annotated[Path, typer.Argument(help="Folder of a package.")],
    data: Annotated[
        Path, typer.Argument(help='JSONL: {"image": "a.png", "question": "…", "answer": "…", "choices": […]} a line.')
    ],
    metric: Annotated[
        str | None, typer.Option("--metric", help="exact, choice or anls. (default: choice where there are choices)")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Ask this checkpoint in transformers too: a folder or a Hub id.")
    ] = None,
    without_deepstack: Annotated[
        bool,
        typer.Option("--without-deepstack", help="Ask once more with DeepStack's features set to zero."),
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many questions.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of an answer at most.")] = 32,
    wrong: Annotated[
        int, typer.Option("--wrong", min=0, help="Show so many of the questions that were not answered right.")
    ] = 10,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Score a package on questions about images, with confidence intervals."""
    from vlpack.evaluation import evaluate as run_evaluate

    with console_measure.question_progress() as progress:
        result = run_evaluate(
            package,
            data,
            metric=metric,
            reference=reference,
            without_deepstack=without_deepstack,
            limit=limit,
            max_tokens=max_tokens,
            threads=threads,
            progress=progress,
        )
    console_measure.show_evaluation(result, wrong, as_json=as_json)


def bench(
    package: Annotated[Path, typer.Argument(help="Folder of a package.")],
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option("--prompt-tokens", metavar="COUNT", min=1, help="Length of a text prompt; again for another."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="WIDTHxHEIGHT", help="Size of an image, such as 640x480; again for another."),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Of each answer.")] = 32,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Answers to prompts of each kind, never the same twice.")
    ] = 3,
    threads: opt.Threads = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the result to this JSON file.")] = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", help="Tell how an earlier result's figures changed.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Measure loading, the time to the first token, the tokens after it, and memory."""
    from vlpack import benchmark

    if compare is not None:  # what is wrong with either file is told before the work
        if not compare.is_file():
            raise InputError(f"There is no file {compare} to compare with.")
        benchmark.earlier(compare)
    if output is not None and (output.is_dir() or not os.access(output.absolute().parent, os.W_OK)):
        raise OptionError(f"{output} cannot be written.", "Give the name of a file in a folder that is there.")
    with console_measure.question_progress() as progress:
        result = benchmark.bench(
            package,
            prompt_tokens=prompt_tokens,
            images=image,
            new_tokens=new_tokens,
            repeat=repeat,
            threads=threads,
            progress=progress,
        )
    try:
        changes = benchmark.compare(result, compare) if compare else None
    except InputError:  # the minutes of measuring are not lost
        console_measure.show_benchmark(result, None, output, as_json=as_json)
        raise
    console_measure.show_benchmark(result, changes, output, as_json=as_json)
