"""Makes checkpoints resemble larger trained models without a change of the function: permutation and planted outliers.

All functions take and return numpy arrays of floats by their Hugging Face tensor names, and do not change their input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

Tensors = dict[str, np.ndarray]

READERS = {
    "input_layernorm": (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_a"),
        *("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
    ),
    "post_attention_layernorm": (
        *("mlp.gate_proj", "mlp.up_proj", "mlp.gate"),
        *("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"),
    ),
    "norm1": ("attn.qkv",),
    "norm2": ("mlp.linear_fc1", "mlp.fc1", "mlp.gate_proj", "mlp.up_proj"),
    "norm": ("linear_fc1",),
    "ln_q": ("mlp.0",),
}
"""The modules that read a norm's output, by the norm's name; each family has some of them."""

LAYER = re.compile(r"(?:layers|blocks)\.(\d+)\.")


def permute(tensors: Mapping[str, np.ndarray], seed: int) -> Tensors:
    """Permutes the hidden and intermediate channels of a text model without experts at random.

    Dequantized weights lie on the grid of their publisher's blocks; after the permutation, no block does.
    """
    changed, random = dict(tensors), np.random.default_rng(seed)
    table = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    hidden = random.permutation(tensors[table].shape[1])
    inner: dict[str, np.ndarray] = {}
    for name in sorted(tensors):
        values, own = tensors[name], name.rpartition(".")[0].rpartition(".")[2]
        if own.endswith("layernorm") or own == "norm":
            values = values[hidden]
        elif own in ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            values = values[:, hidden] if values.ndim > 1 else values
        elif own in ("o_proj", "down_proj"):
            values = values[hidden]
        if own in ("gate_proj", "up_proj", "down_proj") and (own != "down_proj" or values.ndim > 1):
            layer = name[: name.index("mlp.")]
            size = values.shape[1] if own == "down_proj" else values.shape[0]
            order = inner.setdefault(layer, random.permutation(size))
            values = values[:, order] if own == "down_proj" else values[order]
        changed[name] = np.ascontiguousarray(values)
    return changed


def plant(
    tensors: Mapping[str, np.ndarray],
    layers: int,
    channels: int = 6,
    low: float = 10,
    high: float = 60,
    rows: int = 8,
    seed: int = 1,
) -> Tensors:
    """Plants outliers in the outputs of norms and of up_proj.

    Args:
        tensors: tensors of a decoder, a vision encoder or both.
        layers: number of layers, from the first on, that get outliers; norms outside of layers get them too if modules
            other than the head read their output.
        channels: number of channels of every norm that are multiplied by ``low`` to ``high``; the columns of the
            modules that read them are divided by the same factors.
        low: smallest factor.
        high: largest factor.
        rows: number of rows of every up_proj that are multiplied; down_proj's columns are divided by the same factors.
        seed: seed of the choice of channels and factors.
    """
    changed, random = dict(tensors), np.random.default_rng(seed)
    offset = float(any("linear_attn." in name for name in tensors))  # these store norms as differences from 1

    def factors(size: int, count: int) -> np.ndarray:
        chosen = random.permutation(size)[:count]
        values = np.ones(size, np.float32)
        values[chosen] = random.uniform(low, high, len(chosen))
        return values

    def multiply(name: str, by: np.ndarray, axis: int) -> None:
        values = changed[name]
        by = np.tile(by, values.shape[axis] // len(by))  # merged patches contain a norm's channels several times
        by = by.reshape([-1 if place == axis % values.ndim else 1 for place in range(values.ndim)])
        changed[name] = (values * by).astype(values.dtype)

    for name in sorted(tensors):
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        layer = LAYER.search(name)
        if not name.endswith(".weight") or (layer and int(layer[1]) >= layers):
            continue
        readers = list(_readers(tensors, parent, own))
        if readers:
            by = factors(len(tensors[name]), channels)
            if offset and own.endswith("layernorm"):
                changed[name] = ((changed[name] + offset) * by - offset).astype(changed[name].dtype)
            else:
                multiply(name, by, 0)
            if f"{parent}.{own}.bias" in tensors:
                multiply(f"{parent}.{own}.bias", by, 0)
            for reader, axis in readers:
                multiply(reader, 1 / by, axis)
        elif own == "up_proj" and tensors[name].ndim == 2 and ".experts." not in name:
            by = factors(len(tensors[name]), rows)
            for written in (name, f"{parent}.{own}.bias"):
                if written in tensors:
                    multiply(written, by, 0)
            multiply(f"{parent}.down_proj.weight", 1 / by, 1)
    return changed


def plant_values(
    tensors: Mapping[str, np.ndarray], size: int, channels: int = 3, low: float = 10, high: float = 60, seed: int = 1
) -> Tensors:
    """Plants outliers in the values of the decoder's attention heads of ``size``: v_proj grows, o_proj shrinks."""
    changed, random = dict(tensors), np.random.default_rng(seed)
    for name in sorted(tensors):
        if not name.endswith("self_attn.v_proj.weight"):
            continue
        bias, output = name.replace("weight", "bias"), name.replace("v_proj", "o_proj")
        by = np.ones(len(tensors[name]), np.float32)
        by[random.permutation(len(by))[:channels]] = random.uniform(low, high, channels)
        changed[name] = tensors[name] * by[:, None]
        if bias in tensors:
            changed[bias] = tensors[bias] * by
        heads = by.reshape(-1, 1, size)
        group = tensors[output].shape[1] // len(by)
        changed[output] = tensors[output] / np.tile(heads, (1, group, 1)).reshape(1, -1)
    return changed


def _readers(tensors: Mapping[str, np.ndarray], parent: str, norm: str) -> Iterator[tuple[str, int]]:
    """The tensors that read a norm's output, each with the axis of its input channels."""
    for reader in READERS.get(norm, ()):
        if f"{parent}.{reader}.weight" in tensors:
            yield f"{parent}.{reader}.weight", 1
    if norm == "post_attention_layernorm":
        for name in tensors:
            if re.fullmatch(rf"{re.escape(parent)}\.mlp\.experts\.\d+\.(gate|up)_proj\.weight", name):
                yield name, 1
        if f"{parent}.mlp.experts.gate_up_proj" in tensors:
            # [E, 2 · I, H], or transposed: [E, H, 2 · I]; down_proj has I instead of 2 · I
            shape = tensors[f"{parent}.mlp.experts.down_proj"].shape
            hidden = len(tensors[f"{parent}.{norm}.weight"])
            yield f"{parent}.mlp.experts.gate_up_proj", 2 if shape[1] == hidden else 1
