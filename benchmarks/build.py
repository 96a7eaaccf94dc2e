"""Builds the same checkpoint with vlpack and its peers: time, peak memory and size of each, and of copying it.

Every build runs in a process of its own; its figures come from the operating system (wait4). Of several rounds, the
shortest time and the highest peak count. Upstream's builder writes the text decoder alone, so vlpack's `--part text` is
measured as well as complete packages; OpenVINO's export writes all parts. ``others' cores`` is the number of cores that
other programs kept busy meanwhile. A slow copy is a sign of a busy disk; much wall time with little processor time, of
a stopped build.

Usage: python benchmarks/build.py CHECKPOINT WORK_FOLDER [--only NAME ...] [--rounds N] [--output result.json]
       [--upstream-python PYTHON] [--openvino-python PYTHON]
       (benchmarks/peers/make.py --environments makes both environments; tools without one are left out)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peers.make import builder, export
from quiet import Others

# vlpack is not imported: Linux counts a parent's memory at its start into a child's peak
MACHINE = "import json, vlpack.evaluation.benchmark; print(json.dumps(vlpack.evaluation.benchmark.machine()))"


def commands(given: argparse.Namespace) -> dict[str, list[str]]:
    """Commands by name, to which the output folder is appended."""
    checkpoint = given.checkpoint
    ours = [sys.executable, "-m", "vlpack", "build", checkpoint]
    made: dict[str, list[Any]] = {"copy": ["cp", "-r", checkpoint]}
    for precision in ("int4", "int8", "fp16"):
        made[f"vlpack {precision}"] = [*ours, "-p", precision, "-o"]
    for precision in ("int4", "int8"):
        if given.openvino_python:
            made[f"OpenVINO {precision}"] = export(given.openvino_python, checkpoint, precision)
    for precision in ("int4", "int8"):
        made[f"vlpack {precision}, text"] = [*ours, "-p", precision, "--part", "text", "-o"]
        if given.upstream_python:
            made[f"upstream {precision}, text"] = builder(given.upstream_python, checkpoint, precision)
    return {name: [str(part) for part in command] for name, command in made.items()}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def measure(command: list[str], output: Path, log: Path) -> dict[str, Any]:
    """Exit code, wall seconds, processor seconds, peak bytes, bytes written."""
    shutil.rmtree(output, ignore_errors=True)  # output of an interrupted run
    with Others() as others, open(log, "wb") as file:
        started = time.perf_counter()
        process = subprocess.Popen([*command, str(output)], stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    found = {
        "code": process.returncode,
        "wall": wall,
        "processor": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024,
        "bytes": size(output),
        "others": others.cores,
    }
    shutil.rmtree(output, ignore_errors=True)
    return found


HEADS = ("build", "wall s", "of copying", "processor s", "peak memory", "size", "others' cores")


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    copying = min((run["wall"] for run in rows.get("copy", ())), default=None)
    for name, runs in rows.items():
        best = min(runs, key=lambda run: run["wall"])
        failed = f" (exit code {best['code']})" if best["code"] else ""
        cells = (
            name + failed, f"{best['wall']:.1f}", f"{best['wall'] / copying:.1f}" if copying else "-",
            f"{best['processor']:.1f}", f"{max(run['peak'] for run in runs) / 1e9:.2f} GB",
            f"{best['bytes'] / 1e9:.2f} GB", "-" if best["others"] is None else f"{best['others']:.2f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the table's rows")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--upstream-python")
    parser.add_argument("--openvino-python")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    known = commands(given)
    if unknown := set(given.only or ()) - known.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    given.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    for number in range(given.rounds):
        for name in given.only or known:
            log = given.work / f"{name.replace(', ', '-').replace(' ', '-')}.log"
            found = measure(known[name], given.work / "output", log)
            rows.setdefault(name, []).append(found)
            print(f"round {number + 1}: {name}: {found['wall']:.1f} s, exit code {found['code']}", file=sys.stderr)
            if given.output:
                source = {"checkpoint": given.checkpoint.resolve().name, "bytes": size(given.checkpoint)}
                machine = json.loads(subprocess.check_output([sys.executable, "-c", MACHINE]))
                whole = {"machine": machine, **source, "rounds": given.rounds, "builds": rows}
                given.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    if failed := [name for name, runs in rows.items() if any(run["code"] for run in runs)]:
        sys.exit(f"Failed: {', '.join(failed)}; logs are in {given.work}.")


if __name__ == "__main__":
    main()
