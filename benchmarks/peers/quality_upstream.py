"""Measures the 4-bit models of onnxruntime_genai's own builder against the fp32 model, with plain onnxruntime.

Takes the folder that `python benchmarks/quality.py WORK_FOLDER --prepare` fills, and runs in the environment that
benchmarks/peers/make.py makes for upstream. Its fp32 model is measured too, to detect mistakes in running it.

Usage: python benchmarks/peers/quality_upstream.py WORK_FOLDER [--output quality-upstream.json] [--models mild outliers]
       [--threads N]
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from make import builder
from onnx_logits import decoder_of, logits
from quality_scores import MODELS, TOKENS, Row, save, score

SETTINGS: dict[str, tuple[str, list[str]]] = {
    "fp32": ("fp32", []),
    "int4": ("int4", []),
    "int4, k_quant": ("int4", ["algo_config=k_quant"]),
    "int4, k_quant_mixed": ("int4", ["algo_config=k_quant_mixed"]),
}
"""The precision and the builder's extra options by name."""


def bits(model: Path) -> tuple[float, float]:
    """Bits per weight of the decoder's matrices and of the head, with scales and zero points, in an ONNX graph."""
    graph = onnx.load(model, load_external_data=False).graph
    sizes = {}
    for tensor in graph.initializer:
        width = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        sizes[tensor.name] = width * math.prod(tensor.dims)
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    total = {"decoder": [0, 0], "head": [0, 0]}
    for node in graph.node:
        if not node.op_type.startswith("MatMul") or len(node.input) < 2 or node.input[1] not in sizes:
            continue
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        blocks = node.op_type == "MatMulNBits"
        weights = settings["K"] * settings["N"] if blocks else math.prod(shapes[node.input[1]])
        kept = total["decoder" if "/layers." in node.name else "head"]
        kept[0] += sum(sizes[name] for name in node.input[1:4] if name in sizes)
        kept[1] += weights
    return total["decoder"][0] / total["decoder"][1], total["head"][0] / total["head"][1]


def measure(work: Path, model: str, name: str, threads: int) -> Row:
    """Builds one model and measures it.

    Raises:
        SystemExit: the builder failed.
    """
    precision, options = SETTINGS[name]
    package = work / f"{model}-upstream"
    shutil.rmtree(package, ignore_errors=True)
    command = [*builder(sys.executable, work / model, precision), package, "-c", work / "upstream-cache"]
    extra = ["--extra_options", *options] if options else []
    done = subprocess.run([str(part) for part in (*command, *extra)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"upstream {name}: the builder ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    graph = package / decoder_of(package)["filename"]
    found = logits(package, np.load(work / TOKENS), threads)
    about = f"onnxruntime-genai {version('onnxruntime-genai')}"
    row = score(work, model, f"upstream {name}", found, *bits(graph), about)
    shutil.rmtree(package)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    for model in given.models:
        for name in SETTINGS:
            row = measure(given.work, model, name, given.threads)
            if given.output:
                save(given.output, [row])


if __name__ == "__main__":
    main()
