"""Writes a checkpoint of a real model's sizes with random bfloat16 weights, for measuring time and memory.

Which tensors there are is asked of vlpack's own architectures, so a config is all that a size needs.

Usage: python benchmarks/synthetic.py {2b,4b,8b} FOLDER [--tokenizer FOLDER_WITH_A_TOKENIZER]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vlpack.architectures import ARCHITECTURES
from vlpack.architectures.base import GraphOptions
from vlpack.graph import declare
from vlpack.precision import QuantizationOptions, make_policy

SIZES: dict[str, dict[str, Any]] = {
    "2b": {"text": (2048, 28, 16, 8, 6144), "vision": (24, 1024, 4096), "deepstack": [5, 11, 17], "tied": True},
    "4b": {"text": (2560, 36, 32, 8, 9728), "vision": (24, 1024, 4096), "deepstack": [5, 11, 17], "tied": True},
    "8b": {"text": (4096, 36, 32, 8, 12288), "vision": (27, 1152, 4304), "deepstack": [8, 16, 24], "tied": False},
}
"""hidden, layers, heads, kv heads, intermediate; depth, hidden, intermediate: Qwen3-VL's public configs."""

COPIED = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja")


def config(size: str) -> dict[str, Any]:
    sizes = SIZES[size]
    hidden, layers, heads, kv_heads, intermediate = sizes["text"]
    depth, vision_hidden, vision_intermediate = sizes["vision"]
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": sizes["tied"],
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": depth,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "num_heads": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "deepstack_visual_indexes": sizes["deepstack"],
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
        },
    }


def tensors(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model."""
    architecture = ARCHITECTURES[values["architectures"][0]](values)
    policy = make_policy("fp32", "cpu", QuantizationOptions(), architecture.text.num_hidden_layers)
    weights = [w for part in architecture.parts(GraphOptions()) for w in declare(part.module, policy)]
    return {source.name: source.shape for weight in weights for source in weight.sources}


def write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """One safetensors file; the random values come from a pool, entered at random places."""
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 24, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            left = int(np.prod(shape))
            if len(shape) == 1 and name.endswith("norm.weight"):
                file.write(np.ones(left, ml_dtypes.bfloat16).tobytes())
                continue
            while left:
                place = int(rng.integers(0, 1 << 22))
                chunk = pool[place : place + left]
                file.write(chunk.tobytes())
                left -= len(chunk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied")
    arguments = parser.parse_args()
    values = config(arguments.size)
    arguments.folder.mkdir(parents=True)
    (arguments.folder / "config.json").write_text(json.dumps(values, indent=1))
    generation = {"bos_token_id": 151643, "eos_token_id": [151645, 151643], "pad_token_id": 151643, "do_sample": False}
    (arguments.folder / "generation_config.json").write_text(json.dumps(generation))
    image = {
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (arguments.folder / "preprocessor_config.json").write_text(json.dumps(image))
    for name in COPIED:
        if arguments.tokenizer and (arguments.tokenizer / name).is_file():
            shutil.copyfile(arguments.tokenizer / name, arguments.folder / name)
    write(arguments.folder, tensors(values))


if __name__ == "__main__":
    main()
