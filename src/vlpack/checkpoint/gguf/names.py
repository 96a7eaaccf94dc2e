"""The names of a text decoder's tensors in GGUF files and in Hugging Face checkpoints, and the order of their rows.

Source: ``gguf/tensor_mapping.py`` and ``gguf/constants.py`` of the package ``gguf`` 0.19; for the rows of Llama's
queries and keys, ``LlamaTensorProcessor`` of transformers' ``modeling_gguf_pytorch_utils.py``.
"""

from __future__ import annotations

import re

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
"""Modules outside of the layers: name in GGUF → name in Hugging Face checkpoints."""
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
"""Modules of a layer: name in GGUF → name in Hugging Face checkpoints."""
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Matrices of experts: name in GGUF, of one tensor ``[experts, rows, columns]`` → name in Hugging Face checkpoints."""
ROPE_FACTORS = "rope_freqs.weight"
"""Name of the tensor with the divisors of the rotary frequencies; Hugging Face checkpoints have settings instead."""
HEAD = "output.weight"
"""Name of the head's tensor; a model whose head is tied to the embedding has none."""

_NAME = re.compile(r"(?:blk\.(?P<layer>\d{1,4})\.)?(?P<module>[a-z_]+)\.(?P<kind>weight|bias)", re.ASCII)
_TURNED = ("attn_q", "attn_k")
"""Modules of Llama whose rows llama.cpp stores in another order."""


def new_names(name: str, experts: int) -> list[str] | None:
    """The names of a tensor in a Hugging Face checkpoint: one, or one for each expert that it holds.

    Args:
        name: name of the tensor in the GGUF file.
        experts: size of its first axis, if it has three axes; otherwise 0.

    Returns:
        The names, in the order of their bytes; None if the tensor belongs to no known module.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    layer, module, kind = found["layer"], found["module"], found["kind"]
    if layer is None:
        return [f"{OUTSIDE[module]}.{kind}"] if module in OUTSIDE and not experts else None
    stem = f"model.layers.{int(layer)}"
    if module in EXPERTS and experts:
        return [f"{stem}.mlp.experts.{expert}.{EXPERTS[module]}.{kind}" for expert in range(experts)]
    return [f"{stem}.{INSIDE[module]}.{kind}"] if module in INSIDE and not experts else None


def turned_heads(architecture: str, name: str, heads: int, kv_heads: int) -> int:
    """The number of heads of a tensor whose rows llama.cpp stores in its own order; 0 for all other tensors.

    The rows of Llama's query and key heads alternate between the first and the second half of the head, because
    llama.cpp rotates pairs of adjacent values. Other models have Hugging Face's order.

    Args:
        architecture: architecture in the metadata.
        name: name of the tensor in the GGUF file.
        heads: number of query heads.
        kv_heads: number of key/value heads.
    """
    found = _NAME.fullmatch(name)
    if architecture != "llama" or found is None or found["module"] not in _TURNED:
        return 0
    return heads if found["module"] == "attn_q" else kv_heads
