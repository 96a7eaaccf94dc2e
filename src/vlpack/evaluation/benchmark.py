"""Benchmark of a package on this machine: load time, time to the first token and its parts, later tokens, memory.

Each prompt is measured in a process of its own, so that memory and caches do not carry over. The stock runtime is
measured through `vlpack.Model` with greedy decoding, and end tokens do not end an answer.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlpack import errors
from vlpack.checkpoint.files import read_json
from vlpack.errors import InputError, OptionError, PackageError, option
from vlpack.package.manifest import whole_package
from vlpack.system import available_cores, checked_threads, own_process, total_memory_bytes
from vlpack.tasks import GENERATE, check_package_task

PROMPTS = (512, 2048)
"""Default lengths of the text prompts, in tokens."""
IMAGES = ("640x480",)
"""Default sizes of the images, for a package that takes images."""

COMPARED = ("precision", "threads", "new_tokens", "machine", "versions")
"""Fields that the figures depend on; a comparison reports those that differ."""

Progress = Callable[[str, int, int], None]
"""Called with a description of the step, the number of prompts measured so far, and their total number."""


@dataclass(frozen=True)
class Figure:
    """Median and range of several measurements, in seconds or bytes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """The figure of at least one measured value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Measurement:
    """The measurement of one prompt.

    Args:
        name: name of the prompt, such as ``512 tokens`` or ``640x480``.
        prompt_tokens: number of tokens of the whole prompt.
        first_token: seconds from the question to the first token: the sum of the next three.
        preprocess: seconds for resizing images and cutting them into patches.
        vision: seconds in the vision encoder; 0 for text.
        prefill: seconds for everything else before the first token.
        token: seconds for each token after the first.
        resident: resident memory after the answers in bytes, including pages of files.
        peak: peak memory in bytes.
        load: seconds to load the package.
    """

    name: str
    prompt_tokens: int
    first_token: Figure
    preprocess: Figure
    vision: Figure
    prefill: Figure
    token: Figure
    resident: int
    peak: int
    load: float


@dataclass(frozen=True)
class Benchmark:
    """The result of a benchmark: a package's figures on one machine.

    Args:
        package: name of the package's folder.
        sha256: hash of its manifest, which identifies the package.
        precision: the package's precision.
        bytes: size of its files in bytes.
        read: seconds to read the files from the system's cache.
        load: seconds to load the package.
        works: the measurements, in the order of the prompts.
        threads: number of threads of the runtime.
        new_tokens: number of tokens of each answer.
        repeat: number of answers to each kind of prompt.
        machine: processor, number of cores, bytes of memory, and operating system.
        versions: versions of vlpack and the runtime's libraries.
    """

    package: str
    sha256: str
    precision: str
    bytes: int
    read: float
    load: Figure
    works: list[Measurement]
    threads: int
    new_tokens: int
    repeat: int
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The result as a JSON object, the form in which `compare` reads an earlier one."""
        return asdict(self)


def bench(
    package: str | os.PathLike[str],
    *,
    prompt_tokens: Sequence[int] | None = None,
    images: Sequence[str] | None = None,
    new_tokens: int = 32,
    repeat: int = 3,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure the speed and memory of a package on this machine.

    Args:
        package: the package's folder.
        prompt_tokens: lengths of text prompts in tokens; 512 and 2048 if neither lengths nor images are given.
        images: sizes of images such as ``640x480``, each with a prompt of its own; 640x480 if neither lengths nor
            images are given and the package takes images.
        new_tokens: number of tokens of each answer, including the first one.
        repeat: number of answers to each kind of prompt; no two of these prompts have the same beginning or image.
        threads: number of threads of the runtime; all cores by default.
        progress: called before each prompt is measured.

    Raises:
        VlpackError: the package cannot be run, or a prompt does not fit it.
    """
    folder = Path(package).expanduser()
    manifest = whole_package(folder)
    check_package_task(folder, manifest, GENERATE)
    threads = checked_threads(threads)
    for name, value, least in (("new_tokens", new_tokens, 2), ("repeat", repeat, 1)):
        if value < least:
            raise OptionError(f"{option(name)} is {value}; it must be at least {least}.")
    sees = (folder / "vision.onnx").is_file()
    if prompt_tokens is None and images is None:
        prompt_tokens, images = PROMPTS, IMAGES if sees else ()
    images = images or ()
    if images and not sees:
        raise InputError("The package has no vision part, so it takes no images.", f"Leave out {option('images')}.")
    asked: list[dict[str, Any]] = [{"tokens": length} for length in prompt_tokens or ()]
    asked += [{"image": parse_size(size)} for size in images]
    _read(folder, manifest)  # into the system's cache, from which loading will read
    seconds = _read(folder, manifest)
    works = []
    for number, one in enumerate(asked):
        if progress:
            progress("Measuring", number, len(asked))
        works.append(_measure({"package": str(folder), "threads": threads, "new": new_tokens, "repeat": repeat, **one}))
    return Benchmark(
        package=folder.resolve().name,
        sha256=manifest["sha256"],
        precision=manifest["precision"],
        bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
        read=seconds,
        load=Figure.of([work.load for work in works]),
        works=works,
        threads=threads,
        new_tokens=new_tokens,
        repeat=repeat,
        machine=machine(),
        versions={name: version(name) for name in ("vlpack", "onnxruntime", "onnxruntime-genai")},
    )


def parse_size(text: str) -> tuple[int, int]:
    """Parse the size of an image, ``WIDTHxHEIGHT`` in pixels.

    Raises:
        OptionError: the text is not such a size, or a side is not between 1 and 16384.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and 0 < int(width) <= 16384 and 0 < int(height) <= 16384):
        raise OptionError(f"'{text}' is not the size of an image.", "Give width and height in pixels, such as 640x480.")
    return int(width), int(height)


def _name(work: Mapping[str, Any]) -> str:
    return "{}x{}".format(*work["image"]) if "image" in work else f"{work['tokens']} tokens"


def _read(folder: Path, manifest: Mapping[str, Any]) -> float:
    """Read all of a package's files once and return the seconds it took."""
    started = time.perf_counter()
    buffer = bytearray(1 << 22)
    for name in manifest["files"]:
        with open(folder / name, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def _measure(work: Mapping[str, Any]) -> Measurement:
    """Measure one prompt in another process."""
    command, environment = own_process("vlpack.evaluation.benchmark_worker", json.dumps(work))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise PackageError(
            f"Measuring {_name(work)} ended with code {done.returncode}: {done.stderr.strip()[-300:] or 'killed'}.",
            "Check that the machine has enough memory.",
        ) from None
    if "error" in found:
        raise getattr(errors, found["kind"])(found["error"], found["hint"])
    parts: dict[str, Any] = {
        part: Figure.of(found.pop(part)) for part in ("first_token", "preprocess", "vision", "prefill", "token")
    }
    return Measurement(name=_name(work), **parts, **found)


def machine() -> dict[str, Any]:
    """A description of this machine: processor, cores, memory and operating system."""
    processor = platform.processor()
    path = Path("/proc/cpuinfo")
    if path.is_file():
        lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
        processor = next((value.strip() for key, _, value in lines if key.strip() == "model name"), processor)
    return {
        "processor": processor or platform.machine(),
        "cores": available_cores(),
        "memory": total_memory_bytes(),
        "system": platform.system(),
    }


def compare(now: Benchmark, path: Path) -> tuple[list[tuple[str, float, float]], list[str]]:
    """Compare a result with an earlier one.

    Args:
        now: the new result.
        path: file of the earlier result.

    Returns:
        For each prompt in both results: its name, and the new time to the first token and time per later token, each as
        a multiple of the earlier one.
        Sentences about other differences between the two.

    Raises:
        InputError: the file is not a result, or the two have no prompt in common.
    """
    then = earlier(path)
    before = {work["name"]: (work["first_token"]["median"], work["token"]["median"]) for work in then["works"]}
    differs = [
        f"{name} was {then[name]!r} in the earlier result and is {getattr(now, name)!r} now."
        for name in COMPARED
        if then[name] != getattr(now, name)
    ]
    ratios = [
        (work.name, work.first_token.median / before[work.name][0], work.token.median / before[work.name][1])
        for work in now.works
        if work.name in before
    ]
    if not ratios:
        raise InputError(f"{path} has no prompt in common with this benchmark; its prompts are {', '.join(before)}.")
    return ratios, differs


def earlier(path: Path) -> dict[str, Any]:
    """Read and check an earlier result; calling it before the benchmark finds mistakes before minutes of measuring.

    Raises:
        InputError: the file is not a result.
    """
    then = read_json(path, path)
    try:
        figures = [work[part]["median"] for work in then["works"] for part in ("first_token", "token")]
        whole = all(isinstance(work["name"], str) for work in then["works"]) and all(name in then for name in COMPARED)
        if not (figures and whole and all(figure > 0 for figure in figures)):
            raise TypeError
    except (KeyError, TypeError):
        raise InputError(
            f"{path} is not a result of `vlpack bench`.", "Make one with `vlpack bench PACKAGE --output FILE`."
        ) from None
    return then
