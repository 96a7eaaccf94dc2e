"""The commands that use a package: run, chat, embed, score."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vlpack.cli import console
from vlpack.cli import options as opt
from vlpack.cli.by_name import is_by_name, package_folder
from vlpack.errors import OptionError
from vlpack.tasks import EMBEDDING, RERANKER


def run(
    package: opt.Package,
    question: Annotated[
        str | None, typer.Argument(help="The question; read from standard input if it is left out.")
    ] = None,
    precision: opt.Precision = None,
    update: opt.Update = False,
    yes: opt.Yes = False,
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
    schema: opt.Schema = None,
    regex: opt.Regex = None,
    choice: opt.Choices = None,
    threads: opt.Threads = None,
    min_pixels: opt.MinPixels = None,
    max_pixels: opt.MaxPixels = None,
    vision_provider: opt.VisionProvider = None,
    allow_private_urls: opt.PrivateUrls = False,
    literal: opt.Literal = False,
    draw: Annotated[
        Path | None,
        typer.Option("--draw", metavar="FILE", help="Write the last image with the boxes and points of the answer."),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print a line of statistics on standard error.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Ask a package a question, with or without images and videos."""
    folder = None if is_by_name(package) else package_folder(package, precision, update=update)
    from vlpack.cli.image_arguments import check_drawing, check_question, draw_answer, named_images
    from vlpack.preprocess import VideoOptions
    from vlpack.runtime.model import Model
    from vlpack.runtime.sampling import Sampling

    images = [source for _, source in named_images(image, question)]
    question = console.question_from_stdin() if question is None else question
    check_question(question, image)
    if draw is not None:
        check_drawing(draw, images)
    if not question.strip():
        raise OptionError("The question is empty.", 'vlpack run PACKAGE [--image FILE] "question"')
    if folder is None:  # after the checks, because it may be downloaded and built
        folder = package_folder(package, precision, update=update, yes=yes)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    seen = [*({"type": "image"} for _ in images), *({"type": "video"} for _ in video or [])]
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
    sampling.search_options()  # report a wrong value before the model is loaded
    asked = {
        "messages": messages,
        "images": images,
        "videos": video or [],
        "video_options": video_options if video else None,
        "max_tokens": max_tokens,
        "sampling": sampling,
        "allow_private_urls": allow_private_urls,
        "special_tokens": opt.special_tokens(literal),
    }
    pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    if schema is not None or regex is not None or choice:
        if vision_provider is not None:
            raise OptionError("--vision-provider has no effect on answers with --schema, --regex or --choice.")
        rules = {"schema": opt.json_schema(schema) if schema is not None else None, "regex": regex, "choices": choice}
        text = _run_constrained(
            folder, {"threads": threads, **pixels}, {**asked, **rules}, stats=stats, as_json=as_json
        )
        if draw is not None:
            draw_answer(text, images[-1], draw, allow_private_urls)
        return
    with console.waiting(f"loading {package}"):
        model = Model(
            folder, threads=threads, min_pixels=min_pixels, max_pixels=max_pixels, vision_provider=vision_provider
        )
    with console.waiting("preparing the question"):
        stream = model.stream(**asked, timing=stats or as_json)  # type: ignore[arg-type]
    if max_pixels is None:
        console.note_large_images(model, stream.prompt)
    console.show_answer(stream, model.load_seconds, stats=stats, as_json=as_json)
    if draw is not None:
        draw_answer(stream.answer.text, images[-1], draw, allow_private_urls)


def _run_constrained(
    folder: Path, options: dict[str, Any], asked: dict[str, Any], *, stats: bool, as_json: bool
) -> str:
    """Answers with constrained decoding by the engine, and returns the answer's text.

    JSON is generated without white space between values.
    """
    from vlpack.engine import Engine
    from vlpack.engine.constraints import grammar_of

    grammar_of(
        schema=asked["schema"], regex=asked["regex"], choices=asked["choices"]
    )  # errors are reported before the model is loaded
    started = time.perf_counter()
    with console.waiting(f"loading {folder}"):
        engine = Engine(folder, slots=1, **options)
    with engine:
        seconds = time.perf_counter() - started
        handle = engine.submit(**asked)
        console.show_answer(handle, seconds, stats=stats, as_json=as_json)
        return handle.answer.text


def chat(
    package: opt.Package,
    precision: opt.Precision = None,
    update: opt.Update = False,
    yes: opt.Yes = False,
    image: opt.Images = None,
    video: opt.Videos = None,
    fps: opt.Fps = None,
    num_frames: opt.NumFrames = None,
    min_frames: opt.MinFrames = None,
    max_frames: opt.MaxFrames = None,
    total_pixels: opt.TotalPixels = None,
    system: opt.System = None,
    messages: Annotated[
        Path | None, typer.Option("--messages", help="JSON file of a conversation to continue, as /save writes it.")
    ] = None,
    max_tokens: opt.MaxTokens = 1024,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            help="Maximum tokens of the conversation. (default: what the model and half of the memory allow)",
        ),
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
    literal: opt.Literal = False,
) -> None:
    """Chat with a package in the terminal; /help lists the commands. Lines of a pipe are questions too."""
    folder = package_folder(package, precision, update=update, yes=yes)
    from vlpack.cli.chat_terminal import Terminal
    from vlpack.cli.conversations import read_messages
    from vlpack.cli.image_arguments import STANDARD_INPUT, named_images
    from vlpack.preprocess import VideoOptions
    from vlpack.runtime.model import Model
    from vlpack.runtime.sampling import Sampling

    if image and STANDARD_INPUT in image:
        raise OptionError(
            "chat reads questions from standard input, so it cannot read an image there.", "Give a file: --image a.png"
        )
    images = [name for name, _ in named_images(image)]
    video_options = VideoOptions(fps, num_frames, min_frames, max_frames, total_pixels)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    sampling.search_options()  # report a wrong value or file before the model is loaded
    before = read_messages(messages) if messages else []
    with console.waiting(f"loading {package}"):
        model = Model(
            folder,
            threads=threads,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            vision_provider=vision_provider,
            lazy=True,
        )
        conversation = model.chat(
            system=system,
            max_tokens=max_tokens,
            sampling=sampling,
            video_options=video_options,
            context=context,
            allow_private_urls=allow_private_urls,
            messages=before,
            special_tokens=opt.special_tokens(literal),
        )
    Terminal(conversation, images, video or ()).run()


Instruction = Annotated[str | None, typer.Option("--instruction", help="Task for which the inputs are compared.")]
NamedPrompt = Annotated[
    str | None, typer.Option("--prompt", help="Name of one of the model's own prompts instead, such as query.")
]


def embed(
    package: Annotated[
        str, typer.Argument(help="Folder of an embedding model's package, or Hub id of an embedding model.")
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT…", help="Texts to embed; without any, the lines of standard input."),
    ] = None,
    precision: opt.Precision = None,
    update: opt.Update = False,
    yes: opt.Yes = False,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="IMAGE", help=f"A separate input after the texts. {opt.IMAGES}"),
    ] = None,
    instruction: Instruction = None,
    prompt: NamedPrompt = None,
    dimensions: Annotated[
        int | None, typer.Option("--dimensions", help="Number of values to keep of each embedding.")
    ] = None,
    max_pixels: opt.MaxPixels = None,
    literal: opt.Literal = False,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Embed texts and images with an embedding model's package, and compare them."""
    folder = package_folder(package, precision, task=EMBEDDING, update=update, yes=yes)
    from vlpack.cli.image_arguments import check_question, named_images
    from vlpack.runtime.retrieval import Embedder

    for text in texts or []:
        check_question(text, image)
    images = named_images(image)
    texts = texts or ([] if images else console.lines_from_stdin())
    with console.waiting(f"loading {package}"):
        model = Embedder(folder, threads=threads, max_pixels=max_pixels)
    inputs: list[Any] = [*texts, *({"image": source} for _, source in images)]
    special_tokens = opt.special_tokens(literal)
    with console.waiting(f"embedding {len(inputs)} input{'s' * (len(inputs) != 1)}"):
        embeddings = model.embed(
            inputs, instruction=instruction, prompt=prompt, dimensions=dimensions, special_tokens=special_tokens
        )
    console.show_embeddings([*texts, *(name for name, _ in images)], embeddings, as_json=as_json)


def score(
    package: Annotated[str, typer.Argument(help="Folder of a reranker's package, or Hub id of a reranker.")],
    query: Annotated[str, typer.Argument(help="Query for which the documents are scored.")],
    documents: Annotated[
        list[str] | None,
        typer.Argument(metavar="DOCUMENT…", help="Texts to score; without any, the lines of standard input."),
    ] = None,
    precision: opt.Precision = None,
    update: opt.Update = False,
    yes: opt.Yes = False,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="IMAGE", help=f"A separate document after the texts. {opt.IMAGES}"),
    ] = None,
    instruction: Instruction = None,
    prompt: NamedPrompt = None,
    max_pixels: opt.MaxPixels = None,
    literal: opt.Literal = False,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Score documents for a query with a reranker's package: 0 to 1, the best first."""
    folder = package_folder(package, precision, task=RERANKER, update=update, yes=yes)
    from vlpack.cli.image_arguments import check_question, named_images
    from vlpack.runtime.retrieval import Reranker

    for document in documents or []:
        check_question(document, image)
    images = named_images(image)
    documents = documents or ([] if images else console.lines_from_stdin())
    with console.waiting(f"loading {package}"):
        model = Reranker(folder, threads=threads, max_pixels=max_pixels)
    scored: list[Any] = [*documents, *({"image": source} for _, source in images)]
    special_tokens = opt.special_tokens(literal)
    with console.waiting(f"scoring {len(scored)} document{'s' * (len(scored) != 1)}"):
        scores = model.score(query, scored, instruction=instruction, prompt=prompt, special_tokens=special_tokens)
    console.show_scores([*documents, *(name for name, _ in images)], scores, as_json=as_json)
