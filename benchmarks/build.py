"""Builds the same checkpoint with vlpack and with onnxruntime_genai's own builder: time, peak memory and size of each.

Every build is a process of its own; its figures are the operating system's (wait4). Upstream's builder writes the text
decoder alone, so vlpack's `--part text` stands beside its complete packages.

Usage: python benchmarks/build.py CHECKPOINT WORK_FOLDER [--only NAME ...]
       (upstream needs torch and transformers beside onnxruntime-genai; give its Python with --upstream-python)
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path


def commands(checkpoint: str, upstream_python: str) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "vlpack.cli", "build", checkpoint]
    theirs = [upstream_python, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-e", "cpu"]
    return {
        "copy": ["cp", "-r", checkpoint],
        "vlpack int4": [*ours, "-p", "int4", "-o"],
        "vlpack int8": [*ours, "-p", "int8", "-o"],
        "vlpack fp16": [*ours, "-p", "fp16", "-o"],
        "vlpack int4, text": [*ours, "-p", "int4", "--part", "text", "-o"],
        "upstream int4, text": [*theirs, "-p", "int4", "-o"],
    }


def measure(command: list[str], output: Path, log: Path) -> tuple[int, float, float, int]:
    """Exit code, wall seconds, processor seconds, peak bytes."""
    started = time.perf_counter()
    with open(log, "wb") as file:
        process = subprocess.Popen([*command, str(output)], stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    return process.returncode, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", help="names of the table's rows")
    parser.add_argument("--upstream-python", default=sys.executable)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    print("| build | wall s | processor s | peak memory | size |\n| --- | --- | --- | --- | --- |")
    for name, command in commands(arguments.checkpoint, arguments.upstream_python).items():
        if arguments.only and name not in arguments.only:
            continue
        output = arguments.work / "output"
        code, wall, processor, peak = measure(command, output, arguments.work / f"{name.replace(' ', '-')}.log")
        size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) if output.exists() else 0
        shutil.rmtree(output, ignore_errors=True)
        failed = f" (exit code {code})" if code else ""
        print(
            f"| {name}{failed} | {wall:.1f} | {processor:.1f} | {peak / 1e9:.2f} GB | {size / 1e9:.2f} GB |", flush=True
        )


if __name__ == "__main__":
    main()
