"""Writes a checkpoint of a real model's sizes with random bfloat16 weights, for measuring time and memory.

The list of tensors comes from vlpack's own architectures, so a size is defined by its configuration alone.

Sizes of Qwen3.5 give a text model, or a complete one with --vision. Token ids of images are those of Qwen3's tokenizer.

Usage: python benchmarks/synthetic.py {2b,4b,8b,30b-a3b,3.5-2b,3.5-9b} FOLDER [--layers N] [--experts LAYOUT]
       [--vision] [--tokenizer FOLDER]
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
from vlpack.architectures.moe import MixtureOfExperts
from vlpack.architectures.ports import GraphOptions
from vlpack.export.graph import declare
from vlpack.layers.moe import Layout
from vlpack.quantize.policy import QuantizationOptions, make_policy

SIZES: dict[str, dict[str, Any]] = {
    "2b": {"text": (2048, 28, 16, 8, 6144), "vision": (24, 1024, 4096), "deepstack": [5, 11, 17], "tied": True},
    "4b": {"text": (2560, 36, 32, 8, 9728), "vision": (24, 1024, 4096), "deepstack": [5, 11, 17], "tied": True},
    "8b": {"text": (4096, 36, 32, 8, 12288), "vision": (27, 1152, 4304), "deepstack": [8, 16, 24], "tied": False},
    "30b-a3b": {"text": (2048, 48, 32, 4, 6144), "vision": (27, 1152, 4304), "deepstack": [8, 16, 24], "tied": False},
}
"""Sizes of Qwen3-VL's public configurations, by name.

Text: hidden size, layers, heads, key-value heads, intermediate size. Vision: depth, hidden size, intermediate size.
"""
HYBRIDS: dict[str, tuple[int, ...]] = {
    "3.5-2b": (2048, 24, 8, 2, 6144, 16, 16),
    "3.5-9b": (4096, 32, 16, 4, 12288, 16, 32),
}
"""Sizes of models with Qwen3.5's layers, by name; those of the 9B are the published ones.

Hidden size, layers, heads, key-value heads, intermediate size, key heads and value heads of linear attention.
"""
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
IMAGE_TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}

COPIED = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja")


ENCODERS = {"3.5-2b": (24, 1024, 4096), "3.5-9b": (27, 1152, 4304)}
"""Depth, hidden size and intermediate size of the vision encoders of Qwen3.5's sizes."""


def complete_hybrid_config(size: str, layers: int | None) -> dict[str, Any]:
    text = hybrid_config(size, layers)
    del text["architectures"]
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "tie_word_embeddings": text["tie_word_embeddings"],
        **IMAGE_TOKENS,
        "text_config": text,
        "vision_config": {"model_type": "qwen3_5", **encoder(*ENCODERS[size], text["hidden_size"], [])},
    }


def encoder(depth: int, hidden: int, intermediate: int, out: int, deepstack: list[int]) -> dict[str, Any]:
    """The settings of a vision encoder."""
    return {
        "depth": depth,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": deepstack,
        "num_position_embeddings": 2304,
        "out_hidden_size": out,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
    }


def hybrid_config(size: str, layers: int | None) -> dict[str, Any]:
    hidden, all_layers, heads, kv_heads, intermediate, key_heads, value_heads = HYBRIDS[size]
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    rope |= {"mrope_interleaved": True, "mrope_section": [11, 11, 10]}
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers or all_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "tie_word_embeddings": size == "3.5-2b",
        "head_dim": 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "rope_parameters": rope,
        "eos_token_id": 151645,
    }


def config(size: str, layers: int | None = None, *, vision: bool = False) -> dict[str, Any]:
    if size in HYBRIDS:
        return complete_hybrid_config(size, layers) if vision else hybrid_config(size, layers)
    sizes = SIZES[size]
    hidden, all_layers, heads, kv_heads, intermediate = sizes["text"]
    mixture = size == "30b-a3b"
    return {
        "architectures": [f"Qwen3VL{'Moe' if mixture else ''}ForConditionalGeneration"],
        "model_type": "qwen3_vl_moe" if mixture else "qwen3_vl",
        "tie_word_embeddings": sizes["tied"],
        **IMAGE_TOKENS,
        "text_config": {
            **(EXPERTS if mixture else {}),
            "hidden_size": hidden,
            "num_hidden_layers": layers or all_layers,
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
        "vision_config": {"model_type": "qwen3_vl", **encoder(*sizes["vision"], hidden, sizes["deepstack"])},
    }


def tensors(values: dict[str, Any], layout: Layout) -> dict[str, tuple[int, ...]]:
    """The name and the shape of every tensor of the model."""
    architecture = ARCHITECTURES[values["architectures"][0]](values)
    if isinstance(architecture, MixtureOfExperts):
        architecture.layout = layout
    policy = make_policy("fp32", "cpu", QuantizationOptions(), architecture.precision_facts)
    weights = [w for part in architecture.parts(GraphOptions()) for w in declare(part, policy)]
    return {tensor.name: tensor.shape for weight in weights for tensor in weight.source.tensors()}


def write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes one safetensors file; the random values are taken from a pool at random places."""
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
    parser.add_argument("size", choices=[*SIZES, *HYBRIDS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="of the decoder, fewer than the model has")
    parser.add_argument(
        "--experts",
        choices=Layout.__members__,
        default="TRANSPOSED",
        help="layout of a mixture's; TRANSPOSED is the Hub's",
    )
    parser.add_argument("--vision", action="store_true", help="with a vision encoder, which other sizes always have")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied")
    arguments = parser.parse_args()
    values = config(arguments.size, arguments.layers, vision=arguments.vision)
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
    write(arguments.folder, tensors(values, Layout[arguments.experts]))


if __name__ == "__main__":
    main()
