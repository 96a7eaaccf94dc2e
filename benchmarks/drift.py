"""Measures how far the states of linear attention drift from those of transformers as a text grows, token by token.

Usage:
    python benchmarks/drift.py make FOLDER
    vlpack build FOLDER -o fp32 -p fp32 --part text        (and int8, int4)
    python benchmarks/drift.py measure FOLDER fp32 int8 int4 [--tokens 2000]

`make` writes a checkpoint of Qwen3.5's architecture with random weights and the initial decays of the reference: some
heads remember a few tokens, others hundreds. `measure` gives every package the same random tokens, one at a time, and
prints the relative L2 error of its states (all layers together) and logits after 1, 10, 100 … tokens. Each package
continues from its own states, so errors accumulate as they do in an answer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Array = npt.NDArray[Any]

STOPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Numbers of tokens after which errors are printed."""
VOCABULARY = 4096
"""Number of tokens of the checkpoint."""


def make(folder: Path) -> None:
    """Writes a checkpoint with 8 layers, two of them with full attention, and heads of the published size."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        max_position_embeddings=8192,
        eos_token_id=0,
        rope_parameters=rope,
    )
    Qwen3_5ForCausalLM(config).save_pretrained(folder)


def reference(folder: Path, ids: Array, stops: list[int]) -> list[dict[str, Array]]:
    """The states and logits of transformers after each number of tokens.

    Args:
        folder: folder of the checkpoint.
        ids: token ids ``[1, S]``.
        stops: numbers of tokens.

    Returns:
        For each number of tokens, the logits of the last token and the states, by name.
    """
    import torch
    from transformers import DynamicCache, Qwen3_5ForCausalLM

    model = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    cache = DynamicCache(config=model.config)
    found, first = [], 0
    with torch.no_grad():
        for stop in stops:
            logits = model(torch.tensor(ids[:, first:stop]), past_key_values=cache, use_cache=True).logits[:, -1]
            first, kept = stop, {"logits": logits.numpy().copy()}
            for layer, kind in enumerate(model.config.layer_types):
                if kind == "linear_attention":
                    kept[f"recurrent_state {layer}"] = cache.get_recurrent_state(layer, state_idx=0).numpy().copy()
                    kept[f"conv_state {layer}"] = cache.get_conv_state(layer, state_idx=0).numpy().copy()
            found.append(kept)
    return found


def measured(package: Path, ids: Array, stops: list[int]) -> list[dict[str, Array]]:
    """The states and logits of a text package after each number of tokens, which are given to it one by one."""
    config = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    path = package / config["model"]["decoder"]["filename"]
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    past = {
        port.name: np.zeros([1, *(size if isinstance(size, int) else 0 for size in port.shape[1:])], np.float32)
        for port in session.get_inputs()
        if port.name.startswith("past_key_values")
    }
    names = [port.name for port in session.get_outputs()]
    found = []
    for place in range(stops[-1]):
        given = {"input_ids": ids[:, place : place + 1], "attention_mask": np.ones((1, place + 1), np.int64)}
        given["position_ids"] = np.full((3, 1, 1), place, np.int64)
        out = dict(zip(names, session.run(names, {**given, **past}), strict=True))
        past = {name.replace("present", "past_key_values"): value for name, value in out.items() if name != "logits"}
        if place + 1 in stops:
            kept = {"logits": out["logits"][:, -1]}
            for name, value in out.items():
                if name.endswith("_state"):
                    _, layer, kind = name.split(".")
                    kept[f"{kind} {layer}"] = value
            found.append(kept)
    return found


def error(values: dict[str, Array], wanted: dict[str, Array], kind: str) -> float:
    """The relative L2 error of all arrays of a kind together; transformers may keep more past inputs than needed."""
    apart = size = 0.0
    for name, array in wanted.items():
        if name.startswith(kind):
            value = values[name]
            right = array[..., -value.shape[-1] :] if kind == "conv_state" else array
            apart += float(np.square(value.astype(np.float64) - right).sum())
            size += float(np.square(right.astype(np.float64)).sum())
    return float(np.sqrt(apart / size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("folder", type=Path)
    measure = commands.add_parser("measure")
    measure.add_argument("checkpoint", type=Path)
    measure.add_argument("packages", type=Path, nargs="+")
    measure.add_argument("--tokens", type=int, default=2000)
    given = parser.parse_args()
    if given.command == "make":
        make(given.folder)
        return
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (1, given.tokens))
    stops = [stop for stop in STOPS if stop < given.tokens] + [given.tokens]
    wanted = reference(given.checkpoint, ids, stops)
    print("| package | tokens | recurrent states | convolution states | logits |\n| --- | --- | --- | --- | --- |")
    for package in given.packages:
        for stop, values, right in zip(stops, measured(package, ids, stops), wanted, strict=True):
            errors = [error(values, right, kind) for kind in ("recurrent_state", "conv_state", "logits")]
            print(f"| {package.name} | {stop} | {' | '.join(f'{one:.2e}' for one in errors)} |", flush=True)


if __name__ == "__main__":
    main()
