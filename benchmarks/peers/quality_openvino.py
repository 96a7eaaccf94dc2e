"""Measures models that optimum-intel exports for OpenVINO against the fp32 model, with the default CPU plugin.

Takes the folder that `python benchmarks/quality.py WORK_FOLDER --prepare` fills, and runs in the environment that
benchmarks/peers/make.py makes for OpenVINO. The calibrated model has AWQ and scale estimation with the calibration
texts. The fp32 export is measured too, to detect mistakes in running it.

Usage: python benchmarks/peers/quality_openvino.py WORK_FOLDER [--output quality-openvino.json] [--models mild outliers]
       [--threads N]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

sys.path.insert(0, str(Path(__file__).parents[1]))

from quality_scores import CALIBRATION, MODELS, TOKENS, Array, Row, save, score

GROUP = 64
"""Group size: SmolLM2's widths are multiples of it, but not of 128, which is the exporter's default."""
SETTINGS: dict[str, list[str] | None] = {
    "fp32": ["--weight-format", "fp32"],
    "int8": ["--weight-format", "int8"],
    f"int4 g{GROUP}": ["--weight-format", "int4", "--group-size", str(GROUP)],
    f"int4 g{GROUP}, AWQ + SE": None,
}
"""Options of `optimum-cli export openvino` by name; None if calibration texts are given, which needs Python."""


def export(checkpoint: Path, folder: Path, options: list[str]) -> None:
    tool = Path(sys.executable).with_name("optimum-cli")
    command = [tool, "export", "openvino", "-m", checkpoint, "--task", "text-generation-with-past", *options, folder]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{options}: optimum-cli ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")


def export_calibrated(checkpoint: Path, folder: Path, texts: list[str]) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    settings = OVWeightQuantizationConfig(
        bits=4, group_size=GROUP, quant_method="awq", scale_estimation=True, dataset=texts, num_samples=len(texts),
        tokenizer=str(checkpoint),
    )  # fmt: skip
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, quantization_config=settings, compile=False)
    model.save_pretrained(folder)


def constants(output: Any) -> list[Any] | None:
    """The constants that a weight is computed from: codes, scales and zero points; None if it is no weight."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return [node]
    if kind in ("Convert", "Reshape", "Transpose"):
        return constants(node.input_value(0))
    if kind in ("Multiply", "Subtract"):
        parts = [constants(node.input_value(index)) for index in range(2)]
        return None if any(part is None for part in parts) else [one for part in parts if part for one in part]
    return None


def bits(path: Path) -> tuple[float, float]:
    """Bits per weight of the decoder's matrices and of the head, with scales and zero points, in an OpenVINO model."""
    layers, others = [], []
    for node in ov.Core().read_model(path).get_ops():
        found = constants(node.input_value(1)) if node.get_type_name() == "MatMul" else None
        if found is None:
            continue
        size = sum(one.get_element_type().bitwidth * math.prod(one.get_output_shape(0)) for one in found)
        weights = max(math.prod(one.get_output_shape(0)) for one in found)
        (layers if "layers." in node.get_friendly_name() else others).append((weights, size))
    weights, size = max(others)  # the head is the largest weight outside of layers
    return sum(size for _, size in layers) / sum(count for count, _ in layers), size / weights


def logits(path: Path, ids: Array, threads: int) -> Iterator[Array]:
    """Logits of each row of ``ids [texts, tokens]``, float32 [tokens, vocabulary]."""
    request = ov.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads}).create_infer_request()
    names = {name for port in request.model_inputs for name in port.get_names()}
    for row in ids:
        request.reset_state()
        text = row[None]
        feeds = {
            "input_ids": text,
            "attention_mask": np.ones_like(text),
            "position_ids": np.arange(row.size, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found = request.infer({name: value for name, value in feeds.items() if name in names})
        yield np.array(found["logits"][0], np.float32)


def measure(work: Path, model: str, name: str, threads: int) -> Row:
    folder, options = work / f"{model}-openvino", SETTINGS[name]
    shutil.rmtree(folder, ignore_errors=True)
    if options is None:
        texts = json.loads((work / CALIBRATION).read_text(encoding="utf-8"))["texts"]
        export_calibrated(work / model, folder, texts)
    else:
        export(work / model, folder, options)
    path = folder / "openvino_model.xml"
    found = logits(path, np.load(work / TOKENS), threads)
    about = f"OpenVINO {version('openvino')}, optimum-intel {version('optimum-intel')}"
    row = score(work, model, f"OpenVINO {name}", found, *bits(path), about)
    shutil.rmtree(folder)
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
