"""Measures the divergence of packages of quantized checkpoints from these checkpoints, on real weights.

Usage: python benchmarks/quantized_checkpoints.py WORK

WORK is the folder that `quality.py --prepare` fills. The real model is quantized by rounding to the nearest code, in
each format, with and without planted outliers. The reference is the fp32 package of the values that the codes stand
for, so only the error that the package adds to that of the format is measured. Prints a Markdown table of KL
divergences in nats per token.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from onnx_logits import logits
from quality_inputs import prepare  # also finds the modules of tests/
from quality_scores import MODELS, TOKENS, Array, divergence

import quantized

FORMATS = {
    "8 bits per row, weights alone": quantized.compressed(8, -1),
    "w8a8": quantized.int_quantized(),
    "AWQ, groups of 64": quantized.awq(64),
    "AWQ, groups of 64, accuracy_level=1": quantized.awq(64),
}
"""Name of a row of the table → format. Text with ``=`` after the last comma is an option of the build."""


def kl(expected: list[Array], package: Path, ids: Array, threads: int) -> float:
    """The mean KL(expected ‖ package) over the texts, in nats per token."""
    found = logits(package, ids, threads)
    return float(np.mean([divergence(one, two)[0] for one, two in zip(expected, found, strict=True)]))


def build(source: Path, package: Path, *options: str) -> Path:
    """Builds a package whose decoder returns the logits of all tokens."""
    command = [sys.executable, "-m", "vlpack", "build", str(source), "-o", str(package), "--force", *options]
    extra = [] if "--extra-options" in options else ["--extra-options"]
    subprocess.run([*command, *extra, "prune_lm_head=false"], check=True, capture_output=True)
    return package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    prepare(given.work)
    ids = np.load(given.work / TOKENS)
    print("| checkpoint | " + " | ".join(f"{model}: package | {model}: its values in int8" for model in MODELS) + " |")
    print("| --- |" + " --- |" * 2 * len(MODELS))
    for name, form in FORMATS.items():
        cells = []
        for model in MODELS:
            with tempfile.TemporaryDirectory(dir=given.work) as place:
                folder, package = Path(place) / "checkpoint", Path(place) / "package"
                quantized.quantize(given.work / model, folder, form)
                values = folder.with_name("checkpoint-values")
                expected = list(logits(build(values, package, "-p", "fp32"), ids, given.threads))
                option = name.rpartition(", ")[2]
                extra = ["--extra-options", option] if "=" in option else []
                cells.append(kl(expected, build(folder, package, *extra), ids, given.threads))
                cells.append(kl(expected, build(values, package, "-p", "int8"), ids, given.threads))
                shutil.rmtree(package)
        print(f"| {name} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
