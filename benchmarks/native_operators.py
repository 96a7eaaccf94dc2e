"""Times a package's graphs with and without the operators of vlpack-kernels, in turns, and compares their results.

With one thread, processor time is measured, which other programs hardly affect; with more threads, elapsed time.
Inputs are random. The cache of keys and values is written in place, as in the engine. Prints the best time of all
rounds without and with the operators, in seconds, their ratio, and the relative L2 difference of the outputs.

Usage: python benchmarks/native_operators.py PACKAGE [--tokens 512 2048] [--cached 512 4096] [--rows 8]
    [--patches 30x40 48x64] [--threads 1] [--rounds 2]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from vlpack.ort.kernels import SWITCH, kernel_counts, library
from vlpack.ort.session import kernel_session, ort

Inputs = dict[str, np.ndarray]
"""Inputs of a graph, by name."""


def decoder_inputs(ports: dict[str, Any], new: int, past: int, rows: int = 1) -> Inputs:
    """Random inputs of a decoder for ``new`` tokens after ``past`` others, in each of ``rows`` sequences."""
    random, given = np.random.default_rng(0), {}
    for name, port in ports.items():
        if name.startswith("past"):
            shape = (rows, port.shape[1], past + new, port.shape[3])
            given[name] = (random.standard_normal(shape) / 2).astype(np.float32)
        elif name == "attention_mask":
            given[name] = np.ones((rows, past + new), np.int64)
        elif name == "position_ids":
            places = np.arange(past, past + new, dtype=np.int64)
            given[name] = np.broadcast_to(places, (3, rows, new) if len(port.shape) == 3 else (rows, new)).copy()
        elif name == "input_ids":
            given[name] = random.integers(0, 1000, (rows, new))
        else:
            given[name] = (random.standard_normal((rows, new, port.shape[2])) / 20).astype(np.float32)
    return given


def cases(part: str, ports: dict[str, Any], options: argparse.Namespace) -> Iterator[tuple[str, Inputs]]:
    """Yields the names and inputs of the calls of a graph that are measured."""
    if part == "decoder":
        for past in options.cached:
            yield f"a token after {past}", decoder_inputs(ports, 1, past)
        yield f"a token after 512 in {options.rows} rows", decoder_inputs(ports, 1, 512, options.rows)
        for new in options.tokens:
            yield f"{new} tokens", decoder_inputs(ports, new, 0)
        return
    for grid in options.patches:
        height, width = map(int, grid.split("x"))
        width_of_patch = ports["pixel_values"].shape[1]
        pixels = np.random.default_rng(0).standard_normal((height * width, width_of_patch)).astype(np.float32)
        yield (
            f"{height * width} patches",
            {"pixel_values": pixels, "image_grid_thw": np.array([[1, height, width]], np.int64)},
        )


def bound(session: Any, given: Inputs) -> Any:
    """An I/O binding of the inputs and the first output, with present keys and values in the place of past ones."""
    binding, kinds = session.io_binding(), {port.name: port.type for port in session.get_inputs()}
    outputs = [port.name for port in session.get_outputs()]
    for name, array in list(given.items()):
        value = ort.OrtValue.ortvalue_from_numpy(array)
        if kinds[name] == "tensor(bfloat16)":
            narrow = array.astype(ml_dtypes.bfloat16).view(np.uint16)
            given[name] = narrow  # the value does not own its memory
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(narrow, onnx.TensorProto.BFLOAT16)
        binding.bind_ortvalue_input(name, value)
        if name.startswith("past"):
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
    binding.bind_output(outputs[0])
    return binding


def main(options: argparse.Namespace) -> None:
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    print(f"{library()}, {options.threads} threads")
    for part in ("decoder", "vision"):
        graph = options.package / f"{part}.onnx"
        if not graph.is_file():
            continue
        counts, sessions = kernel_counts(graph), []
        for switch in ("0", "1"):
            os.environ[SWITCH] = switch
            sessions.append(kernel_session(graph, options.threads))
        print(f"{part}: {counts}")
        for name, given in cases(part, {port.name: port for port in sessions[0].get_inputs()}, options):
            best, results = [np.inf, np.inf], [np.zeros(0), np.zeros(0)]
            inputs = [dict(given) for _ in sessions]
            bindings = [bound(*pair) for pair in zip(sessions, inputs, strict=True)]
            for _ in range(options.rounds * (4 if "after" in name else 1)):
                for place, session in enumerate(sessions):
                    start = clock()
                    session.run_with_iobinding(bindings[place])
                    best[place] = min(best[place], clock() - start)
                    results[place] = bindings[place].get_outputs()[-1].numpy()
            apart = np.linalg.norm(results[1] - results[0]) / np.linalg.norm(results[0])
            print(f"  {name}: {best[0]:.4f} s, {best[1]:.4f} s, ratio {best[1] / best[0]:.3f}, apart {apart:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512])
    parser.add_argument("--cached", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--patches", nargs="*", default=["30x40", "48x64"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    main(parser.parse_args())
