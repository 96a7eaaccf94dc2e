"""Measures the time of one decoding step by operator: a package's decoder in plain onnxruntime.

Products with weights read every weight once, so their time is bound by memory. All other operators are overhead that a
faster memory would not remove. The runtime's own overhead is the difference between the time of a token in
onnxruntime-genai (`vlpack bench`) and the time of a step here, which is printed first.

Usage: python benchmarks/token_profile.py PACKAGE [PACKAGE ...] [--context 512] [--steps 20] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx_logits import TYPES, decoder_of

WEIGHTS = ("MatMulNBits", "MatMulIntegerToFloat", "MatMul", "Gemm", "QMoE", "MoE", "DynamicQuantizeMatMul")
"""Operators that multiply by weights; MatMul also rotates, by matrices that stay in the processor's cache."""


def feeds(session: ort.InferenceSession, decoder: dict[str, Any], context: int) -> dict[str, np.ndarray]:
    """Inputs of one step of one sequence after ``context`` tokens, with random values and an arbitrary cache.

    The cache has room for the new token, because its buffers are bound as outputs too, as onnxruntime-genai does it.
    """
    rng = np.random.default_rng(0)
    sizes = {"batch_size": 1, "sequence_length": 1, "total_sequence_length": context + 1}
    sizes |= {"past_sequence_length": context + 1}
    made: dict[str, np.ndarray] = {}
    for port in session.get_inputs():
        shape = [size if isinstance(size, int) else sizes[size] for size in port.shape]
        if port.name == "attention_mask":
            made[port.name] = np.ones(shape, np.int64)
        elif port.name == "position_ids":
            made[port.name] = np.full(shape, context, np.int64)
        elif port.type == "tensor(int64)":
            made[port.name] = np.ones(shape, np.int64)
        else:
            dtype = TYPES.get(port.type, np.float32)
            made[port.name] = rng.integers(-8, 8, shape).astype(dtype) / dtype(1 if dtype is np.int8 else 8)
            made[port.name] = made[port.name].astype(dtype)
    return made


def bound(session: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> Any:
    """A binding of the inputs, in which keys and values are written into the buffers that they are read from."""
    binding = session.io_binding()
    for name, array in inputs.items():
        value = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
        if name.startswith("past_key_values."):
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
    binding.bind_output("logits")
    return binding


def profile(package: Path, context: int, steps: int, threads: int) -> None:
    decoder = decoder_of(package)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    graph = package / decoder["filename"]
    plain = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    inputs = feeds(plain, decoder, context)
    seconds = []
    binding = bound(plain, inputs)
    for _ in range(steps):
        begun = time.perf_counter()
        plain.run_with_iobinding(binding)
        seconds.append(time.perf_counter() - begun)
    del binding, plain
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "profile")
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        binding = bound(session, inputs)
        for _ in range(steps):
            session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
            count[event["args"]["op_name"]] += 1
    total = sum(spent.values())
    products = sum(spent[name] for name in WEIGHTS)
    print(
        f"{package.name}: {1e3 * min(seconds):.1f} ms a step after {context} tokens, {threads} threads "
        f"(median {1e3 * sorted(seconds)[len(seconds) // 2]:.1f}); with profiling, {total / steps / 1e3:.1f} ms in "
        f"{sum(count.values()) // steps} operators, of which products with weights and rotations {products / total:.0%}"
    )
    for name, microseconds in spent.most_common(12):
        print(
            f"  {name:28} {microseconds / steps / 1e3:7.2f} ms {microseconds / total:6.1%} {count[name] // steps:5} x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    for package in given.packages:
        profile(package, given.context, given.steps, given.threads)


if __name__ == "__main__":
    main()
