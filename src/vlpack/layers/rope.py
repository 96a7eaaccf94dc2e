"""Rotary position embedding, with one formula for all models: ``angle[s, f] = position[axis_of[f], s] · inv_freq[f]``.

``axis_of`` selects the axis of the positions (time, height or width) that frequency ``f`` uses: always 0 in text
models, runs of t, h and w in Qwen2.x-VL (chunked), and t h w t h w … in Qwen3-VL (interleaved). Sources: Su et al. 2021
(arXiv:2104.09864); Qwen2-VL (arXiv:2409.12191); transformers' ``Qwen3VLTextRotaryEmbedding``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from vlpack.checkpoint.config import Section
from vlpack.errors import CheckpointError
from vlpack.layers import ops


class Rope(NamedTuple):
    """Rotary angles in the form that the fused operator takes: tables with one row per token, and each token's row."""

    cos: ir.Value  # [B · S, D / 2]
    sin: ir.Value  # [B · S, D / 2]
    rows: ir.Value  # int64 [B, S]
    channels: int = 0  # number of channels of each head that are rotated, the first ones; 0 for all


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """The inverse frequencies ``theta ** (-2 i / dim)`` for i < dim / 2, float32 [dim / 2]."""
    # the exponent is rounded to fp32 first, as in torch
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies: np.ndarray = (1.0 / np.float32(theta) ** exponent).astype(np.float32)
    return frequencies


def interleaved_axes(sections: Sequence[int]) -> np.ndarray:
    """The position axis of each frequency in Qwen3-VL: t h w t h w …, then only t once h and w are used up."""
    axes = np.zeros(sum(sections), np.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def chunked_axes(sections: Sequence[int]) -> np.ndarray:
    """The position axis of each frequency in Qwen2-VL and Qwen2.5-VL: runs of t, h and w."""
    return np.repeat(np.arange(len(sections)), sections)


class Frequencies(NamedTuple):
    """The frequencies of a rotary embedding: the constants that turn positions into angles."""

    inverse: np.ndarray  # float32 [D / 2]: the inverse frequencies
    axis_of: np.ndarray  # int64 [D / 2]: the position axis that each frequency uses
    scaling: float  # factor of cosine and sine; 1 except in YaRN
    partial: bool = False  # whether a head has more channels than are rotated

    @property
    def channels(self) -> int:
        """The number of channels of each head that are rotated; 0 for all."""
        return 2 * len(self.inverse) if self.partial else 0


MropeLayout = Callable[[Sequence[int]], np.ndarray]
"""Maps M-RoPE's sections (number of frequencies of t, h and w) to the position axis of each frequency."""


def read_frequencies(
    text: Section,
    head_dim: int,
    theta: float,
    mrope_layout: MropeLayout | None,
    sections: Sequence[int],
    share: float | None = None,
) -> Frequencies:
    """Read the rotary settings of a config, ``rope_parameters`` (transformers 5) or ``rope_scaling`` (4).

    Args:
        text: the decoder's part of the config.
        head_dim: channels of each attention head.
        theta: theta for a config without one.
        mrope_layout: how M-RoPE's axes share the frequencies; None for plain positions.
        sections: M-RoPE's sections for a config without them.
        share: share of a head's channels that are rotated (``partial_rotary_factor``) for a config without one; None
            for families that always rotate all.

    Raises:
        CheckpointError: the kind of scaling is not supported, or the sections do not fit.
    """
    both = [text.values.get(name) for name in ("rope_parameters", "rope_scaling")]
    if None not in both and both[0] != both[1]:  # releases of transformers disagree on which counts
        raise CheckpointError(
            f"{text.where}: rope_parameters and rope_scaling are both there and differ.", "Keep only the correct one."
        )
    rope = text.section("rope_parameters" if "rope_parameters" in text else "rope_scaling", required=False)
    theta = rope.number("rope_theta", text.number("rope_theta", theta))
    rotated, where = head_dim, f"head_dim ({head_dim})"
    if share is not None:
        name = "partial_rotary_factor"
        share = rope.number(name, text.number(name, share))
        rope, text = rope.without(name), text.without(name)  # the scalings refuse it, and count rotated channels only
        rotated, where = int(head_dim * share), f"the {int(head_dim * share)} channels that rotate"
        if not 0 < rotated <= head_dim or rotated % 2:
            raise CheckpointError(
                f"{rope.where}: {name} is {share:g}, so that {rotated} of {head_dim} channels would rotate; it must be "
                "an even number of them."
            )
    axis_of = np.zeros(rotated // 2, np.int64)
    if mrope_layout is not None:
        sections = rope.integers("mrope_section", sections)
        if len(sections) != 3 or sum(sections) != rotated // 2:
            raise CheckpointError(
                f"{rope.where}: mrope_section {list(sections)} must be three numbers whose sum is half of {where}."
            )
        axis_of = mrope_layout(sections)
    inverse, scaling = _inverse_and_scaling(rope, text, rotated, theta)
    return Frequencies(inverse, axis_of, scaling, rotated < head_dim)


def _inverse_and_scaling(rope: Section, text: Section, head_dim: int, theta: float) -> tuple[np.ndarray, float]:
    """Inverse frequencies, and the factor of cosine and sine, of the kind of scaling that the settings name."""
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind in ("default", "mrope"):  # the first Qwen2-VL checkpoints call plain M-RoPE "mrope"
        return inverse_frequencies(head_dim, theta), 1.0
    if kind == "yarn":
        return _yarn(rope, text, head_dim, theta)
    if kind == "llama3":
        return _llama3(rope, text, head_dim, theta), 1.0
    raise CheckpointError(
        f"{rope.where}: rope_type '{kind}' is not supported; vlpack would compute wrong positions.",
        "Supported: default, yarn and llama3.",
    )


def angles_from_positions(op: OpBuilder, position_ids: ir.Value, frequencies: Frequencies) -> Rope:
    """The rotary angles of ``position_ids`` int64 [axes, B, S] or [B, S]."""
    positions = ops.cast(op, position_ids, ops.FLOAT)
    if len(ops.shape_of(position_ids)) == 2:
        positions = op.Unsqueeze(positions, [2])  # [B, S, 1]
    else:
        by_frequency = op.Gather(positions, ops.constant(op, frequencies.axis_of, np.int64), axis=0)  # [D/2, B, S]
        positions = op.Transpose(by_frequency, perm=[1, 2, 0])
    angles = op.Mul(positions, ops.constant(op, frequencies.inverse))  # [B, S, D/2]
    shape = op.Shape(position_ids, start=-2)  # B, S
    count = op.ReduceProd(shape, keepdims=0)
    rows = ops.typed(op.Reshape(op.Range(0, count, 1), shape), ops.INT64, ["batch_size", "sequence_length"])
    rope = tables(op, op.Reshape(angles, [-1, len(frequencies.inverse)]), rows, frequencies.scaling)
    return rope._replace(channels=frequencies.channels)


def _yarn(rope: Section, text: Section, head_dim: int, theta: float) -> tuple[np.ndarray, float]:
    """Inverse frequencies and scaling of YaRN (Peng et al. 2023, arXiv:2309.00071).

    Slow frequencies are interpolated and fast ones kept, with a linear ramp between them. Source:
    ``_compute_yarn_parameters`` of transformers' ``modeling_rope_utils.py``.
    """
    trained, factor = _trained_length(rope, text), rope.number("factor")
    _refuse(("mscale", "mscale_all_dim", "partial_rotary_factor"), rope, text)

    def dimension(rotations: float) -> float:
        """The index of the frequency that makes the given number of rotations over the trained length."""
        return head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.number("beta_fast", 32.0)), dimension(rope.number("beta_slow", 1.0))
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    steps = np.arange(head_dim // 2, dtype=np.float32)
    slope = high - low or 0.001  # negative if beta_fast is less than beta_slow, as in transformers
    ramp = np.clip((steps - np.float32(low)) / np.float32(slope), 0, 1)
    kept = inverse_frequencies(head_dim, theta)
    inverse = (kept / np.float32(factor) * ramp + kept * (1 - ramp)).astype(np.float32)
    scaling = rope.number("attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return inverse, scaling


def _llama3(rope: Section, text: Section, head_dim: int, theta: float) -> np.ndarray:
    """Inverse frequencies with the scaling of Llama 3.1.

    Frequencies of long waves are divided by a factor and those of short waves are kept, with a linear ramp between.
    Source: ``_compute_llama3_parameters`` of transformers' ``modeling_rope_utils.py``.
    """
    _refuse(("partial_rotary_factor",), rope, text)
    trained, factor = _trained_length(rope, text), rope.number("factor")
    slow, fast = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if fast <= slow:
        raise CheckpointError(f"{rope.where}: high_freq_factor {fast:g} must be above low_freq_factor {slow:g}.")
    kept = inverse_frequencies(head_dim, theta)
    turns = np.float32(trained) * kept / np.float32(2 * math.pi)  # rotations over the trained length
    smooth = np.clip((turns - np.float32(slow)) / np.float32(fast - slow), 0, 1)
    inverse: np.ndarray = ((1 - smooth) * kept / np.float32(factor) + smooth * kept).astype(np.float32)
    return inverse


def _trained_length(rope: Section, text: Section) -> float:
    """The number of positions that the model was trained on.

    The decoder's own setting overrides the one in the rotary settings.
    """
    name = "original_max_position_embeddings"
    return (text if name in text else rope).number(name, text.integer("max_position_embeddings", 32768))


def _refuse(names: Sequence[str], *places: Section) -> None:
    """Raises a CheckpointError if one of the places has a setting that is not supported."""
    for name in names:
        for place in places:
            if name in place:
                raise CheckpointError(f"{place.where}: '{name}' is not supported.")


def tables(op: OpBuilder, angles: ir.Value, rows: ir.Value, scaling: float = 1.0) -> Rope:
    """The rotary tables of ``angles`` [rows, D / 2]: cosine and sine in fp32, multiplied by ``scaling``."""
    cos, sin = op.Cos(angles), op.Sin(angles)
    if scaling != 1.0:
        cos, sin = op.Mul(cos, scaling), op.Mul(sin, scaling)
    return Rope(cos, sin, rows)
