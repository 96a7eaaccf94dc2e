"""The 8-bit key/value cache (`kv_cache=int8`): attention over it, and packages that use it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxscript import GraphBuilder

from family import Member, make_member
from parity import make_inputs, relative
from runtime.test_parity_runtime import QUESTION
from tiny import EXAMPLE, Tiny
from vlpack.builder import build
from vlpack.errors import OptionError
from vlpack.layers import int8_kv_cache as module
from vlpack.layers.attention import Heads
from vlpack.layers.int8_kv_cache import (
    EXPONENT_CHANNELS,
    EXTRA_CHANNELS,
    LOWEST_EXPONENT,
    OCTAVES_PER_CHANNEL,
    exponent_codes,
    int8_kv_cache,
)
from vlpack.layers.rope import Frequencies, angles_from_positions, inverse_frequencies
from vlpack.options import ExtraOptions
from vlpack.runtime.model import Model

TINY = Tiny()
HEADS, KV_HEADS, SIZE, TOTAL = 4, 2, 32, 40
FREQUENCIES = Frequencies(inverse_frequencies(SIZE, 10000.0), np.zeros(SIZE // 2, np.int64), 1.0)
EXACT, ROUNDED = 1e-5, 0.02
"""Largest relative L2 errors: of the same computation, and of values rounded to 8 bits."""


@pytest.fixture(scope="module")
def session():
    return make_session()


def make_session() -> ort.InferenceSession:
    """A session of a graph that consists only of attention over the 8-bit cache."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24, "com.microsoft": 1}, name="attention")
    builder = GraphBuilder(graph)
    float32, int8, int64 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT64
    qkv = builder.input("qkv", float32, ["B", "S", (HEADS + 2 * KV_HEADS) * SIZE])
    mask, positions = builder.input("mask", int64, ["B", "total"]), builder.input("positions", int64, ["B", "S"])
    norms = tuple(builder.input(f"{kind}_weight", float32, [SIZE]) for kind in "qk")
    rope = angles_from_positions(builder.op, positions, FREQUENCIES)
    past: Any = tuple(builder.input(f"past_{kind}", int8, ["B", KV_HEADS, "P", SIZE + EXTRA_CHANNELS]) for kind in "kv")
    attend = int8_kv_cache(HEADS, KV_HEADS, SIZE, 1.0)(builder.op, mask, positions, rope)
    outputs = attend(builder.op, qkv, Heads(HEADS, KV_HEADS, SIZE, (norms[0], norms[1]), 1e-12), past)
    for value, name in zip(outputs, ("y", "present_k", "present_v"), strict=True):
        builder.add_output(value, name)
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def normalized(x: np.ndarray) -> np.ndarray:
    return x * SIZE**0.5 / np.linalg.norm(x, axis=-1, keepdims=True)


def rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The rotary embedding of ``x [B, S, heads, D]`` at ``positions [S]``."""
    angles = positions[:, None, None] * FREQUENCIES.inverse  # [S, 1, D / 2]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


def make_qkv(spread: float, batch: int = 1) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Queries and keys after norm and rotation, values of sizes ``exp(spread · normal)``, and the norms' weights."""
    random = np.random.default_rng(3)
    weight = {n: (size * np.exp(random.normal(0, 1, SIZE))).astype(np.float32) for n, size in (("k", 1), ("q", 0.5))}
    q = random.normal(0, 1, (batch, TOTAL, HEADS, SIZE))
    k = random.normal(0, 1, (batch, TOTAL, KV_HEADS, SIZE))
    k[:, 5] = np.eye(SIZE)[3]  # everything in one channel, which is the bound of a key
    q, k = (rotated(normalized(x) * weight[n], np.arange(TOTAL)) for n, x in (("q", q), ("k", k)))
    v = random.normal(0, 1, (batch, TOTAL, KV_HEADS, SIZE))
    v *= np.exp(spread * random.normal(0, 1, (batch, TOTAL, KV_HEADS, 1)))
    v[:, 7] = 0
    return {"q": q, "k": k, "v": v}, weight


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The attention of the last query over all keys, in float64: ``[B, heads · D]``."""
    group = HEADS // KV_HEADS
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum("bhd,bthd->bht", q[:, -1], k) / SIZE**0.5
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("bht,bthd->bhd", p, v).reshape(len(q), -1)


def run(session, qkv, weight, ends, room: int = 0):
    """Runs the tokens in pieces, with a growing cache, or if ``room`` is given, with a cache of full size."""
    batch = len(qkv["q"])
    past = [np.zeros((batch, KV_HEADS, room, SIZE + EXTRA_CHANNELS), np.int8) for _ in "kv"]
    outputs, start = [], 0
    for end in ends:
        positions = np.arange(start, end)
        parts = {n: x[:, start:end] for n, x in qkv.items()}
        parts |= {n: rotated(parts[n], -positions) / weight[n] for n in "qk"}
        joined = np.concatenate([parts[n].reshape(batch, end - start, -1) for n in "qkv"], -1).astype(np.float32)
        arrays = {"qkv": joined, "positions": positions[None].repeat(batch, 0), "mask": np.ones((batch, end), np.int64)}
        arrays |= {f"{n}_weight": x for n, x in weight.items()}
        y, *past = session.run(None, {**arrays, "past_k": past[0], "past_v": past[1]})
        outputs.append(y)
        start = end
    return np.concatenate(outputs, axis=1), past


def read(codes: list[np.ndarray], weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values ``[B, T, kv_heads, D]`` of a cache, decoded as `vlpack.layers.int8_kv_cache` describes."""
    keys, values = (x.transpose(0, 2, 1, 3).astype(np.float64) for x in codes)
    step = np.tile(np.maximum(weight[: SIZE // 2], weight[SIZE // 2 :]), 2) * SIZE**0.5 / 127
    k = keys[..., :SIZE] * step
    twice = np.argsort(-step, kind="stable")[: EXTRA_CHANNELS - 1]
    k[..., twice] += keys[..., SIZE + 1 :] * step[twice] / 254
    return k, values[..., :SIZE] / 127 * 2.0 ** keys[..., SIZE : SIZE + 1]


@pytest.mark.parametrize("spread", [0.0, 3.0], ids=["equal values", "values of all sizes"])
@pytest.mark.parametrize("room", [0, TOTAL + 5])
@pytest.mark.parametrize(
    "ends", [(39, 40), (20, 33, 40), tuple(range(1, 41)), (40,)], ids=["prompt and token", "chunks", "tokens", "whole"]
)
def test_attention_over_codes_is_attention(session, ends, room, spread):
    qkv, weight = make_qkv(spread)
    y, codes = run(session, qkv, weight, ends, room)
    k, v = (x[:, :TOTAL] for x in read(codes, weight["k"]))
    new = ends[-1] - (ends[-2] if len(ends) > 1 else 0)
    if new > 1:  # new tokens are not rounded yet
        k, v = (
            np.concatenate([old[:, : TOTAL - new], x[:, TOTAL - new :]], 1) for old, x in ((k, qkv["k"]), (v, qkv["v"]))
        )
    assert relative(y[:, -1], attention(qkv["q"], k, v)) <= EXACT
    assert relative(y[:, -1], attention(**qkv)) <= ROUNDED
    assert np.abs(k - qkv["k"]).max() <= 0.51 * SIZE**0.5 / 127 * np.sort(weight["k"])[-EXTRA_CHANNELS // 2]
    peak = np.abs(qkv["v"]).max(-1, keepdims=True)
    assert (np.abs(v - qkv["v"]) <= 0.51 / 127 * 2 * peak + 1e-12).all()


def test_rows_of_a_batch_are_independent(session):
    qkv, weight = make_qkv(1.0, batch=2)
    y, _ = run(session, qkv, weight, (38, 39, 40))
    alone = [run(session, {n: x[i : i + 1] for n, x in qkv.items()}, weight, (38, 39, 40))[0][0] for i in range(2)]
    assert relative(y, np.stack(alone)) <= EXACT
    assert relative(y[0], alone[1]) > ROUNDED


def no_exponents() -> tuple[np.ndarray, np.ndarray]:
    codes, worth = exponent_codes()
    codes[:, 0] = 0
    return codes, worth


def test_a_planted_fault_is_detected(monkeypatch):
    """Tokens without their exponent get a wrong weight, and the comparison must detect it."""
    monkeypatch.setattr(module, "exponent_codes", no_exponents)
    qkv, weight = make_qkv(1.0)
    y, _ = run(make_session(), qkv, weight, (39, 40))
    assert relative(y[:, -1], attention(**qkv)) > 0.2


def test_every_exponent(session):
    """Values of every magnitude that the cache covers, one per token, are decoded to within a step."""
    qkv, weight = make_qkv(0.0)
    for exponent in range(LOWEST_EXPONENT, LOWEST_EXPONENT + EXPONENT_CHANNELS * OCTAVES_PER_CHANNEL):
        only = {"q": qkv["q"][:, :1], "k": qkv["k"][:, :1], "v": np.full((1, 1, KV_HEADS, SIZE), 2.0**exponent)}
        y, _ = run(session, only, weight, (1,))
        assert np.allclose(y, 2.0**exponent, rtol=1 / 127), exponent


def test_a_package(built, package, reference):
    """The first pass rounds nothing and the second reads the codes; the runtime allocates the cache and answers."""
    options = ("kv_cache=int8", "prune_lm_head=false")
    inputs = make_inputs(TINY, ((1, 4, 6),), text=20)
    expected, runs = reference(TINY)(inputs), package(TINY, *options)
    assert relative(runs.logits(inputs, expected.positions), expected.logits) <= EXACT
    whole, past, logits = runs.embed(inputs.ids, runs.features(inputs)), None, []
    length = inputs.ids.shape[1]
    for start, end in ((0, 15), (15, 30), *((i, i + 1) for i in range(30, length))):
        tokens = {key: value[:, start:end] for key, value in whole.items()}
        out, past = runs.decode(tokens, expected.positions[:, :, start:end], past)
        logits.append(out)
    assert EXACT < relative(np.concatenate(logits, axis=1), expected.logits) <= ROUNDED
    model = Model(built(TINY, "kv_cache=int8"), threads=1)
    assert model.cache_bytes(100) == 2 * TINY.layers * TINY.kv_heads * (TINY.head_dim + EXTRA_CHANNELS) * 100
    answers = [m.generate(QUESTION, max_tokens=24).text for m in (model, Model(built(TINY), threads=1))]
    assert answers[0][:8] == answers[1][:8] != ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "fp16"}, "fp32 activations"),
        ({"precision": "fp16", "execution_provider": "cuda"}, "fp32 activations"),
        ({"precision": "int8", "part": "vision"}, "option of the decoder"),
        ({"precision": "int8", "task": "embedding"}, "keeps no cache"),
    ],
    ids=str,
)
def test_packages_that_cannot_have_it(options, said, tmp_path):
    with pytest.raises(OptionError, match=said):
        build(EXAMPLE, tmp_path / "package", extra_options=ExtraOptions(kv_cache="int8"), **options)


def test_keys_must_be_normalized(tmp_path):
    member = make_member(tmp_path / "checkpoint", Member("llama", "LlamaConfig", "LlamaForCausalLM", {}))
    with pytest.raises(OptionError, match="normalize their keys"):
        build(member, tmp_path / "package", extra_options=ExtraOptions(kv_cache="int8"))
