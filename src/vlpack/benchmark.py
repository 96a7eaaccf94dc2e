"""How fast a package is here: loading, the time to the first token and its parts, the tokens after it, memory.

Every work runs in a process of its own, so that the memory and the caches of one are not another's. What is measured is
the stock runtime through `vlpack.Model`, greedily, and no end token ends an answer.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlpack import errors
from vlpack.cores import available_cores, checked_threads
from vlpack.errors import InputError, OptionError, PackageError
from vlpack.memory import total_memory_bytes
from vlpack.package.manifest import whole_package
from vlpack.safefile import read_json
from vlpack.tasks import GENERATE, check_package_task

PROMPTS = (512, 2048)
"""Tokens, where nothing else is asked for."""
IMAGES = ("640x480",)
"""Likewise, where the package sees."""

COMPARED = ("precision", "threads", "new_tokens", "machine", "versions")
"""What figures hang on, and a comparison tells when it differs."""

Told = Callable[[str, int, int], None]
"""Told what is being done, how many works are done, and how many there are."""


@dataclass(frozen=True)
class Figure:
    """Of several measurements: seconds, or bytes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Of measurements, one at least."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Work:
    """One prompt, measured.

    Args:
        name: ``512 tokens`` or ``640x480``.
        prompt_tokens: of it all.
        first_token: seconds from the question to the first token; its parts follow.
        preprocess: resizing images and cutting them into patches.
        vision: the vision encoder; 0 for text.
        prefill: the rest.
        token: seconds for each token after the first.
        resident: bytes in memory after the answer, files' pages included.
        peak: at most.
        load: seconds.
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
    """A package on a machine.

    Args:
        package: its folder's name.
        sha256: of its manifest, which tells packages apart.
        precision: of the package.
        bytes: of its files.
        read: seconds to read them once, after they were read before.
        load: seconds to load the package.
        works: in the order that they were asked for.
        threads: of the runtime.
        new_tokens: of each answer.
        repeat: answers to prompts of each kind.
        machine: processor, cores, memory, system.
        versions: of vlpack and what ran.
    """

    package: str
    sha256: str
    precision: str
    bytes: int
    read: float
    load: Figure
    works: list[Work]
    threads: int
    new_tokens: int
    repeat: int
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For a file, and for `compare`."""
        return asdict(self)


def bench(
    package: str | os.PathLike[str],
    *,
    prompt_tokens: Sequence[int] | None = None,
    images: Sequence[str] | None = None,
    new_tokens: int = 32,
    repeat: int = 3,
    threads: int | None = None,
    progress: Told | None = None,
) -> Benchmark:
    """Measure a package.

    Args:
        package: its folder.
        prompt_tokens: lengths of text prompts; 512 and 2048 where neither these nor images are given.
        images: sizes such as ``640x480``, asked about one at a time; 640x480 likewise, where the package sees.
        new_tokens: of each answer, the first one included.
        repeat: answers to prompts of each kind; no two have the same beginning, or the same image.
        threads: of the runtime; all cores by default.
        progress: told what is being done.

    Raises:
        VlpackError: the package cannot be run, or a work does not fit it.
    """
    folder = Path(package).expanduser()
    manifest = whole_package(folder)
    check_package_task(folder, manifest, GENERATE)
    threads = checked_threads(threads)
    for name, value, least in (("new_tokens", new_tokens, 2), ("repeat", repeat, 1)):
        if value < least:
            raise OptionError(f"{name} is {value}; it must be at least {least}.")
    sees = (folder / "vision.onnx").is_file()
    if prompt_tokens is None and images is None:
        prompt_tokens, images = PROMPTS, IMAGES if sees else ()
    images = images or ()
    if images and not sees:
        raise InputError("The package has no vision part, so it takes no images.", "Leave --image away.")
    asked: list[dict[str, Any]] = [{"tokens": length} for length in prompt_tokens or ()]
    asked += [{"image": parse_size(size)} for size in images]
    _read(folder, manifest)  # into the system's cache, as loading will find it
    seconds = _read(folder, manifest)
    works = []
    for number, one in enumerate(asked):
        if progress:
            progress("Measuring", number, len(asked))
        works.append(
            _measured({"package": str(folder), "threads": threads, "new": new_tokens, "repeat": repeat, **one})
        )
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
    """``WIDTHxHEIGHT`` in pixels.

    Raises:
        OptionError: it is something else.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and 0 < int(width) <= 16384 and 0 < int(height) <= 16384):
        raise OptionError(f"'{text}' is not the size of an image.", "640x480, for example.")
    return int(width), int(height)


def _name(work: Mapping[str, Any]) -> str:
    return "{}x{}".format(*work["image"]) if "image" in work else f"{work['tokens']} tokens"


def _read(folder: Path, manifest: Mapping[str, Any]) -> float:
    """Seconds to read a package's files once."""
    started = time.perf_counter()
    buffer = bytearray(1 << 22)
    for name in manifest["files"]:
        with open(folder / name, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def _measured(work: Mapping[str, Any]) -> Work:
    """Let another process do it."""
    command = [sys.executable, "-m", "vlpack.benchmark_work", json.dumps(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise PackageError(
            f"Measuring {_name(work)} ended with code {done.returncode}: {done.stderr.strip()[-300:] or 'killed'}.",
            "Is there enough memory?",
        ) from None
    if "error" in found:
        raise getattr(errors, found["kind"])(found["error"], found["hint"])
    parts: dict[str, Any] = {
        part: Figure.of(found.pop(part)) for part in ("first_token", "preprocess", "vision", "prefill", "token")
    }
    return Work(name=_name(work), **parts, **found)


def machine() -> dict[str, Any]:
    """What figures hang on."""
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
    """What became of an earlier result.

    Returns:
        Name, time to the first token and time of a later one, now as a multiple of then, for each work of both; and
        sentences about what else differs.

    Raises:
        InputError: the file is no result, or has no work in common.
    """
    then = earlier(path)
    before = {work["name"]: (work["first_token"]["median"], work["token"]["median"]) for work in then["works"]}
    differs = [
        f"{name} was {then[name]!r} then and is {getattr(now, name)!r} now."
        for name in COMPARED
        if then[name] != getattr(now, name)
    ]
    ratios = [
        (work.name, work.first_token.median / before[work.name][0], work.token.median / before[work.name][1])
        for work in now.works
        if work.name in before
    ]
    if not ratios:
        raise InputError(f"{path} has no work in common: it has {', '.join(before)}.")
    return ratios, differs


def earlier(path: Path) -> dict[str, Any]:
    """An earlier result that can be compared with, which is better known before minutes of measuring than after.

    Raises:
        InputError: the file is no result.
    """
    then = read_json(path, path)
    try:
        figures = [work[part]["median"] for work in then["works"] for part in ("first_token", "token")]
        whole = all(isinstance(work["name"], str) for work in then["works"]) and all(name in then for name in COMPARED)
        if not (figures and whole and all(figure > 0 for figure in figures)):
            raise TypeError
    except (KeyError, TypeError):
        raise InputError(f"{path} is not a result of `vlpack bench`.", "Make one with --output.") from None
    return then
