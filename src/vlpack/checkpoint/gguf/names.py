"""The names of a text decoder's tensors in GGUF files and in Hugging Face checkpoints, and the order of their rows.

Source: ``gguf/tensor_mapping.py`` and ``gguf/constants.py`` of the package ``gguf`` 0.19; for the rows of Llama's
queries and keys, ``LlamaTensorProcessor`` of transformers' ``modeling_gguf_pytorch_utils.py``.
"""

from __future__ import annotations

import re

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
"""Modules outside of the layers."""
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
"""Modules of a layer."""
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Matrices of all experts of a layer, one tensor ``[experts, rows, columns]`` for each."""
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with the divisors of the rotary frequencies, which a Hugging Face checkpoint has as settings."""
HEAD = "output.weight"
"""Tensor of the head; a model whose head is tied to the embedding has none."""

_NAME = re.compile(r"(?:blk\.(?P<layer>\d{1,4})\.)?(?P<module>[a-z_]+)\.(?P<kind>weight|bias)", re.ASCII)
_TURNED = ("attn_q", "attn_k")


def new_names(name: str, experts: int) -> list[str] | None:
    """The names of a tensor in a Hugging Face checkpoint: several if it holds several experts.

    Args:
        name: name of the tensor in the GGUF file.
        experts: size of its first axis, if it has three axes; otherwise 0.

    Returns:
        The names, in the order of their bytes; None if the tensor belongs to no module that is known.
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
    """The number of heads of a tensor whose rows are in llama.cpp's order for Llama; 0 for all other tensors.

    There, the rows of each query and key head alternate between its first and its second half, because rotary angles
    are applied to adjacent values. In Qwen's models they are in Hugging Face's order.
    """
    found = _NAME.fullmatch(name)
    if architecture != "llama" or found is None or found["module"] not in _TURNED:
        return 0
    return heads if found["module"] == "attn_q" else kv_heads
