"""The choice of 8-bit matrices within an average number of bits: the algorithm, the measured harm, and whole builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samples import DIGITS, vlpack
from vlpack.architectures import architecture_of
from vlpack.architectures.base import GraphOptions
from vlpack.builder import build
from vlpack.calibration import sensitivity
from vlpack.calibration.bits import spend_bits
from vlpack.calibration.sensitivity import HALVES, Half, harms
from vlpack.calibration.teacher import CalibrationModel
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import OptionError
from vlpack.export.graph import declare
from vlpack.options import parse_extra_options
from vlpack.quantize.allocation import Candidate, average_bits, choose
from vlpack.quantize.policy import (
    PrecisionFacts,
    QuantizationOptions,
    default_eight_bits,
    layer_and_name,
    make_policy,
)

SIZES = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=12)


def candidate(number: int, weights: int, harm: float) -> Candidate:
    return Candidate(f"layers.{number}.mlp.down_proj", weights, weights * 4, weights * 8, harm)


@settings(deadline=None)
@given(SIZES, st.floats(32, 70))
def test_the_average_is_kept(sizes: list[tuple[int, float]], bits: float) -> None:
    """The average does not exceed the given one, and no matrix that still fits is left in few bits."""
    found = [candidate(number, *size) for number, size in enumerate(sizes)]
    chosen = choose(found, bits)
    assert average_bits(found, chosen) <= bits + 1e-9
    for one in found:
        if one.path not in chosen:
            assert average_bits(found, [*chosen, one.path]) > bits


def test_the_most_avoided_harm_per_byte_comes_first() -> None:
    found = [candidate(0, 10, 1.0), candidate(1, 40, 2.0), candidate(2, 10, 0.5)]
    assert choose(found, 32 + 32 * 10 / 60) == [found[0].path]
    assert set(choose(found, 32 + 32 * 50 / 60)) == {found[0].path, found[1].path}


def test_layers_by_path() -> None:
    assert layer_and_name("model.language_model.layers.12.mlp.down_proj") == (12, "mlp.down_proj")
    assert layer_and_name("lm_head") == (None, "lm_head")
    assert layer_and_name("model.visual.blocks.3.mlp.linear_fc1") == (3, "mlp.linear_fc1")


LAYERS = (0, 2, 10, 11, 27)


def test_sensitive_matrices_have_8_bits_by_default() -> None:
    """The default applies unless matrices are calibrated, which then have 4 bits, or other options choose the bits."""
    facts = PrecisionFacts(num_hidden_layers=28)

    def labels(name: str = "self_attn.qkv_proj", **options: Any) -> list[str]:
        policy = make_policy("int4", options.pop("provider", "cpu"), QuantizationOptions(**options), facts)
        return [policy.storage("text.linear", f"model.layers.{layer}.{name}").label[:4] for layer in LAYERS]

    assert default_eight_bits(6) == {}
    assert labels() == ["int8", "int8", "int8", "int4", "int8"]
    assert labels("mlp.down_proj") == ["int8", "int4", "int4", "int4", "int8"]
    assert labels(calibrated=True) == labels(mixed={"mixed_layers": "int4"}) == labels(provider="cuda") == ["int4"] * 5
    chosen = labels(calibrated=True, eight_bits={"self_attn.qkv_proj": [2]})
    assert chosen == ["int4", "int8", "int4", "int4", "int4"]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[CalibrationModel, CalibrationModel]:
    """The digits model in 8 bits, and in 4 bits with damaged weights in layer 2's attention and layer 3's MLP."""
    folder = tmp_path_factory.mktemp("packages")
    with Checkpoint.open(DIGITS) as checkpoint:
        architecture, _ = architecture_of(checkpoint)
    made = []
    for precision, extra in (("int8", []), ("int4", ["block_size=16", "matmul_mixed_precision=mixed_layers:int4"])):
        result = build(DIGITS, folder / precision, precision=precision, extra_options=parse_extra_options(extra))
        made.append(
            CalibrationModel(result.folder, {name: file for name, (file, *_) in result.parts.items()}, architecture)
        )
    import onnx_ir as ir

    for path in ("layers.2.self_attn.o_proj", "layers.3.mlp.down_proj"):
        name = f"model.language_model.{path}.qweight"
        tensor = ir.load(folder / "int4" / "decoder.onnx").graph.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        with open(folder / "int4" / "decoder.onnx.data", "r+b") as file:
            file.seek(tensor.offset or 0)
            codes = np.frombuffer(file.read(tensor.nbytes), np.uint8)
            file.seek(tensor.offset or 0)
            file.write(np.random.default_rng(0).permutation(codes).tobytes())
    return made[0], made[1]


def test_the_damaged_halves_have_the_largest_harm(packages: tuple[CalibrationModel, CalibrationModel]) -> None:
    eight, four = packages
    ids = np.random.default_rng(1).integers(10, 60, (3, 1, sensitivity.TOKENS + 5))
    said: list[tuple[int, int]] = []
    found = harms(eight, four, [eight.show(one) for one in ids], lambda *at: said.append(at))
    count = eight.architecture.text.num_hidden_layers
    assert set(found) == {Half(layer, module) for layer in range(count) for module in HALVES}
    assert said == [(stage, 2 * count) for stage in range(2 * count)]
    worst = sorted(found, key=lambda half: -found[half])[:2]
    assert set(worst) == {Half(2, "self_attn"), Half(3, "mlp")}
    assert found[worst[1]] > 3 * sorted(found.values())[-3]
    assert min(found.values()) > 0


def test_halves_in_8_bits_do_no_harm(packages: tuple[CalibrationModel, CalibrationModel]) -> None:
    eight, _ = packages
    shown = [eight.show(np.random.default_rng(2).integers(10, 60, (1, sensitivity.TOKENS)))]
    assert max(map(abs, harms(eight, eight, shown).values())) < 1e-6


def test_the_most_harmed_halves_get_8_bits() -> None:
    options = QuantizationOptions(calibrated=True)
    with Checkpoint.open(DIGITS) as checkpoint:
        architecture, _ = architecture_of(checkpoint)
    facts = architecture.precision_facts
    policy = make_policy("int4", "cpu", options, facts)
    part = next(part for part in architecture.parts(GraphOptions.of_policy(policy)) if part.name == "decoder")
    weights = declare(part, policy)
    found = {Half(layer, module): 1e-3 for layer in range(facts.num_hidden_layers) for module in HALVES}
    found[Half(1, "mlp")] = 1.0
    chosen = spend_bits(policy, facts, weights, found, 4.8).options.eight_bits
    assert chosen is not None
    whole = {name: list(layers) for name, layers in chosen.items() if name.startswith("mlp.")}
    assert whole == {"mlp.down_proj": [1], "mlp.gate_proj": [1], "mlp.up_proj": [1]}


@pytest.fixture(scope="module")
def spent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spent") / "digits"
    build(DIGITS, folder, calibrate="self", bits=5.5)
    return folder


def test_a_build_with_average_bits(spent: Path) -> None:
    """The average is just below the requested one, no temporary file is left, and inspect and verify know the bits."""
    from vlpack.inspection import inspect
    from vlpack.verification import verify

    described = inspect(spent)
    assert described["problems"] == []
    assert described["precision"] == "int4"
    manifest = json.loads((spent / "vlpack.json").read_text(encoding="utf-8"))
    weights = next(part["weights"] for part in manifest["parts"].values() if part["name"] == "decoder")
    matrices = [one for path, one in weights.items() if "_proj" in path and len(one["shape"]) > 1]
    average = 8 * sum(one["bytes"] for one in matrices) / sum(int(np.prod(one["shape"])) for one in matrices)
    assert 5.1 < average <= 5.5
    chosen = manifest["quantization"]["eight_bits"]
    rules = {rule["modules"]: rule["storage"] for rule in described["policy"]}
    assert chosen
    for name, layers in chosen.items():
        assert rules[f"*.{name} in layers {', '.join(map(str, layers))}"] == "int8 calibrated"
        for layer in layers:
            assert weights[f"model.language_model.layers.{layer}.{name}"]["storage"] == "int8 calibrated"
    report = verify(spent, DIGITS, tokens=2)
    assert report.ok, report.findings


MISTAKES = {
    "without calibration": (["--bits", "5"], "--bits needs --calibrate"),
    "another precision": (["-p", "int8", "--calibrate", "self", "--bits", "5"], "--bits is for int4"),
    "another provider": (["-e", "cuda", "--calibrate", "self", "--bits", "5"], "--bits is for int4 on the CPU"),
    "too few": (["--calibrate", "self", "--bits", "4.01"], "less than what 4 bits take here"),
    "absurd": (["--calibrate", "self", "--bits", "32"], "at most 9"),
    "not a number": (["--calibrate", "self", "--bits", "nan"], "at most 9"),
    "two choices": (
        ["--calibrate", "self", "--bits", "5", "--extra-options", "matmul_mixed_precision=mixed_layers:int8"],
        "exclude each other",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_options_that_exclude_bits(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, words = MISTAKES[name]
    said = vlpack(capsys, "build", DIGITS, "-o", tmp_path / "out", *options)
    assert said.code == 2
    assert words in said.err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_check_of_options_from_python(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="bits needs calibrate"):
        build(DIGITS, tmp_path / "out", bits=5.0)
