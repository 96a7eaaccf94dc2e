"""The operators for 8-bit matrices in the sessions of an int8 package of the digits checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import vlpack_kernels

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


def logits(package: Path, embeddings: np.ndarray, monkeypatch: pytest.MonkeyPatch, switch: str) -> np.ndarray:
    """The decoder's logits for the last of some tokens, with (``1``) or without (``0``) the operators."""
    monkeypatch.setenv(SWITCH, switch)
    session = kernel_session(package / "decoder.onnx", 2)
    count, given = embeddings.shape[1], {}
    for port in session.get_inputs():
        if port.name.startswith("past"):
            given[port.name] = np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32)
        elif port.name == "attention_mask":
            given[port.name] = np.ones((1, count), np.int64)
        elif port.name == "position_ids":
            given[port.name] = np.tile(np.arange(count, dtype=np.int64), (3, 1, 1))
        else:
            given[port.name] = np.resize(embeddings, (1, count, port.shape[2]))
    return np.asarray(session.run(["logits"], given)[0])


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_logits_are_those_of_the_stock_nodes(int8: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only sums of the head's blocks, and bfloat16 in attention, may differ in rounding."""
    monkeypatch.delenv(SWITCH, raising=False)
    fast = vlpack_kernels.instruction_set() != "avx2"
    counts = kernel_counts(int8 / "decoder.onnx")
    assert (counts.get("Linear8", 0), counts.get("Linear8Blocks", 0)) == ((30, 1) if fast else (0, 0))
    fp32 = built(int8.parent, "fp32") if not (int8.parent / "fp32").exists() else int8.parent / "fp32"
    x = np.random.default_rng(count).standard_normal((1, count, 256)).astype(np.float32) / 20
    ours, stock = (logits(int8, x, monkeypatch, switch) for switch in "10")
    exact = logits(fp32, x, monkeypatch, "0")
    if not any(name.endswith("GroupQueryAttention") for name in counts):
        assert np.linalg.norm(ours - stock) <= 1e-5 * np.linalg.norm(stock)
    assert np.linalg.norm(ours - exact) <= 1.1 * np.linalg.norm(stock - exact)


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
