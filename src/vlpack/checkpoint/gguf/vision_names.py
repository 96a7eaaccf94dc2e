"""The names of a vision encoder's tensors in GGUF files and in Hugging Face checkpoints, and tensors in several parts.

llama.cpp stores the kernel of the patch embedding as one convolution for each frame, and the queries, keys and values
of Qwen2-VL and Qwen2.5-VL apart.

Source: ``gguf/tensor_mapping.py`` and ``gguf/constants.py`` of the package ``gguf`` 0.19; ``clip.cpp`` of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlpack.checkpoint.gguf.header import Entry

PREFIX = "model.visual"
"""Prefix of the vision encoder's tensors in Hugging Face checkpoints."""
TEXT = "model.language_model."
"""Prefix of the decoder's tensors in Hugging Face checkpoints of vision-language models, in place of ``model.``."""


@dataclass(frozen=True)
class Names:
    """The names of a family's modules: name in GGUF → name in Hugging Face checkpoints.

    Args:
        block: modules of a block.
        outside: modules outside of the blocks.
        legacy: whether old files have the names of the first and last feed-forward matrix interchanged.
    """

    block: Mapping[str, str]
    outside: Mapping[str, str]
    legacy: bool = False


_BLOCK = {"ln1": "norm1", "ln2": "norm2", "attn_qkv": "attn.qkv", "attn_out": "attn.proj"}
_MERGER = {"v.post_ln": "merger.ln_q", "mm.0": "merger.mlp.0", "mm.2": "merger.mlp.2"}
QWEN2 = Names(_BLOCK | {"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}, _MERGER, legacy=True)
QWEN2_5 = Names(
    _BLOCK | {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}, _MERGER, legacy=True
)
QWEN3 = Names(
    _BLOCK | {"ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2"},
    {
        "v.patch_embd": "patch_embed.proj",
        "v.position_embd": "pos_embed",
        "v.post_ln": "merger.norm",
        "mm.0": "merger.linear_fc1",
        "mm.2": "merger.linear_fc2",
    },
)

KERNELS = ("v.patch_embd.weight", "v.patch_embd.weight.1")
"""The convolutions of the patch embedding, one for each frame."""
KERNEL = f"{PREFIX}.patch_embed.proj.weight"
"""The kernel of the patch embedding in Hugging Face checkpoints, ``[out, channels, frames, height, width]``."""

_INSIDE = re.compile(r"v\.blk\.(?P<block>0|[1-9]\d{0,3})\.(?P<module>[a-z0-9_]+)\.(?P<kind>weight|bias)", re.ASCII)
_DEEPSTACK = re.compile(
    r"v\.deepstack\.(?P<block>0|[1-9]\d{0,3})\.(?P<module>norm|fc1|fc2)\.(?P<kind>weight|bias)", re.ASCII
)
_APART = ("attn_q", "attn_k", "attn_v")
_SWAPPED = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}


def deepstack_blocks(names: Iterable[str]) -> list[int]:
    """The blocks whose DeepStack merger has tensors, in order."""
    return sorted({int(found["block"]) for name in names if (found := _DEEPSTACK.fullmatch(name))})


def vision_names(entries: Mapping[str, Entry], names: Names) -> dict[str, list[str]]:
    """The tensors of a checkpoint: name in the checkpoint → names of the tensors in the file that are its parts.

    Tensors of unknown modules keep their names, so that they are reported as ones that the model has no place for.
    """
    levels = deepstack_blocks(entries)
    swapped = names.legacy and _interchanged(entries)
    found: dict[str, list[str]] = {}
    for name in entries:
        if name in KERNELS:
            found[KERNEL] = [kernel for kernel in KERNELS if kernel in entries]
        elif inside := _INSIDE.fullmatch(name):
            module, kind = inside["module"], inside["kind"]
            stem = f"{PREFIX}.blocks.{int(inside['block'])}"
            parts = [f"v.blk.{inside['block']}.{one}.{kind}" for one in _APART]
            if module in _APART and all(part in entries for part in parts):
                found[f"{stem}.attn.qkv.{kind}"] = parts
                continue
            new = names.block.get(_SWAPPED.get(module, module) if swapped else module)
            found.setdefault(name if new is None else f"{stem}.{new}.{kind}", []).append(name)
        elif deep := _DEEPSTACK.fullmatch(name):
            stem = f"{PREFIX}.deepstack_merger_list.{levels.index(int(deep['block']))}"
            module = "norm" if deep["module"] == "norm" else f"linear_{deep['module']}"
            found.setdefault(f"{stem}.{module}.{deep['kind']}", []).append(name)
        else:
            module, _, kind = name.rpartition(".")
            new = names.outside.get(module) if kind in ("weight", "bias") else None
            found.setdefault(name if new is None else f"{PREFIX}.{new}.{kind}", []).append(name)
    return found


def _interchanged(entries: Mapping[str, Entry]) -> bool:
    """Whether the matrix that should come last in a feed-forward module has the shape of the first one.

    The first converters of llama.cpp interchanged the names, and llama.cpp tells by the shape too.
    """
    last = entries.get("v.blk.0.ffn_down.weight")
    norm = entries.get("v.blk.0.ln1.weight")
    if last is None or norm is None or len(last.shape) != 2:
        return False
    return last.shape[1] == norm.shape[0] != last.shape[0]
