"""GGUF files of tiny checkpoints, written by the package ``gguf`` with its names of tensors and its block formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "LlamaForCausalLM": "llama",
    "Qwen2VLForConditionalGeneration": "qwen2vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2vl",
    "Qwen3VLForConditionalGeneration": "qwen3vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3vlmoe",
}
"""Class in transformers → architecture in the metadata."""
K_TYPES = (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K)
"""The K-quants, whose blocks have sub-blocks with scales of their own."""


@dataclass
class Stored:
    """A tensor of a GGUF file: its type, its bytes, and the values that the package gguf computes from them."""

    kind: Type
    data: np.ndarray
    values: np.ndarray


Choose = Callable[[str, np.ndarray], Type]
"""Chooses the type of a tensor, given its name in the GGUF file and its values."""


def matrices_as(kind: Type) -> Choose:
    """Returns a function that chooses one type for matrices and F32 for all other tensors, as llama.cpp does."""
    return lambda name, values: kind if values.ndim > 1 and "ffn_gate_inp" not in name else Type.F32


def stored(values: np.ndarray, kind: Type, seed: int) -> Stored:
    """A tensor of the given type. The package gguf cannot write K-quants, so these are random blocks."""
    if kind in K_TYPES:
        data = random_blocks(kind, values.shape, seed)
    else:
        data = gguf.quantize(values.astype(np.float32), kind)
    return Stored(kind, data, np.asarray(gguf.dequantize(data, kind), np.float32).reshape(values.shape))


def random_blocks(kind: Type, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random blocks whose values have a spread of about 0.1."""
    random = np.random.default_rng(seed)
    per_block, octets = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // per_block, octets), np.uint8)
    levels = {Type.Q2_K: 15 * 3, Type.Q3_K: 32 * 4, Type.Q4_K: 63 * 15, Type.Q5_K: 63 * 31, Type.Q6_K: 128 * 32}
    places = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}
    for place in places[kind]:
        scale = random.uniform(0.1, 0.3, blocks.shape[:-1]) / levels[kind]
        scale *= levels[kind] / (2 * 15 if kind is Type.Q2_K else 2 * 63) if place == places[kind][-1] > 0 else 1
        blocks[..., place : place + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write(
    checkpoint: Path,
    path: Path,
    choose: Choose,
    change: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    *,
    pre: str = "qwen2",
) -> dict[str, np.ndarray]:
    """Writes a text decoder as a GGUF file.

    Args:
        checkpoint: folder of the checkpoint.
        path: path of the file.
        choose: chooses the type of each tensor.
        change: function that adds to the file's metadata.
        pre: name of the tokenizer's rules of pre-tokenization.

    Returns:
        The values of the tensors by their names in the checkpoint, with rows in the checkpoint's order.
    """
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    name, text = ARCHITECTURES[config["architectures"][0]], config.get("text_config", config)
    writer = gguf.GGUFWriter(path, name)
    _settings(writer, text)
    _tokenizer(writer, checkpoint, pre)
    tensors = _apart(
        {
            own.replace("model.language_model.", "model."): values.astype(np.float32)
            for own, values in load_file(checkpoint / "model.safetensors").items()
            if "visual." not in own
        }
    )
    change(writer)
    done: dict[str, np.ndarray] = {}
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[name], text["num_hidden_layers"])
    for number, (group, own) in enumerate(_groups(tensors, text).items()):
        new = names.get_name(group, try_suffixes=(".weight", ".bias"))
        assert new is not None, group
        values = np.stack([tensors[one] for one in own]) if ".experts." in group else tensors[own[0]]
        heads = text["num_attention_heads"] if "q_proj" in group else text.get("num_key_value_heads")
        turned = name == "llama" and group.split(".")[-2] in ("q_proj", "k_proj")
        if turned:
            values = _turned(values, heads or text["num_attention_heads"], 2)
        one = stored(values, choose(new, values), number)
        writer.add_tensor(new, one.data, raw_dtype=one.kind)
        back = _turned(one.values, heads or text["num_attention_heads"], -1) if turned else one.values
        done |= dict(zip(own, back, strict=True)) if ".experts." in group else {own[0]: back}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return done


def _apart(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with those that hold all experts of a layer, ``[experts, rows, columns]``, split by expert."""
    apart: dict[str, np.ndarray] = {}
    for own, values in tensors.items():
        stem, _, module = own.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        if not stem.endswith(".experts"):
            apart[own] = values
            continue
        for expert, matrix in enumerate(values):
            split = np.split(matrix, len(parts[module]))
            apart |= {f"{stem}.{expert}.{part}.weight": one for part, one in zip(parts[module], split, strict=True)}
    return apart


def _groups(tensors: Mapping[str, np.ndarray], text: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the checkpoint's tensors that become one tensor of the file, by a common name."""
    groups: dict[str, list[str]] = {}
    for own in tensors:
        before, _, after = own.partition(".experts.")
        group = f"{before}.experts.{after.partition('.')[2]}" if after else own
        groups.setdefault(group, []).append(own)
    for names in groups.values():
        names.sort(key=lambda one: int(one.partition(".experts.")[2].partition(".")[0] or 0))
    return groups


def _turned(values: np.ndarray, heads: int, first: int) -> np.ndarray:
    """Reorders the rows of each head from halves to alternating pairs, as llama.cpp stores Llama's.

    Args:
        values: the rows.
        heads: number of heads.
        first: 2 for the order of llama.cpp, -1 for the way back.
    """
    size = len(values) // heads
    split = (heads, 2, size // 2) if first == 2 else (heads, size // 2, 2)
    return values.reshape(*split, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _settings(writer: gguf.GGUFWriter, text: Mapping[str, Any]) -> None:
    """Writes the settings of a decoder into the metadata."""
    rope = text.get("rope_parameters") or {**(text.get("rope_scaling") or {}), "rope_theta": text["rope_theta"]}
    heads = text["num_attention_heads"]
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_key_length(text.get("head_dim") or text["hidden_size"] // heads)
    writer.add_value_length(text.get("head_dim") or text["hidden_size"] // heads)
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    experts = text.get("num_experts") or text.get("num_local_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(text["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(text, rope))


def _llama3_factors(text: Mapping[str, Any], rope: Mapping[str, Any]) -> np.ndarray:
    """The divisors of the rotary frequencies, computed from those of transformers."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**text)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rope["rope_theta"] ** (-np.arange(len(scaled)) / len(scaled))
    return (plain / scaled.numpy()).astype(np.float32)


def _tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, pre: str) -> None:
    """Writes the tokenizer and the chat template of a checkpoint into the metadata."""
    data = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    size = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    size = size.get("text_config", size)["vocab_size"]
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [gguf.TokenType.UNUSED] * size
    for token, number in data["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for one in data["added_tokens"]:
        tokens[one["id"]] = one["content"]
        kinds[one["id"]] = gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_eos_token_id(tokens.index(config["eos_token"]))
    writer.add_pad_token_id(tokens.index(config["pad_token"]))
    writer.add_add_bos_token(False)
    writer.add_chat_template((checkpoint / "chat_template.jinja").read_text(encoding="utf-8"))
