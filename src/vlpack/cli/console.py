"""Terminal and JSON output of the command line: progress, tables, answers and errors.

Progress and notes are printed only if standard error is a terminal.
"""

from __future__ import annotations

import codecs
import itertools
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from rich import box, markup
from rich.console import Console
from rich.table import Table

from vlpack.errors import InputError, OptionError, VlpackError, VlpackWarning, on_command_line

if TYPE_CHECKING:
    from vlpack.builder import BuildResult
    from vlpack.demo import Row
    from vlpack.engine import Handle
    from vlpack.preprocess import Prompt
    from vlpack.runtime.answer import AnswerStream, Stats
    from vlpack.runtime.model import Model
    from vlpack.verification.result import Report


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; the streams of a service may be closed and are then None."""
    return stream is not None and stream.isatty()


out = Console(soft_wrap=True, highlight=False, width=None if is_terminal(sys.stdout) else 200)
err = Console(stderr=True, soft_wrap=True, highlight=False, width=None if is_terminal(sys.stderr) else 200)


_PLAIN = {"✓": "ok", "✗": "no", "→": "->", "·": "|", "×": "x", "…": "...", "–": "-"}


def _plainer(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler that replaces characters which the encoding of a terminal or pipe cannot represent."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error("vlpack.plainer", _plainer)


def printable(text: object) -> str:
    """A text with control characters escaped: names in an untrusted package or checkpoint could control a terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1] for character in str(text)
    )


def without_controls(text: str) -> str:
    """A text without control characters, except newline and tab, so that an answer cannot control the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def escape(text: object) -> str:
    """An untrusted text, escaped so that it can be put into a text with rich markup."""
    return markup.escape(printable(text))


def print_plain(text: str) -> None:
    """Prints a line without interpreting markup in it."""
    out.print(printable(text), markup=False)


def show_error(error: VlpackError) -> None:
    """Prints an error as one sentence, and its hint on a second line."""
    err.print(f"[bold red]error:[/] {escape(on_command_line(error.message))}")
    if error.hint:
        err.print(escape(on_command_line(error.hint)))


def show_warning(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
    """Replacement of `warnings.showwarning` that prints warnings without the place in the code."""
    if issubclass(category, VlpackWarning):
        text = message.args[0] if isinstance(message, Warning) else message
        err.print(f"[bold yellow]warning:[/] {escape(on_command_line(text))}")
    else:
        err.print(escape(f"{category.__name__}: {message}"), style="dim")


def size(count: int) -> str:
    """A number of bytes with a unit, such as 1.2 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def show_build(result: BuildResult, report: Report | None = None, *, as_json: bool) -> None:
    """Prints the summary of a build; as JSON, it includes the verification."""
    if as_json:
        shown = {**asdict(result), "folder": str(result.folder)}
        if report:
            from vlpack.verification.report import as_json as to_json

            shown["verification"] = to_json(report)
        print(json.dumps(shown, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("part", "file", "size", "weights stored as"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for part, (file, count, labels) in result.parts.items():
        stored = ", ".join(f"{label} {size(held)}" if held else label for label, held in labels.items())
        table.add_row(part, file, size(count), stored)
    out.print(table)
    for note in result.notes:
        out.print(f"[yellow]note:[/] {escape(on_command_line(note))}")
    out.print(
        f"{escape(str(result.folder))}: {size(result.total_bytes)} from {size(result.source_bytes)} in "
        f"{result.seconds:.1f} s, peak memory {size(result.peak_memory)}"
    )


def question_from_stdin() -> str:
    """Reads the question from standard input, for calls without a question as argument."""
    if sys.stdin is None or sys.stdin.isatty():
        raise OptionError("What is the question?", 'vlpack run PACKAGE [--image FILE] "question"')
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"The question on standard input is not text: {error}.") from None


def lines_from_stdin() -> list[str]:
    """Reads inputs from standard input, one per line, for calls without inputs as arguments."""
    if sys.stdin is None or sys.stdin.isatty():
        raise OptionError("There is no input.", "Give texts as arguments, or one per line on standard input.")
    try:
        lines = [line for line in sys.stdin.read().split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"Standard input is not text: {error}.") from None
    if not lines:
        raise OptionError("Standard input is empty.", "Give texts as arguments, or one per line.")
    return lines


def show_embeddings(labels: Sequence[str], embeddings: Any, *, as_json: bool) -> None:
    """Prints the embeddings as JSON, or a table of their cosine similarities."""
    if as_json:
        print(json.dumps({"dimensions": embeddings.shape[1], "embeddings": embeddings.tolist()}))
        return
    out.print(f"{len(labels)} embeddings of {embeddings.shape[1]} dimensions; cosine similarity:")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "input", *map(str, range(1, len(labels) + 1))):
        table.add_column(column, justify="left" if column == "input" else "right")
    similarities = embeddings @ embeddings.T
    for number, (label, row) in enumerate(zip(labels, similarities, strict=True), start=1):
        table.add_row(str(number), escape(_short(label)), *(f"{value:.3f}" for value in row))
    out.print(table)


def show_scores(labels: Sequence[str], scores: Sequence[float], *, as_json: bool) -> None:
    """Prints the scores: as JSON in the order of the documents, else the best first."""
    if as_json:
        print(json.dumps({"scores": list(scores)}))
        return
    for score, label in sorted(zip(scores, labels, strict=True), key=lambda pair: -pair[0]):
        out.print(f"{score:.4f}  {escape(_short(label))}")


def _short(label: str, width: int = 60) -> str:
    """The start of a text on one line, at most ``width`` characters."""
    line = " ".join(label.split())
    return line if len(line) <= width else line[: width - 1] + "…"


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows the current step and its seconds on standard error, if it is a terminal, until the block is left."""
    if not err.is_terminal or err.is_dumb_terminal:
        yield
        return
    from vlpack.cli.waiting import waiting as draw

    with draw(" ".join(printable(what).split())):
        yield


def reading(prompt: Prompt) -> str:
    """Names the step before an answer: the images and videos that are encoded, and the tokens that are read."""
    count = f"{prompt.input_ids.size} tokens"
    videos, images = len(prompt.videos), int((~prompt.is_video).sum())
    seen = [f"{n} {name}{'s' * (n > 1)}" for n, name in ((images, "image"), (videos, "video")) if n]
    return f"looking at {' and '.join(seen)}, reading {count}" if seen else f"reading {count}"


def show_answer(stream: AnswerStream | Handle, load_seconds: float, *, stats: bool, as_json: bool) -> None:
    """Prints an answer as it is generated, and its statistics if ``stats`` is set."""
    if as_json:
        with waiting(f"{reading(stream.prompt)}, answering"):
            for _ in stream:
                pass
    else:
        pieces = iter(stream)
        with waiting(reading(stream.prompt)):
            first = next(pieces, "")
        for piece in itertools.chain([first], pieces):
            print(without_controls(piece) if is_terminal(sys.stdout) else piece, end="", flush=True)
    answer = stream.answer
    if as_json:
        took = {**asdict(answer.stats), "load_seconds": load_seconds}
        shown = {"text": answer.text, "finish_reason": answer.finish_reason, "tokens": answer.tokens, "stats": took}
        print(json.dumps(shown, ensure_ascii=False))
        return
    print(flush=True)
    if answer.finish_reason == "length":
        err.print(f"(cut after {len(answer.tokens)} tokens; --max-tokens allows more)", style="dim")
    if stats:
        err.print(f"load {load_seconds:.2f} s · {timing(answer.stats)}{_kernels()}", style="dim")


def _kernels() -> str:
    """The end of the line of statistics: the operators of vlpack-kernels in the sessions of this process, if any."""
    from vlpack.ort.kernels import library, opened  # imports onnx, which takes a while

    if not opened:  # before the library is looked at, which need not belong to this vlpack if nothing used it
        return ""
    found = library()
    if found is None:
        return ""
    return f" · kernels {found.instruction_set}: {', '.join(f'{count} {name}' for name, count in opened.items())}"


def timing(s: Stats) -> str:
    """The statistics of an answer on one line."""
    seen = [f"{s.image_tokens} of images"] if s.image_tokens else []
    if s.video_tokens:
        seen.append(f"{s.video_tokens} of {s.video_frames} video frame{'s' if s.video_frames > 1 else ''}")
    if s.reused_tokens:
        seen.append(f"{s.reused_tokens} known from before")
    images = f" ({', '.join(seen)})" if seen else ""
    stages = {"preprocessing": s.preprocess_seconds, "vision": s.vision_seconds, "prefill": s.prefill_seconds}
    if s.video_seconds:
        stages = {"reading videos": s.video_seconds, **stages}
        if s.preprocess_seconds is not None:
            stages["preprocessing"] = max(s.preprocess_seconds - s.video_seconds, 0)
    times = " + ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items() if seconds)
    if s.prefill_seconds is None:
        times += f" + vision and prefill {s.first_token_seconds - (s.preprocess_seconds or 0):.2f}"
    return (
        f"first token {s.first_token_seconds:.2f} s = {times} · "
        f"{s.prompt_tokens} prompt tokens{images}, {s.new_tokens} new, {s.tokens_per_second:.1f} tokens/s · "
        f"peak memory {size(s.peak_memory)}"
    )


LARGE_IMAGE = 800_000
"""Area in square pixels, about 1024×768, above which two cores take more than six seconds to encode an image."""


def note_large_images(model: Model, images: Prompt) -> None:
    """Prints a note in a terminal if a large image will take long on a CPU, with the option that makes it smaller."""
    processor = model.prompts.image_processor
    if not err.is_terminal or processor is None or model.manifest.get("execution_provider") != "cpu":
        return
    areas = images.grids[~images.is_video].prod(axis=1) * processor.patch_size**2
    if areas.max(initial=0) > 1.1 * LARGE_IMAGE:
        err.print(
            f"An image of {areas.max() / 1e6:.1f} million pixels takes long on a CPU; "
            f"--max-pixels {LARGE_IMAGE} makes it smaller, at the cost of small details.",
            style="dim",
        )


def show_inspection(description: dict[str, Any], *, as_json: bool) -> None:
    """Prints the description of a package or checkpoint that `vlpack.inspect` returns."""
    if as_json:
        print(json.dumps(description, indent=1, default=str))
        return
    out.print(f"[bold]{escape(description['folder'])}[/]: {description['kind']}, {escape(description['architecture'])}")
    if description["kind"] == "checkpoint":
        _show_checkpoint(description)
    else:
        _show_package(description)


def say_progress(text: str) -> None:
    """Prints the current step if standard error is a terminal."""
    if err.is_terminal:
        err.print(text, style="dim")


def show_architectures(rows: list[dict[str, str]], *, as_json: bool) -> None:
    """Prints the supported architectures."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    columns = [column for column in rows[0] if column != "parts"]  # the parts follow from the models
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        # on narrow terminals, names stay on one line and the other columns are wrapped
        table.add_column(column, overflow="fold", no_wrap=column == "architecture")
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    out.print(table)
    out.print("Configs and weights as transformers 4 and 5 write them; rotary scaling default, yarn and llama3.")


def _show_checkpoint(description: dict[str, Any]) -> None:
    for dtype, entry in description["dtypes"].items():
        out.print(f"{entry['tensors']} tensors of {dtype}, {size(entry['bytes'])}")
    for name in ("text", "vision") if description["vision"] else ("text",):
        out.print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in description[name].items()))
    head = "tied" if description["tied"] else "untied"
    out.print(f"task {description['task']}, head {head}, {description['deepstack_levels']} DeepStack levels")
    if "quantized" in description:
        _show_quantized(description["quantized"])
    for note in description["notes"]:
        out.print(f"[yellow]note:[/] {escape(on_command_line(note))}")
    for name, part in description["graphs"].items():
        out.print(f"\n[bold]{escape(name)}[/]")
        _show_ports(part)


def _show_quantized(quantized: dict[str, Any]) -> None:
    """Prints the format of a quantized checkpoint, and what becomes of its matrices, without markup."""
    print_plain(f"quantized: {quantized['format']}")
    for group in quantized.get("groups", []):
        why = f": {group['why']}" if group["why"] else f", {group.get('storage')}"
        print_plain(f"  {group['count']} × {group['modules']} {group['done']}{why}")


def _show_ports(part: dict[str, Any]) -> None:
    """Prints the inputs and outputs of a graph, without markup, because a package is untrusted."""
    for kind in ("inputs", "outputs"):
        for port, (dtype, shape) in part[kind].items():
            print_plain(f"  {kind[:-1]:6} {port} {dtype} [{', '.join(map(str, shape))}]")


def _show_package(description: dict[str, Any]) -> None:
    source = ", ".join(str(value) for name, value in description["source"].items() if value and name != "adapters")
    for adapter in description["source"].get("adapters", []):
        source += f" with the adapter {adapter.get('repo_id') or adapter.get('name')}"
    print_plain(
        f"{description['task']}, {description['precision']} for {description['execution_provider']}, "
        f"activations {description['activations']}, cache {description['cache']}; from {source} by vlpack "
        f"{description['vlpack']}"
    )
    for name, part in description["parts"].items():
        out.print(f"\n[bold]{escape(name)}[/] {escape(part['file'])}")
        _show_ports(part)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("modules", "weights", "stored as", "size"):
            table.add_column(column, justify="right" if column in ("weights", "size") else "left")
        for group in part["groups"]:
            modules, storage = escape(group["modules"]), escape(group["storage"])
            shared = escape(f"shared with {', '.join(group['shared_with'])}") if group["shared_with"] else None
            table.add_row(modules, str(group["count"]), storage, shared or size(group["bytes"]))
        out.print(table)
    rules = "; ".join(f"{_fits(rule)} → {rule['storage']}" for rule in description["policy"])
    print_plain(f"policy, first match wins: {rules}")
    if "imported" in description:
        _show_quantized(description["imported"])
    total = sum(description["files"].values())
    checked = "hashes checked" if description["hashes_checked"] else "sizes checked"
    out.print(f"{len(description['files'])} files, {size(total)}, {checked}")
    kernels = description["kernels"]
    if kernels and kernels["problem"]:
        print_plain(f"kernels cannot be used: {kernels['problem']}")
    elif kernels:
        used = [
            f"{part}: " + ", ".join(f"{count} {name}" for name, count in counts.items())
            for part, counts in kernels["operators"].items()
        ]
        print_plain(f"kernels {kernels['instruction_set']}, in vlpack's own sessions: {'; '.join(used) or 'none'}")
    for problem in description["problems"]:
        out.print(f"[bold red]damaged:[/] {escape(problem)}")


def _fits(rule: dict[str, str]) -> str:
    """The weights to which a rule of the precision policy applies; rules of earlier versions have only module paths."""
    role, modules = rule.get("role", ""), rule["modules"]
    return " ".join([role, *([modules] if modules != "*" or not role else [])]).strip()


@contextmanager
def demo_table(*, as_json: bool) -> Iterator[Callable[[Row], None]]:
    """Yields a function that prints a row of the demo, unless the output is JSON."""

    def report(row: Row) -> None:
        if not as_json:
            mark = "[green]✓[/]" if row.right else "[red]✗[/]"
            answer, truth = (" / ".join(text.split()) for text in (row.answer, row.truth))
            out.print(f"{mark} {row.image}  {row.question:28} answer {escape(answer):14} truth {truth}")

    yield report


def show_demo(result: BuildResult, rows: list[Row], *, as_json: bool) -> None:
    """Prints the summary of the demo."""
    right = sum(row.right for row in rows)
    if as_json:
        print(json.dumps({"right": right, "asked": len(rows), "rows": [asdict(row) for row in rows]}))
        return
    out.print(
        f"\n[bold]{right} of {len(rows)} right.[/] Built in {result.seconds:.1f} s, {size(result.total_bytes)}, "
        f"peak memory of the build {size(result.peak_memory)}."
    )
