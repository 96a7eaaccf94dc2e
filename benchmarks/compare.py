"""Compares vlpack with its peers on the same tasks in one run: time to the first token, later tokens, memory, loading.

In every round each tool runs in a process of its own, after its model's files were read once, so that other work on the
machine affects all tools and all models come from the system's file cache. A process answers ``--answers`` times, and
no prompt or image is repeated. Two times to the first token are distinguished: cold is that of the first request, which
pays for everything that is prepared then (together with loading, it is the wait of a command line); warm is the best of
the later requests (the wait of a server's users). Figures are the best and the worst of the rounds, and ratios compare
the best ones. ``cores`` and ``others'`` are the numbers of cores that the tool and all other programs kept busy in the
least disturbed round: repeat the run if others' are above about 0.1, or if the tool's own are few (it was stopped).
On a machine that is never quiet, ``--processor-time`` measures the processor time of the tool's process instead of the
clock's time; use it with ``--threads 1``, because threads that wait for each other often spin.
Each tool is compared with the best peer whose weights have as many bits. Peers that are not given are left out;
benchmarks/peers/make.py makes them and prints the options. The name of a peer's file ends with its kind: `-int8`,
`-q4_0.gguf`.

Usage: python benchmarks/compare.py --vlpack PACKAGE [PACKAGE ...] [--engine] [--upstream FOLDER]
       [--llama FILE.gguf ... --node FOLDER] [--openvino FOLDER ... --openvino-python PYTHON]
       [--works 512 2048 640x480 ...] [--rounds 3] [--threads N] [--processor-time] [--output result.json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quiet import Others

from vlpack.evaluation.benchmark import machine

PEERS = Path(__file__).parent / "peers"
LIMIT = 1800
"""Largest number of seconds for one task."""

PROCESSOR_TIME = "COMPARE_PROCESSOR_TIME"
"""Environment variable that makes the tools' processes measure their processor time."""

Runs = dict[str, dict[str, list[dict[str, Any]]]]
"""Results of all rounds, by task and tool."""


@dataclass(frozen=True)
class Contender:
    """A tool: the command to which tasks are appended, its folder, the model's files, and whether it takes images.

    ``bits`` is the number of bits of the decoder's weights.
    """

    command: list[str]
    model: Path
    folder: str | None = None
    sees: bool = True
    bits: int | None = None


def contenders(given: argparse.Namespace) -> dict[str, Contender]:
    options = [str(given.threads), str(given.new_tokens), str(given.answers)]
    made = {}
    for package in given.vlpack:
        command = [sys.executable, __file__, "--one", str(package), *options]
        sees = (package / "vision.onnx").is_file()
        made[f"vlpack {package.name}"] = Contender(command, package, sees=sees, bits=bits_of(package))
        if given.engine:
            command = [sys.executable, str(Path(__file__).with_name("engine_model.py")), str(package), *options]
            made[f"vlpack {package.name}, engine"] = Contender(command, package, sees=sees, bits=bits_of(package))
    for folder in given.upstream:
        command = [given.upstream_python, str(PEERS / "upstream_model.py"), str(folder), *options]
        made[f"upstream {kind(folder)}"] = Contender(command, folder, sees=False, bits=bits(kind(folder)))
    for file in given.llama:
        command = ["node", str(PEERS / "llama_cpp.mjs"), os.path.abspath(file), *options]
        name = kind(file).upper()
        made[f"llama.cpp {name}"] = Contender(command, file, given.node, sees=False, bits=bits(name))
    for folder in given.openvino:
        command = [given.openvino_python, str(PEERS / "openvino_model.py"), str(folder), *options]
        made[f"OpenVINO GenAI {kind(folder)}"] = Contender(command, folder, bits=bits(kind(folder)))
    return made


def kind(model: Path) -> str:
    """The kind of a peer's weights: what the name of its file or folder ends with, such as ``int8`` or ``q4_0``."""
    return model.name.removesuffix(".gguf").rpartition("-")[2]


def bits(kind: str) -> int | None:
    """Bits of a kind of weights (``int8``, ``Q4_0``): its first digits; None if it has none."""
    found = re.search(r"\d+", kind)
    return int(found[0]) if found else None


def bits_of(package: Path) -> int | None:
    """Bits of the weights of a vlpack package, by the precision in its manifest; None if it has no manifest."""
    try:
        return bits(json.loads((package / "vlpack.json").read_text(encoding="utf-8"))["precision"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def one(arguments: list[str]) -> None:
    """A command for vlpack with the arguments of the peers' scripts: PACKAGE THREADS NEW_TOKENS REPEAT WORK …"""
    from importlib.metadata import version

    if os.environ.get(PROCESSOR_TIME):  # everything that the worker measures
        time.perf_counter = time.process_time
    from vlpack.evaluation.benchmark_worker import work

    package, threads, new, repeat, *works = arguments
    found = []
    for name in works:
        asked: dict[str, Any] = {"package": package, "threads": int(threads), "new": int(new), "repeat": int(repeat)}
        asked |= {"image": tuple(map(int, name.split("x")))} if "x" in name else {"tokens": int(name)}
        found.append({"name": name if "x" in name else f"{name} tokens", **work(asked)})
    print(json.dumps({"load": found[0]["load"], "works": found, "version": version("onnxruntime-genai")}))


def read(model: Path) -> tuple[float, int]:
    """Reads a model's files once; returns the seconds that this took and the number of bytes."""
    files = [model] if model.is_file() else [path for path in model.rglob("*") if path.is_file()]
    buffer, total = bytearray(1 << 22), 0
    started = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return time.perf_counter() - started, total


def measure(contender: Contender, name: str) -> dict[str, Any] | None:
    """Measures one task with one tool; if it fails, returns None and prints a message to standard error."""
    read(contender.model)  # loads the files into the system's cache
    seconds, size = read(contender.model)
    try:
        with Others() as others:
            done = subprocess.run(
                [*contender.command, name],
                cwd=contender.folder,
                capture_output=True,
                text=True,
                check=False,
                timeout=LIMIT,
            )
        found = json.loads(done.stdout.strip().splitlines()[-1])
        work = found["works"][0]
    except (IndexError, KeyError, TypeError, ValueError):
        print(f"{contender.command[1]}: {name}: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{contender.command[1]}: {name}: {error}", file=sys.stderr)
        return None
    parts = {part: work[part][0] for part in ("preprocess", "vision", "prefill") if part in work and "x" in name}
    cold, *later = work["first_token"]
    return {
        "prompt_tokens": work["prompt_tokens"],
        "first": cold,
        "warm": min(later, default=None),
        "token": min(work["token"]),
        "resident": work["resident"],
        "load": found["load"],
        "read": seconds,
        "bytes": size,
        "own": others.own,
        "others": others.cores,
        "parts": parts,
        "bits": contender.bits,
        "version": found["version"],
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlpack", type=Path, nargs="+", required=True)
    parser.add_argument("--engine", action="store_true", help="measure vlpack's packages in vlpack.Engine as well")
    parser.add_argument("--upstream", type=Path, nargs="+", default=[])
    parser.add_argument("--upstream-python", default=sys.executable)
    parser.add_argument("--llama", type=Path, nargs="+", default=[])
    parser.add_argument("--node", default=".", help="folder with node_modules")
    parser.add_argument("--openvino", type=Path, nargs="+", default=[])
    parser.add_argument("--openvino-python", default=sys.executable)
    parser.add_argument("--works", nargs="+", default=["512", "2048", "4096", "640x480", "1024x768"])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--answers", type=int, default=3, help="answers of each process; the first is cold")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--processor-time", action="store_true", help="measure processor time, not the clock's")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.processor_time:
        os.environ[PROCESSOR_TIME] = "1"
    everybody = contenders(given)
    for contender in everybody.values():
        if not contender.model.exists():
            parser.error(f"there is no {contender.model}")
    settings = {name: getattr(given, name) for name in ("threads", "new_tokens", "answers", "rounds", "processor_time")}
    results: Runs = {}
    for number in range(given.rounds):
        for work in given.works:
            for name, contender in everybody.items():
                if "x" in work and not contender.sees:
                    continue
                if (found := measure(contender, work)) is not None:
                    results.setdefault(work, {}).setdefault(name, []).append(found)
                    warm = "" if found["warm"] is None else f", warm {found['warm']:.2f} s"
                    print(f"round {number + 1}: {work}: {name}: cold {found['first']:.2f} s{warm}", file=sys.stderr)
            if given.output:  # written after every task, because a run takes long and may be interrupted
                whole = {"machine": machine(), **settings, "results": results}
                given.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(table(results))


HEADS = (
    "work", "who", "tokens", "load + first request, s", "of best peer", "first request, s", "of best peer",
    "later requests, s", "of best peer", "a token, ms", "of best peer", "resident, GB", "load, s", "of reading",
    "cores", "others'",
)  # fmt: skip
RATIOS = ("cold", "first", "warm", "token")
"""The times that are compared with the best peer; ``cold`` is loading plus the first request."""


def whole(run: dict[str, Any]) -> dict[str, Any]:
    """A result with ``cold`` added, and with ``warm`` as None if the result is older than that measurement."""
    return {"warm": None, **run, "cold": run["load"] + run["first"]}


def best(runs: list[dict[str, Any]], key: str) -> float | None:
    """The smallest value of the rounds that have one; None if none has."""
    return min((run[key] for run in runs if run[key] is not None), default=None)


def peers_of(bits: int | None, rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """All runs of peers with as many bits; of all peers if none has, or if the bits are not known."""
    runs = [run for who, peers in rows.items() if not who.startswith("vlpack") for run in peers]
    return [run for run in runs if bits is not None and run.get("bits") == bits] or runs


def span(runs: list[dict[str, Any]], key: str, scale: float, digits: int) -> str:
    """The best and the worst value, as text."""
    values = [run[key] for run in runs if run[key] is not None]
    if not values:
        return "-"
    low, high = (f"{scale * figure(values):.{digits}f}" for figure in (min, max))
    return low if low == high else f"{low}–{high}"


def table(results: Runs) -> str:
    lines = ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    for work, given in results.items():
        rows = {who: list(map(whole, runs)) for who, runs in given.items()}
        for who, runs in rows.items():
            peers = {key: best(peers_of(runs[0].get("bits"), rows), key) for key in RATIOS}
            own = {key: best(runs, key) for key in (*RATIOS, "load", "read")}
            to = {key: f"{own[key] / peers[key]:.2f}" if own[key] and peers[key] else "-" for key in RATIOS}
            quiet = min(runs, key=lambda run: run["others"] or 0)
            cells = (
                work, who, str(runs[0]["prompt_tokens"]), span(runs, "cold", 1, 2), to["cold"],
                span(runs, "first", 1, 2), to["first"], span(runs, "warm", 1, 2), to["warm"],
                span(runs, "token", 1e3, 1), to["token"], span(runs, "resident", 1e-9, 2), span(runs, "load", 1, 1),
                f"{own['load'] / own['read']:.1f}", str(quiet.get("own", "-")),
                "-" if quiet["others"] is None else str(quiet["others"]),
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
