"""The commands that test and measure a package: verify, eval, bench."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vlpack.cli import console, console_measure
from vlpack.cli import options as opt
from vlpack.errors import InputError, OptionError


def verify(
    package: Annotated[Path, typer.Argument(help="Folder of a package.")],
    reference: Annotated[
        str, typer.Option("--reference", help="Checkpoint that the package was built from: a folder or a Hub id.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="Question to ask; repeat the option for more."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            metavar="IMAGE",
            help="Image for the questions: a file, URL, folder of images or pattern; repeat the option for more.",
        ),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option("--video", metavar="VIDEO", help="Video for the questions; repeat the option for more."),
    ] = None,
    cases: Annotated[
        Path | None,
        typer.Option("--cases", help='JSONL file of cases, one per line: {"prompt": "…", "images": ["a.png"]}.'),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, max=4096, help="Number of tokens of each greedy answer.")
    ] = 32,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Keep only one module of the reference in memory at a time. (default: if it is large for this "
            "machine)",
        ),
    ] = None,
    threads: opt.Threads = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="FOLDER|HUB_ID",
            help="LoRA adapter that was merged into the package; repeat the option for more.",
        ),
    ] = None,
    mmproj: opt.Mmproj = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write an HTML report to this file, such as report.html.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Compare a package with its checkpoint in transformers; exit with 1 if it does not reproduce the model."""
    from vlpack.cli.image_arguments import image_files
    from vlpack.verification import verify as run_verify
    from vlpack.verification.cases import read_cases, user_cases

    if report is not None and not report.absolute().parent.is_dir():  # report it before the work
        raise OptionError(
            f"There is no folder {report.absolute().parent} for the report.", "Make it, or give another path."
        )
    images = [file for name in image or [] for file in image_files(name)]
    given = (prompt or [], images, video or [])
    if cases is not None and any(given):
        raise OptionError("--cases has its own prompts and images.", "Leave out --prompt, --image and --video.")
    asked = read_cases(cases) if cases else user_cases(*given) if any(given) else None
    result = run_verify(
        package,
        reference,
        cases=asked,
        tokens=tokens,
        streamed=stream,
        threads=threads,
        lora=lora or (),
        progress=console.say_progress,
        mmproj=mmproj,
    )
    console_measure.show_verification(result, report, as_json=as_json)
    if not result.ok:
        raise typer.Exit(1)


def evaluate(
    package: Annotated[Path, typer.Argument(help="Folder of a package.")],
    data: Annotated[
        Path,
        typer.Argument(
            help='JSONL file, one question per line: {"image": "a.png", "question": "…", "answer": "…", '
            '"choices": […]}.'
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="exact, choice or anls. (default: choice if the questions have choices)"),
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Ask this checkpoint in transformers too: a folder or a Hub id.")
    ] = None,
    without_deepstack: Annotated[
        bool, typer.Option("--without-deepstack", help="Also ask with DeepStack's features set to zero.")
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Ask only this many questions.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Maximum number of tokens of an answer.")] = 32,
    wrong: Annotated[int, typer.Option("--wrong", min=0, help="Maximum number of wrong answers to show.")] = 10,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Score a package on questions about images, with confidence intervals."""
    from vlpack.evaluation.questions import evaluate as run_evaluate

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
        typer.Option(
            "--prompt-tokens",
            metavar="COUNT",
            min=1,
            help="Length of a text prompt in tokens; repeat the option for more.",
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image", metavar="WIDTHxHEIGHT", help="Size of an image, such as 640x480; repeat the option for more."
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Number of tokens of each answer.")] = 32,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Number of answers to each kind of prompt; no prompt is repeated.")
    ] = 3,
    threads: opt.Threads = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the result to this JSON file.")] = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", help="Show the changes from an earlier result in this JSON file.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Measure loading, the time to the first token, the time per token after it, and memory."""
    from vlpack.evaluation import benchmark

    if compare is not None:  # report what is wrong with either file before the work
        if not compare.is_file():
            raise InputError(f"There is no file {compare} to compare with.")
        benchmark.earlier(compare)
    if output is not None and (output.is_dir() or not os.access(output.absolute().parent, os.W_OK)):
        raise OptionError(f"{output} cannot be written.", "Give the name of a file in an existing folder.")
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
    except InputError:  # show the result all the same: measuring took minutes
        console_measure.show_benchmark(result, None, output, as_json=as_json)
        raise
    console_measure.show_benchmark(result, changes, output, as_json=as_json)
