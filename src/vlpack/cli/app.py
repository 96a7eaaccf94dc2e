"""The command ``vlpack``: its subcommands, and how it ends on errors and interruptions."""

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
from vlpack.cli import console, console_measure
from vlpack.cli import options as opt
from vlpack.cli.batch import batch
from vlpack.cli.commands import Command, Group, ImageCommand
from vlpack.cli.console_build import build_progress
from vlpack.cli.measure import bench, evaluate, verify
from vlpack.cli.serving import serve
from vlpack.cli.stored import list_packages, rm
from vlpack.cli.use import chat, embed, run, score
from vlpack.errors import OptionError, VlpackError

app = typer.Typer(
    name="vlpack",
    cls=Group,
    help="Turns Qwen vision-language checkpoints into complete packages for the stock ONNX Runtime GenAI.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXTRA_OPTIONS = (
    "From the builder of onnxruntime_genai: block_size, is_symmetric, accuracy_level, algo_config, "
    "matmul_mixed_precision, exclude_embeds, prune_lm_head, shared_embeddings, filename, hf_token. "
    "vlpack's own: balance, rotation, weight_type, kv_cache."
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
    no_kernels: Annotated[
        bool, typer.Option("--no-kernels", help="Do not use the operators of vlpack-kernels, if it is installed.")
    ] = False,
) -> None:
    if no_kernels:
        from vlpack.ort.kernels import SWITCH  # imports onnx, which takes a while

        os.environ[SWITCH] = "0"  # also for the processes that a command starts


@app.command(cls=Command)
def build(
    source: Annotated[
        str | None,
        typer.Argument(help="Checkpoint: a folder, a GGUF file or a Hub id, such as Qwen/Qwen3-VL-4B-Instruct."),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(
            "-m", "--model_name", "--model-name", help="Hub id, as the builder of onnxruntime_genai takes it."
        ),
    ] = None,
    input_folder: Annotated[
        str | None, typer.Option("-i", "--input", help="Checkpoint folder, as the builder takes it.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder of the package. (default for a Hub id: a place in the cache)"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--precision",
            help="fp32, fp16, int8 or int4. (default: the bits of a quantized checkpoint; otherwise int8 on cpu, else "
            "fp16)",
        ),
    ] = None,
    execution_provider: Annotated[
        str, typer.Option("-e", "--execution_provider", "--execution-provider", help="cpu, cuda, dml or webgpu.")
    ] = "cpu",
    part: Annotated[
        str, typer.Option("--part", help="all; text (a decoder that runs by itself); vision; embedding.")
    ] = "all",
    task: Annotated[
        str,
        typer.Option("--task", help="generate, embedding or reranker; auto detects it from the checkpoint."),
    ] = "auto",
    vision_precision: Annotated[
        str | None,
        typer.Option(
            "--vision-precision",
            help="Precision of the vision encoder. (default: that of --precision; with int4, int8 on cpu, else fp16)",
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
            help="LoRA adapter to merge: a folder or a Hub id; repeat the option for more.",
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="self|FILE",
            help="Quantize int4 or int8 weights with GPTQ, calibrated on text: self for text that the model generates, "
            'or a file of plain text or conversations (*.jsonl, {"messages": […]} per line). Takes minutes.',
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            metavar="BITS",
            help="Average bits of the decoder's weights with their scales, such as 5.5, with --calibrate: 4 bits, and "
            "8 for the matrices that need them most.",
        ),
    ] = None,
    mmproj: opt.Mmproj = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")] = None,
    cache_dir: Annotated[
        Path | None, typer.Option("-c", "--cache_dir", "--cache-dir", help="Folder for files from the Hub.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing package.")] = False,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Number of threads that encode weights. (default: all cores, at most 8)"),
    ] = None,
    verify_it: Annotated[
        bool,
        typer.Option("--verify", help="Compare the package with transformers and record the result in its README."),
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Build a package from a checkpoint."""
    if not verify_it:
        # the build has a thread for each core; those of numpy's BLAS would compete with them, and wait by spinning
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from vlpack.builder import build as run_build
    from vlpack.options import parse_extra_options

    given = [value for value in (source, model_name, Path(input_folder) if input_folder else None) if value]
    if len(given) != 1:
        raise OptionError(
            "Give one checkpoint." if given else "Which checkpoint?",
            "Write vlpack build SOURCE -o OUTPUT, or -i FOLDER or -m HUB_ID in place of SOURCE.",
        )
    if output == Path():
        raise OptionError("Where should the package go?", "Give its folder with -o.")
    if verify_it:
        from vlpack.verification.reference import require

        require()  # report what is missing before anything is built
    with build_progress(console.err) as progress:
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
            bits=bits,
            mmproj=mmproj,
        )
    report = None
    if verify_it:
        from vlpack.verification import verify as run_verify
        from vlpack.verification.card import record

        source_name = f"{given[0]}@{revision}" if revision else str(given[0])
        report = run_verify(
            result.folder, source_name, threads=threads, lora=lora or (), progress=console.say_progress, mmproj=mmproj
        )
        record(result.folder, report)
    console.show_build(result, report, as_json=as_json)
    if report and not as_json:
        console_measure.show_verification(report, None, as_json=False)
    if report and not report.ok:
        raise typer.Exit(1)


for verb in (run, chat, embed, score):
    app.command(cls=ImageCommand)(verb)
app.command(cls=Command)(batch)
app.command(cls=Command)(serve)
app.command(name="list", cls=Command)(list_packages)
app.command(cls=Command)(rm)


@app.command(cls=Command)
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A folder of a package or checkpoint, a GGUF file, or a Hub id (no weights).")
    ],
    hashes: Annotated[bool, typer.Option("--hashes/--no-hashes", help="Compare the contents of all files.")] = True,
    mmproj: opt.Mmproj = None,
    as_json: opt.Json = False,
) -> None:
    """Show the graphs, weights and settings of a package or checkpoint; exit with 1 if a package is damaged."""
    from vlpack.inspection import inspect as run_inspect

    description = run_inspect(path, hashes=hashes, mmproj=mmproj)
    console.show_inspection(description, as_json=as_json)
    if description.get("problems"):
        raise typer.Exit(1)


app.command(cls=Command)(verify)
app.command(name="eval", cls=Command)(evaluate)
app.command(cls=Command)(bench)


@app.command(cls=Command)
def architectures(as_json: opt.Json = False) -> None:
    """List the supported architectures and what each needs."""
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
    """Splits ``--extra_options A=1 B=2``, the form of onnxruntime_genai's builder, into one option per value."""
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
        spread.append(key)  # without a value: typer reports it
    return spread


class _Interrupted(BaseException):
    """Control-C or SIGTERM. A class of its own, because typer ends the process at a KeyboardInterrupt silently."""


def _interrupt(number: int, frame: object) -> None:
    raise _Interrupted(number)


NO_MEMORY = b"error: There is not enough memory.\nClose other programs, or raise the limit (ulimit -v).\n"
"""The message for a MemoryError, encoded in advance because there may be no memory for it then."""


def _lack(error: Exception) -> VlpackError | None:
    """The message for an error that means a lack of memory, threads or file descriptors; None for other errors."""
    if isinstance(error, OSError):  # from the output streams: errors of a user's files are VlpackErrors by now
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return VlpackError("Too many files are open.", "Raise the limit on file descriptors (ulimit -n 256).")
        return VlpackError(f"Cannot write the output: {error.strerror or error}.")
    if "can't start new thread" in str(error):
        return VlpackError("No thread can be started.", "Raise the limits on memory and processes (ulimit -v, -u).")
    mapping = ("failed to map segment", "Cannot allocate memory")  # messages of the dynamic loader
    if isinstance(error, ImportError) and any(text in str(error) for text in mapping):
        return VlpackError("There is not enough memory to load a library.", "Raise the limit (ulimit -v).")
    return None


def _show_plainly(error: VlpackError) -> None:
    """Prints an error, without rich if rich fails: it loads modules, and needs memory and file descriptors."""
    try:
        console.show_error(error)
    except (MemoryError, OSError, ImportError, RuntimeError):
        with contextlib.suppress(OSError, AttributeError):
            sys.stderr.write(f"error: {error}\n")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command. A user's mistake gives one sentence on standard error and exit code 2."""
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
        if isinstance(leaving.__context__, BrokenPipeError):  # not typer's exit code 1, which means a damaged package
            sys.exit(128 + 13)  # the exit code of programs that SIGPIPE ends
        raise
    except VlpackError as error:
        _show_plainly(error)
        sys.exit(2)
    except MemoryError:
        pass  # the memory held by the error's frames is freed only after this block
    except (ImportError, RuntimeError, OSError) as error:
        told = _lack(error)
        if told is None:
            raise
        _show_plainly(told)
        sys.stdout = None  # keeps Python from writing again when it exits
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
