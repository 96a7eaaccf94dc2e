"""Times a package's graphs with and without the operators of vlpack-kernels, in turns, and compares their results.

With one thread, processor time is measured, which other programs hardly affect; with more threads, elapsed time.
Inputs are random. Prints the best time of all rounds without and with the operators, in seconds, their ratio, and the
relative L2 difference of the outputs.

Usage: python benchmarks/native_operators.py PACKAGE [--tokens 512 2048] [--patches 30x40 48x64] [--threads 1]
    [--rounds 2]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlpack.ort.kernels import SWITCH, kernel_counts, library
from vlpack.ort.session import kernel_session

Inputs = dict[str, np.ndarray]
"""Inputs of a graph, by name."""


def decoder_inputs(ports: dict[str, Any], new: int, past: int) -> Inputs:
    """Random inputs of a decoder for ``new`` tokens after ``past`` others."""
    random, given = np.random.default_rng(0), {}
    for name, port in ports.items():
        if name.startswith("past"):
            given[name] = (random.standard_normal((1, port.shape[1], past, port.shape[3])) / 2).astype(np.float32)
        elif name == "attention_mask":
            given[name] = np.ones((1, past + new), np.int64)
        elif name == "position_ids":
            places = np.arange(past, past + new, dtype=np.int64)
            given[name] = np.broadcast_to(places, (3, 1, new) if len(port.shape) == 3 else (1, new)).copy()
        elif name == "input_ids":
            given[name] = random.integers(0, 1000, (1, new))
        else:
            given[name] = (random.standard_normal((1, new, port.shape[2])) / 20).astype(np.float32)
    return given


def cases(part: str, ports: dict[str, Any], options: argparse.Namespace) -> Iterator[tuple[str, Inputs]]:
    """Yields the names and inputs of the calls of a graph that are measured."""
    if part == "decoder":
        yield "a token after 512", decoder_inputs(ports, 1, 512)
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
            for _ in range(options.rounds * (4 if "after" in name else 1)):
                for place, session in enumerate(sessions):
                    start = clock()
                    results[place] = session.run([session.get_outputs()[0].name], given)[0]
                    best[place] = min(best[place], clock() - start)
            apart = np.linalg.norm(results[1] - results[0]) / np.linalg.norm(results[0])
            print(f"  {name}: {best[0]:.4f} s, {best[1]:.4f} s, ratio {best[1] / best[0]:.3f}, apart {apart:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512])
    parser.add_argument("--patches", nargs="*", default=["30x40", "48x64"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    main(parser.parse_args())
