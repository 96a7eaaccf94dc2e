"""The command line: verbs to calls, no logic."""

from __future__ import annotations

import io
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import vlpack
from vlpack import cli_options as opt
from vlpack import console
from vlpack.errors import InputError, OptionError, VlpackError

app = typer.Typer(
    name="vlpack",
    help="Qwen vision-language checkpoints to complete packages for the stock ONNX Runtime GenAI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXTRA_OPTIONS = (
    "As the builder's: block_size, is_symmetric, accuracy_level, algo_config, matmul_mixed_precision, exclude_embeds, "
    "prune_lm_head, shared_embeddings, filename, hf_token."
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vlpack {vlpack.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def build(
    source: Annotated[
        str | None, typer.Argument(help="Checkpoint: a folder or a Hub id, such as Qwen/Qwen3-VL-4B-Instruct.")
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(
            "-m", "--model_name", "--model-name", help="Hub id, as the builder of onnxruntime_genai takes it."
        ),
    ] = None,
    input_folder: Annotated[str | None, typer.Option("-i", "--input", help="Checkpoint folder, likewise.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the package.")] = None,
    precision: Annotated[
        str | None,
        typer.Option("-p", "--precision", help="fp32, fp16, int8 or int4. (default: int8 on cpu, else fp16)"),
    ] = None,
    execution_provider: Annotated[
        str, typer.Option("-e", "--execution_provider", "--execution-provider", help="cpu, cuda, dml or webgpu.")
    ] = "cpu",
    part: Annotated[
        str, typer.Option("--part", help="all; text (a decoder that runs by itself); vision; embedding.")
    ] = "all",
    task: Annotated[
        str,
        typer.Option("--task", help="generate, embedding or reranker. (auto: what can be told from the checkpoint)"),
    ] = "auto",
    vision_precision: Annotated[
        str | None,
        typer.Option(
            "--vision-precision",
            help="Of the vision encoder. (default: as --precision; beside int4, int8 on cpu and fp16 elsewhere)",
        ),
    ] = None,
    extra_options: Annotated[
        list[str] | None, typer.Option("--extra_options", "--extra-options", metavar="KEY=VALUE …", help=EXTRA_OPTIONS)
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="LoRA adapter to merge: a folder or a Hub id; give it again for another."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")] = None,
    cache_dir: Annotated[
        Path | None, typer.Option("-c", "--cache_dir", "--cache-dir", help="Where files of the Hub are kept.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a package that is already there.")] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="That encode weights. (default: all cores, at most 8)")
    ] = None,
    verify_it: Annotated[
        bool, typer.Option("--verify", help="Compare with transformers when built, and say so in the package's card.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Build a package from a checkpoint."""
    from vlpack.builder import build as run_build
    from vlpack.options import parse_extra_options

    given = [value for value in (source, model_name, Path(input_folder) if input_folder else None) if value]
    if len(given) != 1:
        raise OptionError(
            "Give one checkpoint." if given else "Which checkpoint?",
            "vlpack build SOURCE -o OUTPUT, or -i FOLDER, or -m HUB_ID.",
        )
    if output is None or output == Path():
        raise OptionError("Where should the package go?", "Give its folder with -o.")
    if verify_it:
        from vlpack.verification.reference import require

        require()  # told before anything is built
    with console.build_progress() as progress:
        result = run_build(
            given[0],
            output,
            precision=precision,
            execution_provider=execution_provider,
            part=part,
            task=task,
            vision_precision=vision_precision,
            extra_options=parse_extra_options(extra_options or []),
            revision=revision,
            cache_dir=cache_dir,
            force=force,
            threads=threads,
            progress=progress,
            lora=lora or (),
        )
    report = None
    if verify_it:
        from vlpack.verification import verify as run_verify
        from vlpack.verification.card import record

        source_name = f"{given[0]}@{revision}" if revision else str(given[0])
        report = run_verify(output, source_name, threads=threads, lora=lora or (), say=console.say_progress)
        record(output, report)
    console.show_build(result, report, as_json=as_json)
    if report and not report.ok:
        raise typer.Exit(1)


@app.command()
def run(
    package: opt.Package,
    question: Annotated[
        str | None, typer.Argument(help="The question; read from standard input where it is left out.")
    ] = None,
    image: opt.Images = None,
    video: opt.Videos = None,
    fps: opt.Fps = None,
    num_frames: opt.NumFrames = None,
    min_frames: opt.MinFrames = None,
    max_frames: opt.MaxFrames = None,
    total_pixels: opt.TotalPixels = None,
    system: opt.System = None,
    max_tokens: opt.MaxTokens = 512,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    seed: opt.Seed = None,
    threads: opt.Threads = None,
    min_pixels: opt.MinPixels = None,
    max_pixels: opt.MaxPixels = None,
    vision_provider: opt.VisionProvider = None,
    allow_private_urls: opt.PrivateUrls = False,
    stats: Annotated[bool, typer.Option("--stats", help="Add a line of timing, on standard error.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Ask a package a question, about images and videos or without."""
    from vlpack.preprocess import VideoOptions
    from vlpack.runtime import Model
    from vlpack.sampling import Sampling

    question = console.question_from_stdin() if question is None else question
    if not question.strip():
        raise OptionError("The question is empty.", 'vlpack run PACKAGE [--image FILE] "question"')
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    seen = [*({"type": "image"} for _ in image or []), *({"type": "video"} for _ in video or [])]
    messages.append({"role": "user", "content": [*seen, {"type": "text", "text": question}] if seen else question})
    looked = {
        "fps": fps,
        "num_frames": num_frames,
        "min_frames": min_frames,
        "max_frames": max_frames,
        "total_pixels": total_pixels,
    }
    opt.check_video_options(looked, video)
    if video and not image and (min_pixels or max_pixels):
        raise OptionError("--min-pixels and --max-pixels are for images.", "For videos there is --total-pixels.")
    video_options = VideoOptions(**looked)  # type: ignore[arg-type]
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    sampling.search_options()  # a wrong value is told before the model is loaded
    model = Model(
        package, threads=threads, min_pixels=min_pixels, max_pixels=max_pixels, vision_provider=vision_provider
    )
    stream = model.stream(
        messages,
        image or [],
        video or [],
        video_options=video_options if video else None,
        max_tokens=max_tokens,
        sampling=sampling,
        allow_private_urls=allow_private_urls,
        timing=stats or as_json,
    )
    console.show_answer(stream, model.load_seconds, stats=stats, as_json=as_json)


@app.command()
def chat(
    package: opt.Package,
    image: opt.Images = None,
    video: opt.Videos = None,
    fps: opt.Fps = None,
    num_frames: opt.NumFrames = None,
    min_frames: opt.MinFrames = None,
    max_frames: opt.MaxFrames = None,
    total_pixels: opt.TotalPixels = None,
    system: opt.System = None,
    messages: Annotated[
        Path | None, typer.Option("--messages", help="JSON of a conversation to go on with, as /save writes it.")
    ] = None,
    max_tokens: opt.MaxTokens = 1024,
    context: Annotated[
        int | None,
        typer.Option("--context", help="Tokens at most. (default: what the model and half of the memory allow)"),
    ] = None,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    seed: opt.Seed = None,
    threads: opt.Threads = None,
    min_pixels: opt.MinPixels = None,
    max_pixels: opt.MaxPixels = None,
    vision_provider: opt.VisionProvider = None,
    allow_private_urls: opt.PrivateUrls = False,
) -> None:
    """Talk with a package in the terminal; /help says how. Lines of a pipe are questions, too."""
    from vlpack.chat_terminal import Terminal
    from vlpack.conversations import read_messages
    from vlpack.preprocess import VideoOptions
    from vlpack.runtime import Model
    from vlpack.sampling import Sampling

    video_options = VideoOptions(fps, num_frames, min_frames, max_frames, total_pixels)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    sampling.search_options()  # a wrong value, or file, is told before the model is loaded
    before = read_messages(messages) if messages else []
    model = Model(
        package, threads=threads, min_pixels=min_pixels, max_pixels=max_pixels, vision_provider=vision_provider
    )
    conversation = model.chat(
        system=system,
        max_tokens=max_tokens,
        sampling=sampling,
        video_options=video_options,
        context=context,
        allow_private_urls=allow_private_urls,
        messages=before,
    )
    Terminal(conversation, image or (), video or ()).run()


Instruction = Annotated[str | None, typer.Option("--instruction", help="What the model is told to compare for.")]
NamedPrompt = Annotated[
    str | None, typer.Option("--prompt", help="Name of one of the model's own prompts instead, such as query.")
]


@app.command()
def embed(
    package: Annotated[Path, typer.Argument(help="Folder of an embedding model's package.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT…", help="One input each; lines of standard input without any.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", help="Image file or URL, an input of its own after the texts.")
    ] = None,
    instruction: Instruction = None,
    prompt: NamedPrompt = None,
    dimensions: Annotated[int | None, typer.Option("--dimensions", help="Keep so many of the first ones.")] = None,
    max_pixels: opt.MaxPixels = None,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Embed texts and images with an embedding model's package, and compare them."""
    from vlpack.encoder import Embedder

    texts = texts or ([] if image else console.lines_from_stdin())
    model = Embedder(package, threads=threads, max_pixels=max_pixels)
    inputs: list[Any] = [*texts, *({"image": source} for source in image or [])]
    embeddings = model.embed(inputs, instruction=instruction, prompt=prompt, dimensions=dimensions)
    console.show_embeddings([*texts, *(image or [])], embeddings, as_json=as_json)


@app.command()
def score(
    package: Annotated[Path, typer.Argument(help="Folder of a reranker's package.")],
    query: Annotated[str, typer.Argument(help="What is looked for.")],
    documents: Annotated[
        list[str] | None,
        typer.Argument(metavar="DOCUMENT…", help="Texts to score; lines of standard input without any."),
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", help="Image file or URL, a document of its own after the texts.")
    ] = None,
    instruction: Instruction = None,
    prompt: NamedPrompt = None,
    max_pixels: opt.MaxPixels = None,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Score documents for a query with a reranker's package: 0 to 1, the best first."""
    from vlpack.encoder import Reranker

    documents = documents or ([] if image else console.lines_from_stdin())
    model = Reranker(package, threads=threads, max_pixels=max_pixels)
    scored: list[Any] = [*documents, *({"image": source} for source in image or [])]
    scores = model.score(query, scored, instruction=instruction, prompt=prompt)
    console.show_scores([*documents, *(image or [])], scores, as_json=as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a package or a checkpoint.")],
    hashes: Annotated[bool, typer.Option("--hashes/--no-hashes", help="Compare the contents of all files.")] = True,
    as_json: opt.Json = False,
) -> None:
    """Show what a package or a checkpoint is made of; exit with 1 where a package is damaged."""
    from vlpack.inspection import inspect as run_inspect

    description = run_inspect(path, hashes=hashes)
    console.show_inspection(description, as_json=as_json)
    if description.get("problems"):
        raise typer.Exit(1)


@app.command()
def verify(
    package: Annotated[Path, typer.Argument(help="Folder of a package.")],
    reference: Annotated[str, typer.Option("--reference", help="Checkpoint it should be: a folder or a Hub id.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Ask this; again for more.")] = None,
    image: Annotated[list[str] | None, typer.Option("--image", help="With these images; again for more.")] = None,
    video: Annotated[list[str] | None, typer.Option("--video", help="With these videos; again for more.")] = None,
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
        list[str] | None, typer.Option("--lora", help="Adapter that was merged; again for another.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write a page to look at: report.html.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Compare a package with its checkpoint in transformers; exit with 1 where it is not the model."""
    from vlpack.verification import verify as run_verify
    from vlpack.verification.cases import from_file, own

    if report is not None and not report.absolute().parent.is_dir():  # told before the work
        raise OptionError(f"There is no folder {report.absolute().parent} for the report.")
    given = (prompt or [], image or [], video or [])
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
    console.show_verification(result, report, as_json=as_json)
    if not result.ok:
        raise typer.Exit(1)


@app.command(name="eval")
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
        bool, typer.Option("--without-deepstack", help="Ask once more with DeepStack's features set to zero.")
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many questions.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of an answer at most.")] = 32,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Score a package on questions about images, with confidence intervals."""
    from vlpack.evaluation import evaluate as run_evaluate

    with console.question_progress() as progress:
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
    console.show_evaluation(result, as_json=as_json)


@app.command()
def bench(
    package: Annotated[Path, typer.Argument(help="Folder of a package.")],
    prompt_tokens: Annotated[
        list[int] | None, typer.Option("--prompt-tokens", min=1, help="Length of a text prompt; again for another.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", help="Size of an image, such as 640x480; again for another.")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Of each answer.")] = 32,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Answers to each prompt.")] = 3,
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
    with console.question_progress() as progress:
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
        console.show_benchmark(result, None, output, as_json=as_json)
        raise
    console.show_benchmark(result, changes, output, as_json=as_json)


@app.command()
def architectures(as_json: opt.Json = False) -> None:
    """List the architectures that are supported and what each needs."""
    from vlpack.architectures import described

    console.show_architectures(described(), as_json=as_json)


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Keep the package in this folder.")] = None,
    precision: Annotated[str, typer.Option("-p", "--precision", help="fp32, fp16, int8 or int4.")] = "int8",
    as_json: opt.Json = False,
) -> None:
    """Build the small checkpoint that ships with vlpack and ask it about the images that ship with it."""
    from vlpack.demo import demo as run_demo

    with tempfile.TemporaryDirectory(prefix="vlpack-demo-") as folder, console.demo_table(as_json=as_json) as report:
        result, rows = run_demo(output or Path(folder) / "digits", precision=precision, report=report)
    console.show_demo(result, rows, as_json=as_json)
    if not rows or sum(row.right for row in rows) < 0.8 * len(rows):
        raise typer.Exit(1)


def spread_extra_options(arguments: list[str]) -> list[str]:
    """``--extra_options A=1 B=2``, as the builder writes it, as one option each."""
    spread: list[str] = []
    key = ""
    for position, argument in enumerate(arguments):
        if argument in ("--extra_options", "--extra-options"):
            key = argument
            continue
        if key and not argument.startswith("-") and ("=" in argument or arguments[position - 1] == key):
            spread += [key, argument]
            continue
        if key and arguments[position - 1] == key:
            spread.append(key)
        key = ""
        spread.append(argument)
    if arguments and arguments[-1] == key:
        spread.append(key)  # without a value, which typer tells
    return spread


class _Interrupted(BaseException):
    """Control-C or SIGTERM; its own class, as typer ends the process at a KeyboardInterrupt without a word."""


def _interrupt(number: int, frame: object) -> None:
    raise _Interrupted(number)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a user's mistake is one sentence on standard error and exit code 2."""
    for number in (signal.SIGINT, signal.SIGTERM):  # so that a terminated build cleans up
        signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="vlpack.plainer")
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = console.show_warning
    try:
        if "" in arguments:  # typer would say something about "extra arguments ()"
            raise OptionError(f"Argument {arguments.index('') + 1} is empty.", "Is a variable of your shell not set?")
        app(args=spread_extra_options(arguments), prog_name="vlpack")
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # typer's and rich's 1 would say of a package: damaged
            sys.exit(128 + 13)  # the reader has left, which ends other programs with SIGPIPE
        raise
    except OSError as error:  # of the streams: what concerns files is a VlpackError by now
        console.show_error(VlpackError(f"Cannot write the output: {error.strerror or error}."))
        sys.stdout = None  # or Python would try once more as it ends
        sys.exit(2)
    except VlpackError as error:
        console.show_error(error)
        sys.exit(2)
    except _Interrupted as interrupt:
        console.show_error(VlpackError("Interrupted."))
        sys.exit(128 + interrupt.args[0])


if __name__ == "__main__":
    main()
