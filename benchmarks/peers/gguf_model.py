"""Writes the text decoder of a Qwen3-VL, Qwen3 or Qwen2 checkpoint as a GGUF file in Q4_0, Q8_0 or F32, for llama.cpp.

In Q4_0 files the embedding, which is also the head if they are tied, is Q8_0, because vlpack's has 8 bits. For text,
where the three axes of M-RoPE are equal, the decoder of Qwen3-VL equals Qwen3's. F32 files are the input of llama.cpp's
own quantization tool.

Usage: python benchmarks/peers/gguf_model.py CHECKPOINT FILE.gguf [--kind q4_0|q8_0|f32] [--pre-tokenizer qwen2]
Needs: pip install gguf (version 0.19 was used)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from vlpack.checkpoint.checkpoint import Checkpoint

Q4, Q8, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "F32"))
KINDS = {
    "q4_0": (Q4, Q8, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q8_0": (Q8, Q8, gguf.LlamaFileType.MOSTLY_Q8_0),
    "f32": (F32, F32, gguf.LlamaFileType.ALL_F32),
}
"""The types of the matrices and of the embedding and head, and the type that the file says it has."""
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
"""GGUF names by the names in the checkpoint; an architecture has only some of the norms and biases."""


def write(source: Path, target: Path, *, kind: str = "q4_0", pre_tokenizer: str = "qwen2") -> None:
    matrices, table, file_type = KINDS[kind]
    with Checkpoint.open(source) as checkpoint:
        text = checkpoint.config.get("text_config", checkpoint.config)
        biases = checkpoint.config["model_type"] == "qwen2"
        writer = gguf.GGUFWriter(target, "qwen2" if biases else "qwen3")
        rope = text.get("rope_parameters") or text
        writer.add_context_length(text["max_position_embeddings"])
        writer.add_embedding_length(text["hidden_size"])
        writer.add_block_count(text["num_hidden_layers"])
        writer.add_feed_forward_length(text["intermediate_size"])
        writer.add_head_count(text["num_attention_heads"])
        writer.add_head_count_kv(text["num_key_value_heads"])
        head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
        writer.add_file_type(file_type)
        tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        add_tokenizer(writer, tokenizer, text["vocab_size"], pre_tokenizer)
        prefix = "model.language_model" if "text_config" in checkpoint.config else "model"
        add(writer, checkpoint, f"{prefix}.embed_tokens", "token_embd", table)
        if "lm_head.weight" in checkpoint.tensors:
            add(writer, checkpoint, "lm_head", "output", table)
        add(writer, checkpoint, f"{prefix}.norm", "output_norm", F32)
        for layer in range(text["num_hidden_layers"]):
            for own, name in LAYER.items():
                module = f"{prefix}.layers.{layer}.{own}"
                if f"{module}.weight" in checkpoint.tensors:
                    add(writer, checkpoint, module, f"blk.{layer}.{name}", F32 if "norm" in own else matrices)
                if biases and f"{module}.bias" in checkpoint.tensors:
                    add(writer, checkpoint, module, f"blk.{layer}.{name}", F32, "bias")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def add(writer: Any, checkpoint: Checkpoint, own: str, name: str, kind: Any, part: str = "weight") -> None:
    shape = checkpoint.tensors[f"{own}.{part}"].shape
    width = shape[-1] if len(shape) > 1 else 1
    values = checkpoint.rows(f"{own}.{part}", 0, shape[0], width=width).astype(np.float32).reshape(shape)
    writer.add_tensor(f"{name}.{part}", gguf.quants.quantize(values, kind), raw_dtype=kind)


def add_tokenizer(writer: Any, tokenizer: dict[str, Any], size: int, pre: str) -> None:
    names = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    tokens, types = [], []
    for number in range(size):
        tokens.append(special.get(number) or names.get(number) or f"[unused{number}]")
        kind = gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL
        types.append(kind if number in special or number in names else gguf.TokenType.UNUSED)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(next(number for number, token in special.items() if token == "<|im_end|>"))
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="q4_0")
    parser.add_argument("--pre-tokenizer", default="qwen2", help="llama.cpp's name of how text is split into words")
    given = parser.parse_args()
    write(given.checkpoint, given.target, kind=given.kind, pre_tokenizer=given.pre_tokenizer)


if __name__ == "__main__":
    main()
