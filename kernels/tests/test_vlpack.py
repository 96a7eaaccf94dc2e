"""The operators in vlpack's own sessions, with the digits checkpoint that ships with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vlpack_kernels

import vlpack
from vlpack.ort.kernels import INTERFACE, SWITCH
from vlpack.shipped import examples_folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "int4"
    vlpack.build(examples_folder() / "digits-qwen3-vl", folder, precision="int4")
    return folder


@pytest.fixture(params=["with", "without"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "with":
        monkeypatch.delenv(SWITCH, raising=False)
    else:
        monkeypatch.setenv(SWITCH, "0")
    return bool(request.param == "with")


def test_it_has_the_interface_that_vlpack_needs() -> None:
    assert vlpack_kernels.interface() == INTERFACE


def test_inspect_names_the_operators(package: Path, kernels: bool) -> None:
    found = vlpack.inspect(package)["kernels"]
    if not kernels:
        assert found is None
        return
    best = vlpack_kernels.instruction_set()
    assert found["instruction_set"] == best
    used = {name for counts in found["operators"].values() for name in counts}
    # the vision encoder has 8 bits, and the head in blocks
    wide = {"Linear4", "Linear8", "Linear8Blocks"}
    narrow = {"Attention", "NarrowGroupQueryAttention"}
    assert used == {"avx512_bf16": wide | narrow, "avx512": wide | {"GroupQueryAttention"}, "avx2": set()}[str(best)]


@pytest.mark.usefixtures("kernels")
def test_answers_are_right(package: Path) -> None:
    images = examples_folder() / "digits-images"
    truths = json.loads((images / "answers.json").read_text(encoding="utf-8"))
    chosen = sorted(truths)[:6]
    model = vlpack.load(package, threads=2)
    with vlpack.Engine(package, threads=2) as engine:
        handles = [engine.submit("Read the digits.", images=[images / name]) for name in chosen]
        for name, handle in zip(chosen, handles, strict=True):
            assert handle.result().text.split() == truths[name]["read"].split()
            answer = model.generate("Read the digits.", images=[images / name], temperature=0)
            assert answer.text.split() == truths[name]["read"].split()


def test_the_engine_gives_the_same_tokens_in_fp32(tmp_path: Path) -> None:
    """As the stock runtime, which does not use the operators, for several requests at a time and drafted tokens."""
    package, images = tmp_path / "fp32", examples_folder() / "digits-images"
    vlpack.build(examples_folder() / "digits-qwen3-vl", package, precision="fp32")
    counts = vlpack.inspect(package)["kernels"]["operators"].get("decoder", {})
    assert counts == ({} if vlpack_kernels.instruction_set() == "avx2" else {"GroupQueryAttention": 6})
    model = vlpack.load(package, threads=2)
    asked = [
        ("Read the digits.", [images / "00.png"]),
        ("How many digits are there?", [images / "01.png", images / "02.png"]),
        ("Read the digits. " * 40, []),
        ("3 1 4 1 5 9 2 6 5 " * 30, [images / "03.png"]),
    ]
    with vlpack.Engine(package, threads=2, slots=3, context=1024) as engine:
        handles = [engine.submit(text, images=shown, max_tokens=40) for text, shown in asked]
        for (text, shown), handle in zip(asked, handles, strict=True):
            assert handle.result().tokens == model.generate(text, images=shown, max_tokens=40, temperature=0).tokens


def test_features_differ_by_rounding_only(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlpack.ort.session import kernel_session

    grid = np.array([[1, 8, 12]], np.int64)
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv(SWITCH, switch)
        session = kernel_session(package / "vision.onnx", 2)
        pixels = np.random.default_rng(0).standard_normal((96, session.get_inputs()[0].shape[1])).astype(np.float32)
        found.append(session.run(None, {"pixel_values": pixels, "image_grid_thw": grid})[0])
    assert np.linalg.norm(found[0] - found[1]) <= 0.05 * np.linalg.norm(found[1])


def printed(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "vlpack", *arguments], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_the_command_line_names_them_and_turns_them_off(package: Path) -> None:
    best = str(vlpack_kernels.instruction_set())
    assert f"kernels {best}" in printed("inspect", "--no-hashes", str(package))
    assert "kernels" not in printed("--no-kernels", "inspect", "--no-hashes", str(package))
    image = examples_folder() / "digits-images" / "00.png"
    question = ("run", str(package), "Read the digits.", "--image", str(image), "--stats")
    # the decoder runs in the stock runtime, so only the operators of the vision encoder are named
    names = {"avx512_bf16": "kernels avx512_bf16: 6 Attention, 28 Linear8", "avx512": "kernels avx512: 28 Linear8"}
    text = printed(*question).strip()
    assert text.endswith(names[best]) if best in names else "kernels" not in text
    assert "kernels" not in printed("--no-kernels", *question)
