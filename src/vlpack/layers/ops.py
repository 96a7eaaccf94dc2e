"""ONNX Runtime's fused operators and a few idioms, with the output types and shapes that ONNX cannot infer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from vlpack.quantize.channels import ZERO_POINT
from vlpack.quantize.storage import Blocks, ChannelInt8, Float, Storage

FLOAT = ir.DataType.FLOAT
INT32 = ir.DataType.INT32
INT64 = ir.DataType.INT64


def typed(value: ir.Value, dtype: ir.DataType, shape: Sequence[Any] | ir.Shape) -> ir.Value:
    """Set the dtype and shape of ``value``, the output of an operator whose schema ONNX does not know; returns it."""
    value.dtype, value.shape = dtype, ir.Shape(shape)
    return value


def dtype_of(value: ir.Value) -> ir.DataType:
    """The dtype of ``value``, which the builder inferred or `typed` set."""
    assert value.dtype is not None, f"the dtype of {value.name} is not known"
    return value.dtype


def shape_of(value: ir.Value) -> ir.Shape:
    """The shape of ``value``, which the builder inferred or `typed` set."""
    assert value.shape is not None, f"the shape of {value.name} is not known"
    return value.shape


def last_dim(value: ir.Value, size: int) -> list[Any]:
    """The shape of ``value`` with its last dimension replaced by ``size``."""
    return [*shape_of(value)[:-1], size]


def cast(op: OpBuilder, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Cast ``x`` to ``dtype``; writes no node if it already has that dtype."""
    return x if x.dtype == dtype else op.Cast(x, to=dtype)


def constant(op: OpBuilder, array: Any, dtype: Any = np.float32) -> ir.Value:
    """A small array as an initializer in the graph file; equal scalars share one, so that equal nodes can be merged."""
    values = np.asarray(array, dtype)
    initializers = op.builder.root.graph.initializers
    name = f"const_{values.dtype}_{values}" if values.ndim == 0 else f"const_{len(initializers)}"
    if name in initializers:
        return initializers[name]
    return op.builder.root.initializer(ir.tensor(values), name, qualify=False)


def named_constant(op: OpBuilder, name: str, array: Any) -> ir.Value:
    """An array as an initializer with a given name, shared by all nodes that use it."""
    initializers = op.builder.root.graph.initializers
    if name in initializers:
        return initializers[name]
    return op.builder.root.initializer(ir.tensor(array), name, qualify=False)


def microsoft(op: OpBuilder) -> OpBuilder:
    """The builder for onnxruntime's own operators (domain com.microsoft)."""
    return op.builder.opset("com.microsoft", 1)


def mat_mul_n_bits(
    op: OpBuilder, x: ir.Value, weight: Sequence[ir.Value], rows: int, cols: int, storage: Blocks
) -> ir.Value:
    """Multiply ``x [.., cols] → [.., rows]`` by block-quantized weights (qweight, scales and perhaps zero points)."""
    # only the CPU's fp32 kernels know the attribute
    level = {"accuracy_level": storage.accuracy_level} if x.dtype == FLOAT else {}
    bits, block_size = storage.bits, storage.block_size
    y = microsoft(op).MatMulNBits(x, *weight, K=cols, N=rows, bits=bits, block_size=block_size, **level)
    return typed(y, dtype_of(x), last_dim(x, rows))


def divide_by_peak(op: OpBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Divide every row of fp32 ``x [.., cols]`` by its largest magnitude.

    Returns:
        the divided rows, and the magnitudes ``[.., 1]`` to multiply back with.
    """
    # the addend keeps rows of zeros from dividing by 0 and is lost to rounding in all others; WebGPU has no Max
    peak = op.Add(op.ReduceMax(op.Abs(x), [-1], keepdims=1), 1e-20)
    return op.Div(x, peak), peak


def integer_mat_mul(
    op: OpBuilder, x: ir.Value, weight: Sequence[ir.Value], rows: int, storage: ChannelInt8
) -> ir.Value:
    """Multiply ``x [.., cols] → [.., rows]`` in 8 bits: weights quantized per channel, activations **per row**.

    Every row of ``x`` is divided by its largest magnitude and rounded to 255 steps of -1 … 1, so that the rounding of a
    token does not depend on the other tokens. DynamicQuantizeMatMul, with one range for all of ``x``, lacks that
    property. If several matrices multiply the same ``x``, onnxruntime merges the nodes that they have in common.
    """
    qweight, scales = weight
    divided, peak = divide_by_peak(op, x)
    step, zero = constant(op, 1 / 127), constant(op, ZERO_POINT, np.uint8)
    codes = op.QuantizeLinear(divided, step, zero)
    zeros = [zero] if storage.signed else [zero, zero]
    y = microsoft(op).MatMulIntegerToFloat(codes, qweight, step, scales, *zeros)
    return op.Mul(typed(y, FLOAT, last_dim(x, rows)), peak)


def gather_block_quantized(
    op: OpBuilder, ids: ir.Value, weight: Sequence[ir.Value], cols: int, storage: Blocks
) -> ir.Value:
    """Look up the rows ``ids`` of a block-quantized table [rows, cols], dequantized: [*ids.shape, cols]."""
    qweight, scales, *zero_points = weight
    y = microsoft(op).GatherBlockQuantized(
        qweight,
        ids,
        scales,
        *zero_points,
        bits=storage.bits,
        block_size=storage.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    padded = shape_of(scales)[-1] * storage.block_size
    y = typed(y, dtype_of(scales), [*shape_of(ids), padded])
    if padded == cols:
        return y
    # a row's last block is padded with zeros; MatMulNBits leaves them out by its attribute K, this operator does not
    return typed(op.Slice(y, [0], [cols], [-1]), dtype_of(scales), [*shape_of(ids), cols])


def experts(
    op: OpBuilder,
    x: ir.Value,
    logits: ir.Value,
    gate_up: Sequence[ir.Value],
    down: Sequence[ir.Value],
    storages: tuple[Storage | None, Storage | None],
    k: int,
    normalize: bool,
) -> ir.Value:
    """SwiGLU experts on ``x [B, S, H]``: each token goes through the ``k`` experts with the largest router logits.

    The experts' outputs are weighted by the softmax of the logits over all experts; with ``normalize``, the weights of
    the chosen experts are scaled to sum to 1. Rows of ``gate_up`` alternate between gate and up.

    Args:
        op: the graph under construction.
        x: input in the weights' dtype, or in the dtype of the scales if the weights are quantized.
        logits: router logits ``[B · S, E]`` in fp32.
        gate_up: arrays that store the gate and up weights ``[E, 2 · I, H]``.
        down: arrays that store the down weights ``[E, H, I]``.
        storages: storages of ``gate_up`` and ``down``.
        k: number of experts per token.
        normalize: whether the weights of the chosen experts sum to 1.
    """
    dtype = dtype_of(x)
    options = {"k": k, "normalize_routing_weights": int(normalize), "activation_type": "swiglu", "swiglu_fusion": 1}
    options |= {"activation_alpha": 1.0, "activation_beta": 0.0}
    match storages:
        case Float(), Float():
            # onnxruntime 1.31's MoE returns zeros in fp16 unless it normalizes the shares to sum to 1
            scaled = dtype != FLOAT and not normalize
            options["normalize_routing_weights"] = int(normalize or scaled)
            y = microsoft(op).MoE(x, cast(op, logits, dtype), gate_up[0], None, down[0], **options)
            if scaled:
                chosen, _ = op.TopK(op.Softmax(logits, axis=-1), [k], _outputs=2)  # [B · S, k]
                total = op.Reshape(op.ReduceSum(chosen, [-1]), op.Concat(op.Shape(x, end=-1), [1], axis=0))
                return op.Mul(cast(op, typed(y, dtype, shape_of(x)), FLOAT), total)
        case Blocks() as first, Blocks() as second:
            options |= {"expert_weight_bits": first.bits, "block_size": first.block_size, "weights_prepacked": 0}
            if dtype == FLOAT:
                options["accuracy_level"] = first.accuracy_level
            zeros = [
                None if storage.symmetric else part[2]
                for storage, part in zip((first, second), (gate_up, down), strict=True)
            ]
            # without the shares as an input, QMoE takes the softmax over the chosen experts only
            shares = cast(op, op.Softmax(logits, axis=-1), dtype)
            weights = [*gate_up[:2], None, *down[:2], None, None, None, None, *zeros, None]
            y = microsoft(op).QMoE(x, cast(op, logits, dtype), *weights, shares, **options)
        case _:
            raise AssertionError(f"no way to run experts stored as {storages}")
    return typed(y, dtype, shape_of(x))


def rotary(
    op: OpBuilder, x: ir.Value, rows: ir.Value, cos: ir.Value, sin: ir.Value, num_heads: int, channels: int = 0
) -> ir.Value:
    """Rotary embedding of each head of ``x [B, S, heads · D]``; ``rows`` selects each token's row of cos and sin.

    Only the first ``channels`` of each head are rotated; 0 means all.
    """
    some = {"rotary_embedding_dim": channels} if channels else {}
    y = microsoft(op).RotaryEmbedding(x, rows, cos, sin, num_heads=num_heads, **some)
    return typed(y, dtype_of(x), shape_of(x))


def multi_head_attention(
    op: OpBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    num_heads: int,
    key_padding_mask: ir.Value | None = None,
) -> ir.Value:
    """Bidirectional attention over ``[B, S, heads · D]`` with the scale ``1 / sqrt(D)``.

    ``key_padding_mask`` int32 [B, S] is 1 for keys and 0 for padding.
    """
    masks = [] if key_padding_mask is None else [None, key_padding_mask]
    y = microsoft(op).MultiHeadAttention(q, k, v, *masks, num_heads=num_heads)
    return typed(y, dtype_of(q), shape_of(q))


def group_query_attention(
    op: OpBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    past: tuple[ir.Value, ir.Value],
    lengths: tuple[ir.Value, ir.Value],
    num_heads: int,
    kv_num_heads: int,
    scale: float | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Causal attention of ``q [B, S, heads · D]`` over the cache and the new keys and values ``[B, S, kv_heads · D]``.

    Args:
        op: the graph under construction.
        q: queries, already rotated.
        k: keys, already rotated.
        v: values.
        past: keys and values so far, ``[B, kv_heads, P, D]``; their buffers may be those of the present ones.
        lengths: ``seqlens_k`` int32 [B] (valid keys - 1) and ``total_sequence_length`` int32 scalar.
        num_heads: number of query heads.
        kv_num_heads: number of key and value heads.
        scale: factor of the dot products; None for ``1 / sqrt(D)``.

    Returns:
        output ``[B, S, heads · D]``, present key and value ``[B, kv_heads, total, D]``.
    """
    scaled = {} if scale is None else {"scale": scale}
    y, key, value = microsoft(op).GroupQueryAttention(
        q, k, v, *past, *lengths, num_heads=num_heads, kv_num_heads=kv_num_heads, do_rotary=0, **scaled, _outputs=3
    )
    batch, heads, _, size = shape_of(past[0])
    for present in (key, value):
        typed(present, dtype_of(q), [batch, heads, "total_sequence_length", size])
    return typed(y, dtype_of(q), shape_of(q)), key, value


def group_query_attention_int8(
    op: OpBuilder,
    qkv: ir.Value,
    past: tuple[ir.Value, ir.Value],
    lengths: tuple[ir.Value, ir.Value],
    num_heads: int,
    kv_num_heads: int,
    scales: Sequence[ir.Value],
    scale: float,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Causal grouped-query attention over an int8 cache, whose numbers are ``code · scales[kind][head, channel]``.

    Args:
        op: the graph under construction.
        qkv: queries, keys and values ``[B, S, (heads + 2 · kv_heads) · D]``.
        past: keys and values so far, int8 ``[B, kv_heads, P, D]``.
        lengths: the two lengths that `group_query_attention` takes.
        num_heads: number of query heads.
        kv_num_heads: number of key and value heads.
        scales: scales of the keys and of the values, fp32 ``[kv_heads, D]`` each.
        scale: factor of the dot products.

    Returns:
        output ``[B, S, heads · D]``, present key and value, int8 ``[B, kv_heads, total, D]``.
    """
    y, key, value = microsoft(op).GroupQueryAttention(
        *(qkv, None, None, *past, *lengths, None, None, None, None, None, *scales),
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        do_rotary=0,
        scale=scale,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=8,
        _outputs=3,
    )
    for present in (key, value):
        typed(present, dtype_of(past[0]), shape_of(past[0]))
    size = shape_of(past[0])[-1]
    assert isinstance(size, int), "the cache's head size is known"
    return typed(y, dtype_of(qkv), last_dim(qkv, num_heads * size)), key, value


def causal_convolution(op: OpBuilder, x: ir.Value, kernel: ir.Value, state: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Causal convolution of each channel of fp32 ``x [B, C, S]`` by itself.

    Args:
        op: the graph under construction.
        x: the new tokens.
        kernel: weights ``[C, 1, K]``; the last one multiplies the current token.
        state: the inputs of the last K - 1 tokens, ``[B, C, K - 1]``.

    Returns:
        output ``[B, C, S]``, and the state after the new tokens.
    """
    # the operator's own SiLU computes one exponential at a time; a separate activation takes half of its time
    y, present = microsoft(op).CausalConvWithState(x, kernel, None, state, activation="none", ndim=1, _outputs=2)
    return typed(y, FLOAT, shape_of(x)), typed(present, FLOAT, shape_of(state))


def linear_attention_gate(
    op: OpBuilder, a: ir.Value, dt_bias: ir.Value, scale: ir.Value, b: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """The gates of the delta rule for ``a`` and ``b`` fp32 ``[B, S, heads]``.

    Returns:
        logarithm of the decay ``scale · softplus(a + dt_bias)``, and update rate ``sigmoid(b)``.
    """
    g, beta = microsoft(op).LinearAttentionGate(a, dt_bias, scale, b, _outputs=2)
    return typed(g, FLOAT, shape_of(a)), typed(beta, FLOAT, shape_of(b))


def linear_attention(
    op: OpBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    state: ir.Value,
    g: ir.Value,
    beta: ir.Value,
    key_heads: int,
    value_heads: int,
) -> tuple[ir.Value, ir.Value]:
    """The gated delta rule in fp32, token by token (`vlpack.layers.delta_net`).

    Args:
        op: the graph under construction.
        q: queries of length 1, ``[B, S, key_heads · D]``; they are multiplied by ``1 / sqrt(D)``.
        k: keys of length 1, of the same shape; each serves ``value_heads / key_heads`` neighbouring value heads.
        v: values ``[B, S, value_heads · E]``.
        state: state before the new tokens, ``[B, value_heads, D, E]``.
        g: logarithms of the decay, ``[B, S, value_heads]``.
        beta: update rates, ``[B, S, value_heads]``.
        key_heads: number of query and key heads.
        value_heads: number of value heads.

    Returns:
        output ``[B, S, value_heads · E]``, and the state after the new tokens.
    """
    size = shape_of(state)[2]
    assert isinstance(size, int), "the state's sizes are known"
    y, present = microsoft(op).LinearAttention(
        *(q, k, v, state, g, beta),
        q_num_heads=key_heads,
        kv_num_heads=value_heads,
        update_rule="gated_delta",
        scale=size**-0.5,
        _outputs=2,
    )
    return typed(y, FLOAT, shape_of(v)), typed(present, FLOAT, shape_of(state))
