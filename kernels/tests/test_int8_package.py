"""The operators for 8-bit matrices in the sessions of an int8 package of the digits checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import vlpack_kernels
from onnx import TensorProto

import vlpack
from vlpack.ort.kernels import SWITCH, kernel_counts
from vlpack.ort.session import kernel_session
from vlpack.shipped import examples_folder


def built(folder: Path, precision: str) -> Path:
    vlpack.build(examples_folder() / "digits-qwen3-vl", folder / precision, precision=precision)
    return folder / precision


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("digits"), "int8")


def opened(package: Path, monkeypatch: pytest.MonkeyPatch, switch: str) -> ort.InferenceSession:
    """A session of the decoder with (``1``) or without (``0``) the operators."""
    monkeypatch.setenv(SWITCH, switch)
    return kernel_session(package / "decoder.onnx", 2)


def logits(session: ort.InferenceSession, embeddings: np.ndarray) -> np.ndarray:
    """The decoder's logits for the last of some tokens."""
    count, values = embeddings.shape[1], {}
    for port in session.get_inputs():
        if port.name.startswith("past"):
            kind = TensorProto.BFLOAT16 if port.type == "tensor(bfloat16)" else TensorProto.FLOAT
            shape = (1, port.shape[1], 0, port.shape[3])
            values[port.name] = ort.OrtValue.ortvalue_from_shape_and_type(shape, kind)
            continue
        if port.name == "attention_mask":
            array = np.ones((1, count), np.int64)
        elif port.name == "position_ids":
            array = np.tile(np.arange(count, dtype=np.int64), (3, 1, 1))
        else:
            array = np.resize(embeddings, (1, count, port.shape[2]))
        values[port.name] = ort.OrtValue.ortvalue_from_numpy(array)
    return np.asarray(session.run_with_ort_values(["logits"], values)[0].numpy())


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_logits_are_as_near_to_fp32_as_those_of_the_stock_nodes(
    int8: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only sums of the head's blocks, and bfloat16 in attention, may differ in rounding.

    A difference before a value is rounded to 8 bits can grow to a step, in either direction, so the errors of many
    inputs are compared.
    """
    monkeypatch.delenv(SWITCH, raising=False)
    fast = vlpack_kernels.instruction_set() != "avx2"
    counts = kernel_counts(int8 / "decoder.onnx")
    assert (counts.get("Linear8", 0), counts.get("Linear8Blocks", 0)) == ((30, 1) if fast else (0, 0))
    fp32 = built(int8.parent, "fp32") if not (int8.parent / "fp32").exists() else int8.parent / "fp32"
    sessions = [opened(int8, monkeypatch, switch) for switch in "10"] + [opened(fp32, monkeypatch, "0")]
    ratios = []
    for seed in range(24):
        x = np.random.default_rng(seed).standard_normal((1, count, 256)).astype(np.float32) / 20
        ours, stock, exact = (logits(session, x) for session in sessions)
        if not any(name.endswith("GroupQueryAttention") for name in counts):
            assert np.linalg.norm(ours - stock) <= 1e-5 * np.linalg.norm(stock)
        ratios.append(np.linalg.norm(ours - exact) / np.linalg.norm(stock - exact))
    assert np.exp(np.mean(np.log(ratios))) <= 1.25


def test_the_engine_gives_the_tokens_of_the_stock_runtime(int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    # questions that the model was trained for: answers to others are as good as random, so any rounding changes them
    images = [examples_folder() / "digits-images" / f"{number:02}.png" for number in range(6)]
    asked = [("Read the digits.", [image]) for image in images]
    model = vlpack.load(int8, threads=2)
    with vlpack.Engine(int8, threads=2, slots=4, context=512) as engine:
        handles = [engine.submit(text, images=shown, max_tokens=30) for text, shown in asked]
        for (text, shown), handle in zip(asked, handles, strict=True):
            assert handle.result().tokens == model.generate(text, images=shown, max_tokens=30, temperature=0).tokens
