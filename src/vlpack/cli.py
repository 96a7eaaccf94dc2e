"""The command line: verbs to calls, no logic."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import typer

import vlpack
from vlpack import cli_options as opt
from vlpack import console, console_measure
from vlpack.cli_commands import AskingCommand, Command, Group
from vlpack.cli_measure import bench, evaluate, verify
from vlpack.cli_use import chat, embed, run, score
from vlpack.errors import OptionError, VlpackError

app = typer.Typer(
    name="vlpack",
    cls=Group,
    help="Qwen vision-language checkpoints to complete packages for the stock ONNX Runtime GenAI.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXTRA_OPTIONS = (
    "As the builder's: block_size, is_symmetric, accuracy_level, algo_config, matmul_mixed_precision, exclude_embeds, "
    "prune_lm_head, shared_embeddings, filename, hf_token. vlpack's own: balance, rotation, weight_type, kv_cache."
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


@app.command(cls=Command)
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
        typer.Option(
            "--lora",
            metavar="FOLDER|HUB_ID",
            help="LoRA adapter to merge: a folder or a Hub id; give it again for another.",
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="self|FILE",
            help="Fit int4 or int8 weights to what they multiply in texts: self for the model's own, or a file of "
            'plain text or conversations (*.jsonl, {"messages": […]} a line). Takes minutes.',
        ),
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
        bool,
        typer.Option("--verify", help="Compare with transformers when built, and say so in the package's card."),
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
            calibrate=calibrate,
        )
    report = None
    if verify_it:
        from vlpack.verification import verify as run_verify
        from vlpack.verification.card import record

        source_name = f"{given[0]}@{revision}" if revision else str(given[0])
        report = run_verify(output, source_name, threads=threads, lora=lora or (), say=console.say_progress)
        record(output, report)
    console.show_build(result, report, as_json=as_json)
    if report and not as_json:
        console_measure.show_verification(report, None, as_json=False)
    if report and not report.ok:
        raise typer.Exit(1)


for verb in (run, chat, embed, score):
    app.command(cls=AskingCommand)(verb)


@app.command(cls=Command)
def inspect(
    path: Annotated[Path, typer.Argument(help="A folder of a package or checkpoint, or a Hub id (no weights).")],
    hashes: Annotated[bool, typer.Option("--hashes/--no-hashes", help="Compare the contents of all files.")] = True,
    as_json: opt.Json = False,
) -> None:
    """Show what a package or a checkpoint is made of; exit with 1 where a package is damaged."""
    from vlpack.inspection import inspect as run_inspect

    description = run_inspect(path, hashes=hashes)
    console.show_inspection(description, as_json=as_json)
    if description.get("problems"):
        raise typer.Exit(1)


app.command(cls=Command)(verify)
app.command(name="eval", cls=Command)(evaluate)
app.command(cls=Command)(bench)


@app.command(cls=Command)
def architectures(as_json: opt.Json = False) -> None:
    """List the architectures that are supported and what each needs."""
    from vlpack.architectures import described

    console.show_architectures(described(), as_json=as_json)


@app.command(cls=Command)
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


NO_MEMORY = b"error: There is not enough memory.\nClose other programs, or raise the limit (ulimit -v).\n"
"""Made beforehand: there is no memory to make it when it is needed."""


def _lack(error: Exception) -> VlpackError | None:
    """What this machine or its limits lack, if that is what an error of Python's own classes means."""
    if isinstance(error, OSError):  # of the streams: what concerns a user's files is a VlpackError by now
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return VlpackError("Too many files are open.", "Raise the limit on file descriptors (ulimit -n 256).")
        return VlpackError(f"Cannot write the output: {error.strerror or error}.")
    if "can't start new thread" in str(error):
        return VlpackError("No thread can be started.", "Raise the limits on memory and processes (ulimit -v, -u).")
    mapping = ("failed to map segment", "Cannot allocate memory")  # of the dynamic loader
    if isinstance(error, ImportError) and any(text in str(error) for text in mapping):
        return VlpackError("There is not enough memory to load a library.", "Raise the limit (ulimit -v).")
    return None


def _show_plainly(error: VlpackError) -> None:
    """Without rich where that cannot be: it loads modules, and takes memory and files."""
    try:
        console.show_error(error)
    except (MemoryError, OSError, ImportError, RuntimeError):
        with contextlib.suppress(OSError, AttributeError):
            sys.stderr.write(f"error: {error}\n")


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
    except VlpackError as error:
        _show_plainly(error)
        sys.exit(2)
    except MemoryError:
        pass  # what the error's frames hold is free only when this block is left
    except (ImportError, RuntimeError, OSError) as error:
        told = _lack(error)
        if told is None:
            raise
        _show_plainly(told)
        sys.stdout = None  # or Python would try once more to write as it ends
        sys.exit(2)
    except _Interrupted as interrupt:
        console.show_error(VlpackError("Interrupted."))
        sys.exit(128 + interrupt.args[0])
    else:
        return
    os.write(2, NO_MEMORY)
    sys.exit(2)


if __name__ == "__main__":
    main()
