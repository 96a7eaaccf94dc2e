"""Measures the quality of packages with and without the native operators: KL divergence from the fp32 model.

Uses the same models and texts as quality.py, in the sessions of the engine: each text as a prompt (all tokens in one
call, as far as a call takes them), and token by token after a cache, several texts at a time, as answers are decoded.
Rounding happens in other places in the two, for instance in keys and values that are cached in bfloat16.

Usage: python benchmarks/native_quality.py WORK_FOLDER [--build "OPTIONS" ...] [--models mild outliers] [--rows 8]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from quality import bits
from quality_inputs import prepare
from quality_scores import MODELS, TOKENS, Array, score

from vlpack.decoding.graphs import Graphs
from vlpack.decoding.slots import Slots
from vlpack.ort.kernels import SWITCH, kernel_counts

BUILDS = ("--precision int8", "--precision int4", "--precision int4 --calibrate self")


def model_of(package: Path) -> dict[str, Any]:
    """The ``model`` section of the package's genai_config.json."""
    model: dict[str, Any] = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))["model"]
    return model


def logits(package: Path, ids: Array, threads: int, rows: int, chunk: int) -> Iterator[Array]:
    """The logits [tokens, vocabulary] of each text of ``ids [texts, tokens]``, in calls of ``chunk`` tokens a text."""
    graphs = Graphs(package, model_of(package), threads)
    for first in range(0, len(ids), rows):
        texts = ids[first : first + rows]
        count, size = texts.shape
        slots = Slots(graphs, count, size)
        found = np.empty((count, size, graphs.vocab_size), np.float32)
        for start in range(0, size, chunk):
            part = texts[:, start : start + chunk]
            counts = np.full(count, part.shape[1])
            positions = np.tile(np.arange(start, start + part.shape[1]), (3, count))
            values = slots.run(0, counts, graphs.tokens(part.reshape(1, -1)), positions, np.arange(part.size))
            found[:, start : start + part.shape[1]] = values.reshape(*part.shape, -1)
            for slot, tokens in zip(slots.rows(0, count), part, strict=True):
                slot.write(tokens.astype(np.int32))
        yield from found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--build", action="append", metavar="OPTIONS", help="may be given again")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    prepare(given.work)
    ids = np.load(given.work / TOKENS)
    for build in given.build or BUILDS:
        for model in given.models:
            package = given.work / "native-package"
            command = [sys.executable, "-m", "vlpack", "build", given.work / model, "--output", package, "--force"]
            subprocess.run([*command, *shlex.split(build)], check=True, capture_output=True)
            for switch in "01":
                os.environ[SWITCH] = switch
                counts = kernel_counts(package / model_of(package)["decoder"]["filename"])
                for name, rows, chunk in (("prompts", 1, ids.shape[1]), ("tokens", given.rows, 1)):
                    found = logits(package, ids, given.threads, rows, chunk)
                    used = ", ".join(f"{count} {operator}" for operator, count in counts.items()) or "stock operators"
                    score(given.work, model, f"{build}, {name}, {used}", found, *bits(package), "")


if __name__ == "__main__":
    main()
