"""Writes the text decoder of a Qwen checkpoint as a GGUF file in Q4_0, Q8_0 or F32, for llama.cpp.

Takes Qwen3-VL, Qwen3, Qwen2, and Qwen3.5 with as many key heads as value heads in linear attention; with fewer, ggml
wants the value heads in another order, which is not implemented here.

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
HYBRID_LAYER = {
    **LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
"""GGUF names of a layer of Qwen3.5, without the tensors that `add_recurrence` writes."""


def write(source: Path, target: Path, *, kind: str = "q4_0", pre_tokenizer: str = "qwen2") -> None:
    matrices, table, file_type = KINDS[kind]
    with Checkpoint.open(source) as checkpoint:
        text = checkpoint.config.get("text_config", checkpoint.config)
        biases = checkpoint.config["model_type"] == "qwen2"
        hybrid = checkpoint.config["model_type"].startswith("qwen3_5")
        writer = gguf.GGUFWriter(target, "qwen35" if hybrid else "qwen2" if biases else "qwen3")
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
        if hybrid:
            writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
            writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
            add_linear_attention(writer, text)
        writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
        writer.add_file_type(file_type)
        tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        add_tokenizer(writer, tokenizer, text["vocab_size"], pre_tokenizer)
        prefix = "model.language_model" if "text_config" in checkpoint.config else "model"
        add(writer, checkpoint, f"{prefix}.embed_tokens", "token_embd", table)
        if "lm_head.weight" in checkpoint.tensors:
            add(writer, checkpoint, "lm_head", "output", table)
        offset = 1.0 if hybrid else 0.0  # Qwen3.5 multiplies by 1 + w, except in the gated norm
        add(writer, checkpoint, f"{prefix}.norm", "output_norm", F32, offset=offset)
        for layer in range(text["num_hidden_layers"]):
            if f"{prefix}.layers.{layer}.linear_attn.A_log" in checkpoint.tensors:
                add_recurrence(writer, checkpoint, f"{prefix}.layers.{layer}.linear_attn", f"blk.{layer}")
            for own, name in (HYBRID_LAYER if hybrid else LAYER).items():
                module = f"{prefix}.layers.{layer}.{own}"
                if f"{module}.weight" in checkpoint.tensors:
                    norm = "norm" in own
                    plus = offset if norm and own != "linear_attn.norm" else 0.0
                    add(writer, checkpoint, module, f"blk.{layer}.{name}", F32 if norm else matrices, offset=plus)
                if biases and f"{module}.bias" in checkpoint.tensors:
                    add(writer, checkpoint, module, f"blk.{layer}.{name}", F32, "bias")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor of the checkpoint as fp32."""
    shape = checkpoint.tensors[name].shape
    width = shape[-1] if len(shape) > 1 else 1
    values: np.ndarray = checkpoint.rows(name, 0, shape[0], width=width).astype(np.float32).reshape(shape)
    return values


def add(
    writer: Any, checkpoint: Checkpoint, own: str, name: str, kind: Any, part: str = "weight", offset: float = 0.0
) -> None:
    values = read(checkpoint, f"{own}.{part}") + np.float32(offset)
    writer.add_tensor(f"{name}.{part}", gguf.quants.quantize(values, kind), raw_dtype=kind)


def add_linear_attention(writer: Any, text: dict[str, Any]) -> None:
    """Writes the sizes of linear attention, under the names that llama.cpp has for state space models."""
    keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
    if keys != values:
        raise SystemExit("Only models with as many key heads as value heads in linear attention are implemented.")
    writer.add_ssm_conv_kernel(text.get("linear_conv_kernel_dim", 4))
    writer.add_ssm_state_size(text.get("linear_key_head_dim", 128))
    writer.add_ssm_group_count(keys)
    writer.add_ssm_time_step_rank(values)
    writer.add_ssm_inner_size(values * text.get("linear_value_head_dim", 128))
    writer.add_full_attention_interval(text.get("full_attention_interval", 4))


def add_recurrence(writer: Any, checkpoint: Checkpoint, module: str, block: str) -> None:
    """Writes the tensors of a linear-attention layer that are not matrices: decay, bias of the steps, convolution."""
    writer.add_tensor(f"{block}.ssm_a", -np.exp(read(checkpoint, f"{module}.A_log")), raw_dtype=F32)
    writer.add_tensor(f"{block}.ssm_dt.bias", read(checkpoint, f"{module}.dt_bias"), raw_dtype=F32)
    kernel = read(checkpoint, f"{module}.conv1d.weight")
    writer.add_tensor(f"{block}.ssm_conv1d.weight", kernel.reshape(len(kernel), -1), raw_dtype=F32)


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
