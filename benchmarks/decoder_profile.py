"""Profiles the decoder of a package as the engine runs it: which share of the time each kind of node takes.

Tokens and cached keys are random. Each case runs once to warm up and then several times; the run with the shortest
time counts. Prints a Markdown table of milliseconds for each kind of node and case.

Usage: python benchmarks/decoder_profile.py PACKAGE [--threads 2] [--rounds 3] [--prompts 512 2048 4096]
    [--cached 512 4096] [--rows 8]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import vlpack.decoding.graphs as graphs_module
import vlpack.ort.session as session_module
from vlpack.decoding.graphs import Graphs
from vlpack.decoding.slots import Slots

KINDS = {
    "GroupQueryAttention": "attention",
    "NarrowGroupQueryAttention": "attention",
    "MatMulIntegerToFloat": "products",
    "MatMulNBits": "products",
    "Linear4": "products",
    "Linear8": "products",
    "Linear8Blocks": "products",
    "RMSNormalization": "RMS norms",
    "SimplifiedLayerNormalization": "RMS norms",
    "SkipSimplifiedLayerNormalization": "RMS norms",
    "RotaryEmbedding": "rotary",
    "GatherND": "packing of rows",
    "Abs": "row quantization",
    "ReduceMax": "row quantization",
    "Div": "row quantization",
    "QuantizeLinear": "row quantization",
    "Sigmoid": "SiLU and gate",
    "QuickGelu": "SiLU and gate",
    "Split": "split of q, k, v",
}
"""The kind of a node by its operator; other nodes are told apart by `kind`."""


def kind(node: onnx.NodeProto) -> str:
    """The kind of a node of the decoder's graph."""
    inputs = " ".join(node.input)
    if node.op_type == "MatMul":
        return "rotation" if "rotation" in inputs else "products"
    if node.op_type == "Add":
        return "row quantization" if "1e-20" in inputs else "residual sums"
    if node.op_type == "Mul":
        return "scales after products" if "ToFloat" in inputs else "SiLU and gate"
    return KINDS.get(node.op_type, "other")


def profiled(folder: Path, threads: int, prefix: str) -> Graphs:
    """The graphs of a package, whose decoder writes a profile; nodes are named after their kinds."""
    options, opened = session_module.session_options, session_module.kernel_session

    def with_profile(count: int) -> Any:
        made = options(count)
        made.enable_profiling, made.profile_file_prefix = True, prefix
        return made

    def with_names(graph: Path, count: int, edit: Any = None) -> Any:
        def name(model: onnx.ModelProto) -> None:
            if edit is not None:
                edit(model)
            for place, node in enumerate(model.graph.node):
                node.name = f"{kind(node)}#{place}"

        return opened(graph, count, name)

    session_module.session_options, graphs_module.kernel_session = with_profile, with_names
    model = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    return Graphs(folder, model, threads)


def call(graphs: Graphs, slots: Slots, counts: np.ndarray, held: int) -> None:
    """Runs the decoder on new tokens of each row after ``held`` random ones."""
    total, random = int(counts.sum()), np.random.default_rng(0)
    tokens = graphs.tokens(random.integers(0, 1000, (1, total)))
    for slot in slots.rows(0, len(counts)):
        slot.length = held
    positions = np.concatenate([np.arange(held, held + count) for count in counts])
    wanted = np.cumsum(counts) - 1
    slots.run(0, counts, tokens, np.broadcast_to(positions, (3, total)).astype(np.int64), wanted)


def main(options: argparse.Namespace) -> None:
    cases = [(f"{new} tokens", np.array([new]), 0) for new in options.prompts]
    cases += [(f"a token after {held}", np.array([1]), held) for held in options.cached]
    cases.append((f"{options.rows} rows after 512", np.ones(options.rows, np.int64), 512))
    with tempfile.TemporaryDirectory() as folder:
        graphs = profiled(options.package, options.threads, str(Path(folder) / "profile"))
        longest = max([*options.prompts, *options.cached, 512]) + 1
        slots = Slots(graphs, options.rows, longest)
        for buffer in slots._buffers:
            buffer[0] = np.random.default_rng(1).standard_normal(buffer[0].shape)
            buffer[1:, :, :512] = buffer[:1, :, :512]
        for _, counts, held in cases:
            for _ in range(options.rounds + 1):
                call(graphs, slots, counts, held)
        events = json.loads(Path(graphs.decoder.end_profiling()).read_text(encoding="utf-8"))
    runs = sorted((e["ts"], e["dur"]) for e in events if e.get("name") == "model_run")
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    columns = []
    for place, (name, _, _) in enumerate(cases):
        each = runs[place * (options.rounds + 1) + 1 : (place + 1) * (options.rounds + 1)]
        start, length = min(each, key=lambda run: run[1])
        spent: Counter[str] = Counter()
        for event in nodes:
            if start <= event["ts"] < start + length:
                label = event["name"].removesuffix("_kernel_time").partition("#")[0]
                operator = event["args"]["op_name"]
                spent[KINDS.get(operator, label if "#" in event["name"] else operator)] += event["dur"]
        columns.append((name, length, spent))
    total = sum((spent for _, _, spent in columns), Counter())
    print("| ms | " + " | ".join(name for name, _, _ in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for label, _ in total.most_common():
        cells = (f"{spent[label] / 1e3:.1f} ({spent[label] / length:.0%})" for _, length, spent in columns)
        print(f"| {label} | " + " | ".join(cells) + " |")
    print("| all | " + " | ".join(f"{length / 1e3:.1f}" for _, length, _ in columns) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048, 4096])
    parser.add_argument("--cached", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--rows", type=int, default=8)
    main(parser.parse_args())
