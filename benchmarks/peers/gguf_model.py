"""Writes the text decoder of a Qwen3-VL or Qwen3 checkpoint as a GGUF file in Q4_0, for llama.cpp.

The embedding, which is the head too where it is tied, is Q8_0, as vlpack keeps it in 8 bits. For text, where the three
axes of M-RoPE are equal, the decoder is Qwen3's.

Usage: python benchmarks/peers/gguf_model.py CHECKPOINT FILE.gguf   (needs: pip install gguf, version 0.19 was used)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from vlpack.checkpoint import Checkpoint

Q4, Q8, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "F32"))
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(source: Path, target: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        text = checkpoint.config.get("text_config", checkpoint.config)
        writer = gguf.GGUFWriter(target, "qwen3")
        rope = text.get("rope_parameters") or text
        writer.add_context_length(text["max_position_embeddings"])
        writer.add_embedding_length(text["hidden_size"])
        writer.add_block_count(text["num_hidden_layers"])
        writer.add_feed_forward_length(text["intermediate_size"])
        writer.add_head_count(text["num_attention_heads"])
        writer.add_head_count_kv(text["num_key_value_heads"])
        writer.add_key_length(text["head_dim"])
        writer.add_value_length(text["head_dim"])
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
        add_tokenizer(writer, json.loads((source / "tokenizer.json").read_text(encoding="utf-8")), text["vocab_size"])
        prefix = "model.language_model" if "text_config" in checkpoint.config else "model"
        add(writer, checkpoint, f"{prefix}.embed_tokens", "token_embd", Q8)
        if "lm_head.weight" in checkpoint.tensors:
            add(writer, checkpoint, "lm_head", "output", Q8)
        add(writer, checkpoint, f"{prefix}.norm", "output_norm", F32)
        for layer in range(text["num_hidden_layers"]):
            for own, name in LAYER.items():
                kind = F32 if "norm" in own else Q4
                add(writer, checkpoint, f"{prefix}.layers.{layer}.{own}", f"blk.{layer}.{name}", kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def add(writer: Any, checkpoint: Checkpoint, own: str, name: str, kind: Any) -> None:
    shape = checkpoint.tensors[f"{own}.weight"].shape
    width = shape[-1] if len(shape) > 1 else 1
    values = checkpoint.rows(f"{own}.weight", 0, shape[0], width=width).astype(np.float32).reshape(shape)
    writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)


def add_tokenizer(writer: Any, tokenizer: dict[str, Any], size: int) -> None:
    names = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    tokens, types = [], []
    for number in range(size):
        tokens.append(special.get(number) or names.get(number) or f"[unused{number}]")
        kind = gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL
        types.append(kind if number in special or number in names else gguf.TokenType.UNUSED)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(next(number for number, token in special.items() if token == "<|im_end|>"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    write(arguments.checkpoint, arguments.target)


if __name__ == "__main__":
    main()
