"""Signed and unsigned 8-bit weights: signed ones are fast, unsigned ones are exact on every x86 processor."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

import vlpack
from samples import DIGITS, IMAGES, READ
from samples import vlpack as run_vlpack
from vlpack.builder import build
from vlpack.errors import OptionError, VlpackWarning
from vlpack.options import parse_extra_options
from vlpack.ort.saturation import saturates
from vlpack.runtime.sampling import Sampling

UNSIGNED = parse_extra_options(["weight_type=uint8"])


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    build(DIGITS, folder / "int8", precision="int8")
    build(DIGITS, folder / "uint8", precision="int8", extra_options=UNSIGNED)
    return {name: folder / name for name in ("int8", "uint8")}


def test_both_types_are_the_same_model(packages: dict[str, Path]) -> None:
    """The codes differ by 128 only, so graphs and answers agree if nothing saturates."""
    import onnxruntime as ort

    inputs, results = None, []
    for folder in packages.values():
        session = ort.InferenceSession(str(folder / "vision.onnx"), providers=["CPUExecutionProvider"])
        if inputs is None:
            grid = np.array([[1, 8, 12]], np.int64)
            pixels = np.random.default_rng(0).normal(size=(96, session.get_inputs()[0].shape[1]))
            inputs = {"pixel_values": pixels.astype(np.float32), "image_grid_thw": grid}
        results.append(session.run(None, inputs)[0])
    assert np.abs(results[1]).max() > 0.1
    if saturates():
        assert np.linalg.norm(results[0] - results[1]) < 0.1 * np.linalg.norm(results[1])
    else:
        np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-5)
    files = [json.loads((folder / "vlpack.json").read_text(encoding="utf-8")) for folder in packages.values()]
    labels = [{rule["storage"] for rule in manifest["policy"]} for manifest in files]
    assert [("int8" in found, "uint8" in found) for found in labels] == [(True, False), (False, True)]


def test_a_processor_that_saturates(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlpack.ort.saturation.saturates", lambda: True)
    with pytest.warns(VlpackWarning, match="weight_type='uint8'"):
        vlpack.load(packages["int8"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = vlpack.load(packages["uint8"])
    assert model.generate(READ, [IMAGES / "00.png"], max_tokens=8, sampling=Sampling(temperature=0)).text
    done = run_vlpack(capsys, "run", packages["int8"], "--image", IMAGES / "00.png", READ)
    assert done.code == 0
    assert done.err.startswith("warning: This processor lacks VNNI")
    assert "--extra-options weight_type=uint8" in " ".join(done.err.split())


def test_the_result_agrees_with_the_processors_instructions() -> None:
    """The test product must agree with the processor's list of instructions, where the system has one."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()
    if flags & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        assert not saturates()
    elif "avx2" in flags:
        assert saturates()
    else:
        pytest.skip("this system does not say which instructions there are")


def test_builds_without_int8_matrices(tmp_path: Path) -> None:
    for precision, part in (("fp32", "all"), ("int4", "text")):
        with pytest.raises(OptionError, match="weight_type has no effect"):
            build(DIGITS, tmp_path / "package", precision=precision, part=part, extra_options=UNSIGNED)
    build(
        DIGITS, tmp_path / "package", precision="int4", extra_options=UNSIGNED
    )  # the vision encoder of an int4 package is int8
