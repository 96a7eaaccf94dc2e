"""Makes copies of a Qwen2 or Llama checkpoint that compute the same function, for fair tests of quantization.

`permuted` moves every hidden and every intermediate channel to another place. Weights that were quantized in blocks
before they were published (SmolLM2's are Q4_1 here) then lie in other blocks than the publisher's.
`planted` adds the outliers that larger models have and SmolLM2 lacks: channels that are large after the norms,
and large products of gate and up. The columns that read them become smaller by the same factors.

Usage: python tests/checkpoint_copies.py CHECKPOINT FOLDER [--permute] [--plant]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[Any]]
"""Float32 tensors by their names in the checkpoint."""
Change = Callable[[Tensors, int], Tensors]

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""The norms of a layer, each with the matrices that read its output."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""The matrices of a layer whose rows are added to the hidden state."""

NORM_OUTLIERS, UP_OUTLIERS = 6, 8
"""Channels of each norm, and rows of each up_proj, that become outliers."""
FACTORS = (10.0, 60.0)
"""Bounds of the uniformly drawn factors by which outliers are larger."""


def _layer(layer: int) -> str:
    return f"model.layers.{layer}."


def permuted(tensors: Tensors, layers: int, seed: int = 0) -> Tensors:
    """A copy with the hidden channels, and each layer's intermediate channels, in another order."""
    random, made = np.random.default_rng(seed), dict(tensors)
    order = random.permutation(tensors["model.norm.weight"].size)
    made["model.norm.weight"] = tensors["model.norm.weight"][order]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            made[name] = tensors[name][:, order]
    for prefix in map(_layer, range(layers)):
        for norm, readers in READERS.items():
            made[f"{prefix}{norm}.weight"] = tensors[f"{prefix}{norm}.weight"][order]
            for reader in readers:
                made[f"{prefix}{reader}.weight"] = tensors[f"{prefix}{reader}.weight"][:, order]
        for writer in WRITERS:
            made[f"{prefix}{writer}.weight"] = tensors[f"{prefix}{writer}.weight"][order]
        gate, up, down = (f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        inner = random.permutation(tensors[up].shape[0])
        made[gate], made[up], made[down] = made[gate][inner], made[up][inner], made[down][:, inner]
    return made


def planted(tensors: Tensors, layers: int, seed: int = 1) -> Tensors:
    """A copy with `NORM_OUTLIERS` outliers after each norm of a layer and `UP_OUTLIERS` before each down_proj."""
    random = np.random.default_rng(seed)
    made = {name: tensor.copy() for name, tensor in tensors.items()}

    def draw(size: int, count: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return random.choice(size, count, replace=False), random.uniform(*FACTORS, count).astype(np.float32)

    for prefix in map(_layer, range(layers)):
        for norm, readers in READERS.items():
            weight = made[f"{prefix}{norm}.weight"]
            channels, factors = draw(weight.size, NORM_OUTLIERS)
            weight[channels] *= factors
            for reader in readers:
                made[f"{prefix}{reader}.weight"][:, channels] /= factors
        up = made[f"{prefix}mlp.up_proj.weight"]
        rows, factors = draw(up.shape[0], UP_OUTLIERS)
        up[rows] *= factors[:, None]
        made[f"{prefix}mlp.down_proj.weight"][:, rows] /= factors
    return made


def write_copy(source: Path, target: Path, *changes: Change) -> Path:
    """Writes a copy of a checkpoint to a new folder, with all changes applied in turn, as float32 in one file."""
    from safetensors.numpy import load_file, save_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(source / "model.safetensors").items()}
    for change in changes:
        tensors = change(tensors, config["num_hidden_layers"])
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--permute", action="store_true")
    parser.add_argument("--plant", action="store_true")
    given = parser.parse_args()
    chosen: list[Change] = [*[permuted] * given.permute, *[planted] * given.plant]
    write_copy(given.checkpoint, given.folder, *chosen)


if __name__ == "__main__":
    main()
