"""Calibrated weights: inputs of matrices (compared with live transformers), rounding by GPTQ, and whole builds."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from family import Member, make_member
from kept import Kept
from samples import DIGITS, seal, vlpack
from tiny import FIRST_SPECIAL, Tiny
from vlpack.architectures import Architecture, architecture_of
from vlpack.builder import build
from vlpack.calibration import hessians as layers
from vlpack.calibration.gram import Gram
from vlpack.calibration.prompts import (
    LENGTH,
    QUESTIONS,
    TEXTS,
    conversations_of,
    openings,
    pictured,
    pieces,
    prompt_builder,
    texts_of,
)
from vlpack.calibration.run import start_calibration
from vlpack.calibration.teacher import LEAST_SHARE, CalibrationModel, Shown, choose
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import InputError, OptionError, PackageError
from vlpack.export.graph import Weight
from vlpack.options import parse_extra_options
from vlpack.preprocess.tokenizer import Tokenizer
from vlpack.quantize.blocks import dequantize_blocks, quantize_blocks, unpack
from vlpack.quantize.channels import dequantize_rows, quantize_rows
from vlpack.quantize.gptq import DAMPING, factor_hessian, gptq_round_blocks, gptq_round_rows
from vlpack.quantize.transforms import MAX_CHANNELS, Channels, ChannelScales, packed_scales, unpacked_scales
from vlpack.sample_images import picture

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Collect = Callable[..., dict[str, np.ndarray]]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def inputs_like_a_models(cols: int, tokens: int = 600) -> np.ndarray:
    """Random inputs whose channels are correlated, with a few large channels."""
    x = rng(1).standard_normal((tokens, 12)) @ rng(2).standard_normal((12, cols))
    return ((x + 0.3 * rng(3).standard_normal(x.shape)) * np.exp(rng(4).standard_normal(cols))).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("cols", "block_size"), [(128, 32), (200, 64), (96, 128)])
def test_gptq_has_a_smaller_error_on_the_inputs(cols: int, block_size: int, symmetric: bool) -> None:
    """Scales and zero points stay those of rounding to the nearest codes."""
    x, weight = inputs_like_a_models(cols), rng(5).standard_normal((40, cols)).astype(np.float32)
    nearest = quantize_blocks(weight.copy(), 4, block_size, symmetric)
    fitted = gptq_round_blocks(weight, nearest, factor_hessian(x.T @ x), 4, block_size)

    def loss(blocks: Any) -> float:
        return float(np.linalg.norm(x @ (dequantize_blocks(blocks, cols, 4) - weight).T))

    assert loss(fitted) < 0.5 * loss(nearest)
    assert fitted.scales is nearest.scales
    assert fitted.zero_points is nearest.zero_points
    assert fitted.qweight.shape == nearest.qweight.shape


def optimal_brain(weight: np.ndarray, nearest: Any, hessian: np.ndarray, block_size: int) -> np.ndarray:
    """Codes [rows, cols] by the paper's equations (2) and (3) in float64, with a new inverse for every column."""
    cols = weight.shape[1]
    order = np.argsort(-hessian.diagonal(), kind="stable")
    left, codes = weight.astype(np.float64), np.zeros(weight.shape, np.int64)
    damped = hessian.astype(np.float64) + DAMPING * hessian.diagonal().mean() * np.eye(cols)
    for place, col in enumerate(order):
        rest = order[place:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        step = nearest.scales[:, col // block_size].astype(np.float64)
        codes[:, col] = np.clip(np.rint(left[:, col] / step) + 8, 0, 15)
        error = (left[:, col] - (codes[:, col] - 8) * step) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return codes


def test_codes_equal_those_of_the_papers_equations() -> None:
    """The matrix has more columns than a block to which errors are passed on at a time."""
    cols = 300
    x, weight = inputs_like_a_models(cols), rng(5).standard_normal((24, cols)).astype(np.float32)
    nearest = quantize_blocks(weight.copy(), 4, 64, True)
    fitted = gptq_round_blocks(weight, nearest, factor_hessian(x.T @ x), 4, 64)
    codes = unpack(fitted.qweight, 4).reshape(24, -1)[:, :cols]
    assert (
        codes != optimal_brain(weight, nearest, x.T @ x, 64)
    ).mean() < 0.02  # one code that fp32 rounds differently changes later ones


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("cols", [64, 70])
def test_uncorrelated_inputs_give_the_nearest_codes(cols: int, symmetric: bool) -> None:
    """Without correlation no column can compensate for another's error; padding of the last block stays zero."""
    weight = rng(6).standard_normal((9, cols)).astype(np.float32)
    nearest = quantize_blocks(weight.copy(), 4, 32, symmetric)
    fitted = gptq_round_blocks(weight, nearest, factor_hessian(np.eye(cols, dtype=np.float32)), 4, 32)
    assert (fitted.qweight == nearest.qweight).all()


def test_rows_are_independent_of_each_other() -> None:
    """Rows are rounded independently, so a weight can be rounded in slabs."""
    cols = 96
    x, weight = inputs_like_a_models(cols), rng(7).standard_normal((31, cols)).astype(np.float32)
    inputs = factor_hessian(x.T @ x)

    def codes(rows: np.ndarray) -> np.ndarray:
        return gptq_round_blocks(rows, quantize_blocks(rows.copy(), 4, 32, True), inputs, 4, 32).qweight

    pieces = np.concatenate([codes(weight[start : start + 7]) for start in range(0, 31, 7)])
    # another order of sums may change a code whose value is halfway between two
    assert (pieces != codes(weight)).mean() < 0.01


def test_gptq_in_8_bits_has_a_smaller_error_on_held_out_inputs() -> None:
    """Codes with a scale per row, compared on inputs of the same distribution that GPTQ did not use."""
    cols = 300
    x, weight = inputs_like_a_models(cols, 1200), rng(5).standard_normal((40, cols)).astype(np.float32)
    nearest, scales = quantize_rows(weight.copy())
    fitted = gptq_round_rows(weight, scales, factor_hessian(x[:600].T @ x[:600]))
    assert fitted.dtype == np.int8
    assert fitted.min() >= -127

    def loss(codes: np.ndarray) -> float:
        return float(np.linalg.norm(x[600:] @ (dequantize_rows(codes, scales) - weight).T))

    assert loss(fitted) < 0.5 * loss(nearest)


@pytest.mark.parametrize("cols", [1, 63, 64, 200, 600])
def test_the_hessian_factor(cols: int) -> None:
    """``lower lowerᵀ`` equals H plus damping, with the columns in ascending order of their inputs' sizes."""
    x = inputs_like_a_models(cols, 2 * cols + 10)
    hessian = x.T @ x
    order, lower = factor_hessian(hessian.copy())
    assert (np.diff(hessian.diagonal()[order]) >= 0).all()
    assert not np.triu(lower, 1).any()
    damped = hessian.astype(np.float64) + DAMPING * hessian.diagonal().mean() * np.eye(cols)
    product = lower.astype(np.float64) @ lower.T
    np.testing.assert_allclose(product, damped[np.ix_(order, order)], rtol=1e-4, atol=1e-5 * damped.max())


@pytest.mark.parametrize("name", ["zeros", "one token", "a dead channel", "twelve orders of magnitude"])
def test_a_singular_hessian(name: str) -> None:
    """A singular H has a factor, and the rounded weights are finite."""
    x = inputs_like_a_models(80, 1 if name == "one token" else 300)
    if name == "zeros":
        x[:] = 0
    elif name == "a dead channel":
        x[:, 7] = 0
    elif name.startswith("twelve"):
        x *= np.logspace(-6, 6, 80, dtype=np.float32)
    inputs = factor_hessian(x.T @ x)
    assert np.isfinite(inputs.lower).all()
    weight = rng(8).standard_normal((6, 80)).astype(np.float32)
    nearest = quantize_blocks(weight.copy(), 4, 16, True)
    back = dequantize_blocks(gptq_round_blocks(weight, nearest, inputs, 4, 16), 80, 4)
    assert np.isfinite(back).all()
    assert np.linalg.norm(x @ (back - weight).T) <= 1.01 * np.linalg.norm(
        x @ (dequantize_blocks(nearest, 80, 4) - weight).T
    )


def test_damping_is_raised_until_the_factor_exists() -> None:
    """Rounded to fp32, H may not be positive definite."""
    inputs = factor_hessian(np.array([[1, 2], [2, 1]], np.float32))
    assert np.isfinite(inputs.lower).all()


def test_min_p_sampling() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2, 0.5 * LEAST_SHARE * 0.99]], np.float32)).repeat(20000, 0)
    counts = np.bincount(choose(logits, rng()), minlength=4) / 20000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2, 0], atol=0.02)


def test_pieces_come_from_the_whole_text() -> None:
    assert [piece[0] for piece in pieces(range(10 * LENGTH), 4)] == [0, 3 * LENGTH, 6 * LENGTH, 9 * LENGTH]
    assert all(len(piece) == LENGTH for piece in pieces(range(LENGTH + 3), 2))


@pytest.fixture(scope="module")
def helper(checkpoint: Callable[[Tiny], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The temporary 8-bit package with which a build of the checkpoint is calibrated."""

    def get(folder: Path) -> tuple[CalibrationModel, Architecture]:
        with Checkpoint.open(folder) as opened:
            architecture, _ = architecture_of(opened)
        output = tmp_path_factory.mktemp("helper") / "int8"
        result = build(folder, output, precision="int8", threads=1)
        files = {part: name for part, (name, _, _) in result.parts.items()}
        return CalibrationModel(output, files, architecture), architecture

    return get


LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
OURS = {"self_attn.q_proj": "self_attn.qkv_proj"}


def sums_of_transformers(
    folder: Path, prefix: str, prompts: list[dict[str, Any]], image_token_id: int | None = None
) -> dict[str, np.ndarray]:
    """``Σ xᵀx`` of every matrix's inputs in transformers, by vlpack's paths, with the same weights of image tokens."""
    ids = np.concatenate([prompt["input_ids"].ravel() for prompt in prompts])
    images = ids == image_token_id
    counts = {True: min(1.0, (~images).sum() / max(images.sum(), 1)), False: 1.0}
    shares: list[np.ndarray] = []
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, np.ndarray] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(module: Any, args: tuple[Any, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).numpy()
            sums[name] = sums.get(name, 0) + (rows * shares[-1]).T @ rows

        return look

    for name, module in model.named_modules():
        for linear in LINEARS:
            if name.startswith(f"{prefix}.layers.") and name.endswith(linear):
                module.register_forward_pre_hook(watch(name.removesuffix(linear) + OURS.get(linear, linear)))
    model.lm_head.register_forward_pre_hook(watch("lm_head"))
    with torch.no_grad():
        for prompt in prompts:
            counted = [counts[token == image_token_id] for token in prompt["input_ids"].ravel().tolist()]
            shares.append(np.array(counted, np.float32)[:, None])
            model(**{name: torch.tensor(value) for name, value in prompt.items()})
    return sums


MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
WINDOWS = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
MIXTURE = Member("mixture", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", EXPERTS)
FAMILIES = [
    Member("qwen2", "Qwen2Config", "Qwen2ForCausalLM", tied=True),
    Member("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    Member(
        "qwen2.5-vl",
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {"rope_parameters": MROPE},
        WINDOWS | {"fullatt_block_indexes": [1]},
    ),
    MIXTURE,
]


def _name(which: Tiny | Member) -> str:
    return which.name if isinstance(which, Member) else f"qwen3-vl {which.style}"


@pytest.mark.parametrize("which", [Tiny(), Tiny(style="v4", tied=False, deepstack=(1, 2)), *FAMILIES], ids=_name)
def test_inputs_are_those_of_transformers(
    which: Tiny | Member,
    helper: Callable[..., Any],
    checkpoint: Callable[[Tiny], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hessians of every layer, for texts and pictures, in the basis of the package that is built with them.

    They differ by the rounding errors of the 8-bit package.
    """
    folder = checkpoint(which) if isinstance(which, Tiny) else make_member(tmp_path / "checkpoint", which)
    model, architecture = helper(folder)
    ids = rng(9).integers(10, FIRST_SPECIAL, (2, 1, 50))
    shown, prompts = [model.show(one) for one in ids], [{"input_ids": one} for one in ids]
    if facts := architecture.vision:
        builder = prompt_builder(folder, facts.image_token_id)
        assert builder is not None
        for prompt in pictured(builder)[:2]:
            shown.append(model.show(prompt.input_ids.astype(np.int64), prompt))
            prompts.append(prompt.transformers_arrays(facts.image_token_id, facts.video_token_id))
    facts = architecture.vision
    wanted = sums_of_transformers(folder, architecture.decoder.prefix, prompts, facts and facts.image_token_id)
    assert len(wanted) > architecture.text.num_hidden_layers
    monkeypatch.setattr(layers, "factor_hessian", lambda hessian: hessian)
    monkeypatch.setattr("vlpack.calibration.gram.ROWS", 64)
    names = {path: f"{path.replace('qkv_proj', 'q_proj')}.weight" for path in wanted}
    transforms = {weight.path: weight.transform for weight in Kept(folder, "int8").declared.values()}
    with Checkpoint.open(folder) as checkpoint_as_it_lies:
        _, opened = architecture_of(checkpoint_as_it_lies)
        for precision, calibrated in (("int8", False), ("int8", True), ("int4", True)):
            kept = Kept(folder, precision, calibrated=calibrated)
            asked = [kept.declared[name] for name in names.values()]
            collect = layers.Calibration(model, asked, transforms, opened, shown)
            kept.scales = collect.scales  # as in a build, scales follow from the measured sizes
            for path, sums in sorted(wanted.items(), key=lambda item: (item[0] == "lm_head", item[0])):
                got = np.asarray(collect(kept.declared[names[path]]))
                multiplied = kept.products(names[path], sums)
                apart = np.linalg.norm(got - multiplied) / np.linalg.norm(multiplied)
                assert apart < 0.1, f"{precision}, {path}: {apart:.3f}"


def test_gate_and_up_share_a_hessian(helper: Callable[..., Any], checkpoint: Callable[[Tiny], Path]) -> None:
    """The gate and up matrices multiply the same values, which the graph rotates once for each of them."""
    folder = checkpoint(Tiny())
    model, _ = helper(folder)
    transforms = {weight.path: weight.transform for weight in Kept(folder, "int8").declared.values()}
    declared = Kept(folder, "int4", calibrated=True).declared.values()
    gate, up = (
        next(weight for weight in declared if weight.path.endswith(f"layers.0.mlp.{name}_proj"))
        for name in ("gate", "up")
    )
    with Checkpoint.open(folder) as checkpoint_as_it_lies:
        _, opened = architecture_of(checkpoint_as_it_lies)
        collect = layers.Calibration(model, [gate, up], transforms, opened, [model.show(np.arange(20, 50)[None])])
        assert collect(gate) is collect(up)


def test_texts_are_generated_by_the_model(
    helper: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If only the likeliest token is chosen, the texts of a batch of openings are transformers' greedy answers."""
    monkeypatch.setattr("vlpack.calibration.teacher.LEAST_SHARE", 1.0)
    folder = make_member(tmp_path / "checkpoint", FAMILIES[1])
    model, _ = helper(folder)
    begun = [rng(seed).integers(10, FIRST_SPECIAL, length).tolist() for seed, length in enumerate([1, 7, 3] * 4)]
    texts = model.write(begun, 20, set(), 0, lambda done: None)
    live = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same = total = 0
    for opening, text in zip(begun, texts, strict=True):
        assert text[: len(opening)] == opening
        assert len(text) == 20
        with torch.no_grad():
            wanted = live(torch.tensor([text])).logits[0].argmax(-1)
        same += int((wanted[len(opening) - 1 : -1].numpy() == text[len(opening) :]).sum())
        total += 20 - len(opening)
    assert same / total > 0.8  # 8-bit rounding changes some tokens


def test_texts_end_and_are_reproducible(helper: Callable[..., Any], checkpoint: Callable[[Tiny], Path]) -> None:
    model, _ = helper(checkpoint(Tiny()))
    begun = [[11, 12], [13]]
    told: list[int] = []
    texts = model.write(begun, 30, set(), 3, told.append)
    assert told == sorted(told)
    assert told[-1] == 60
    assert texts == model.write(begun, 30, set(), 3, told.append) != model.write(begun, 30, set(), 4, told.append)
    assert len(model.write([[11, 12, 12], [13, 12, 12]], 30, {12}, 3, told.append)[0]) > 3
    end = texts[0][10]
    stopped = model.write(begun, 30, {end, 11}, 3, told.append)  # an end token within the opening does not end the text
    assert stopped[0] == texts[0][: texts[0].index(end, 2) + 1]


def test_openings_are_chats_and_documents(checkpoint: Callable[[Tiny], Path], tmp_path: Path) -> None:
    folder = checkpoint(Tiny())
    tokenizer, builder = Tokenizer.from_folder(folder), prompt_builder(folder, None)
    begun = openings(builder, tokenizer)
    assert len(begun) == TEXTS
    assert sum("<|im_start|>user" in tokenizer.decode(ids, skip_special_tokens=False) for ids in begun) == len(
        QUESTIONS
    )
    assert prompt_builder(tmp_path, None) is None
    plain = openings(None, tokenizer)
    assert len(plain) == TEXTS
    assert not any("<|im_start|>" in tokenizer.decode(ids, skip_special_tokens=False) for ids in plain)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def manifest(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "vlpack.json").read_text(encoding="utf-8"))
    return values


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "digits"
    build(DIGITS, folder, precision="int4", calibrate="self", threads=1)
    return folder


def test_a_whole_build(calibrated: Path, tmp_path: Path) -> None:
    """Builds are reproducible with any number of threads and leave no 8-bit package behind; vision is not changed."""
    build(DIGITS, tmp_path / "again", precision="int4", calibrate="self", threads=3)
    build(DIGITS, tmp_path / "without", precision="int4", extra_options=parse_extra_options(["block_size=128"]))
    assert hashes(calibrated) == hashes(tmp_path / "again")
    assert [path.name for path in calibrated.parent.iterdir()] == ["digits"]
    with_it, without = manifest(calibrated), manifest(tmp_path / "without")
    assert with_it["calibration"]["pictures"] == 4
    assert with_it["calibration"]["tokens"] > 1000
    assert "calibration" not in without
    assert with_it["policy"][-1]["storage"] == "int4 block 128 asymmetric 8-bit scales calibrated"
    assert with_it["files"]["vision.onnx.data"] == without["files"]["vision.onnx.data"]
    ours, others = (hashes(folder)["decoder.onnx.data"] for folder in (calibrated, tmp_path / "without"))
    assert ours != others


def test_a_calibrated_package_reads_the_digits(calibrated: Path) -> None:
    """A calibrated package answers the demo's questions in the stock runtime."""
    from vlpack.demo import QUESTIONS
    from vlpack.runtime.model import Model
    from vlpack.runtime.sampling import Sampling
    from vlpack.shipped import examples_folder

    images = examples_folder() / "digits-images"
    answers = json.loads((images / "answers.json").read_text(encoding="utf-8"))
    model = Model(calibrated)
    right = 0
    for name, truth in list(answers.items())[:12]:
        answer = model.generate(QUESTIONS["read"], [images / name], max_tokens=16, sampling=Sampling(temperature=0))
        right += answer.text.split() == truth["read"].split()
    assert right >= 10


def test_verification_knows_calibrated_weights(calibrated: Path, tmp_path: Path) -> None:
    from vlpack.verification import verify

    report = verify(calibrated, DIGITS, tokens=4)
    assert report.ok, report.findings
    fitted = [weight for weight in report.weights if "calibrated" in weight.storage]
    assert fitted
    assert all(weight.error > weight.expected for weight in fitted)


@pytest.mark.parametrize(("array", "words"), [("scales", "weights"), ("qweight", "weights")])
def test_verification_reports_altered_calibrated_weights(
    array: str, words: str, calibrated: Path, tmp_path: Path
) -> None:
    """Altered scales differ from those of the nearest codes, and altered codes are far from the nearest ones."""
    import onnx_ir as ir

    from vlpack.verification import verify

    folder = tmp_path / "other"
    shutil.copytree(calibrated, folder)
    path = "model.language_model.layers.1.mlp.down_proj"
    tensor = ir.load(folder / "decoder.onnx").graph.initializers[f"{path}.{array}"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with open(folder / "decoder.onnx.data", "r+b") as file:
        file.seek(tensor.offset or 0)
        data = np.frombuffer(file.read(tensor.nbytes), np.uint8).copy()
        file.seek(tensor.offset or 0)
        data = data ^ (1 if array == "scales" else 0x88)
        file.write(data.tobytes())
    seal(folder)
    report = verify(folder, DIGITS, tokens=2)
    assert any(finding.stage == words and path in finding.message for finding in report.findings), report.findings


def test_calibrated_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An int8 build has GPTQ's codes, and its manifest has all channel scales, which verification needs."""
    used: list[ChannelScales] = []
    start = "vlpack.calibration.run.start_calibration"

    def watched(*given: Any) -> layers.Calibration:
        calibration = start_calibration(*given)
        used.append(calibration.scales)
        return calibration

    monkeypatch.setattr(start, watched)
    build(DIGITS, tmp_path / "fitted", precision="int8", calibrate="self")
    build(DIGITS, tmp_path / "nearest", precision="int8")
    described = manifest(tmp_path / "fitted")
    assert "int8 calibrated" in {rule["storage"] for rule in described["policy"]}
    names = [f"{part}.onnx.data" for part in ("vision", "decoder")]
    same = [described["files"][name] == manifest(tmp_path / "nearest")["files"][name] for name in names]
    assert same == [True, False]
    scales = unpacked_scales(described["calibration"]["scales"])
    kept = Kept(DIGITS, "int8", calibrated=True)
    channels = {side for weight in kept.declared.values() for side in transform_sides(weight) if side is not None}
    assert len(channels) > 10
    for one in channels:
        np.testing.assert_array_equal(scales[one.name], used[0](one))
    from vlpack.verification import verify

    report = verify(tmp_path / "fitted", DIGITS, tokens=2)
    assert report.ok, report.findings


def transform_sides(weight: Weight) -> tuple[Channels | None, Channels | None]:
    return weight.transform.reads, weight.transform.writes


def test_scales_are_written_and_read() -> None:
    exponents = {"norm:0": np.array([0, 3, -10, 10] * 100, np.int8), "up:5": np.zeros(1, np.int8)}
    packed = packed_scales(exponents)
    assert json.loads(json.dumps(packed)) == packed
    for name, scales in unpacked_scales(packed).items():
        np.testing.assert_array_equal(scales, np.exp2(exponents[name].astype(np.float32)))


DAMAGED = {
    "no text": 7,
    "not base64": "?",
    "not compressed": base64.b64encode(b"plain").decode(),
    "cut off": base64.b64encode(zlib.compress(bytes(1000))[:-3]).decode(),
    "too long": base64.b64encode(zlib.compress(bytes(MAX_CHANNELS + 1))).decode(),
    "out of range": base64.b64encode(zlib.compress(bytes([0, 100]))).decode(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_scales_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the scales of norm:0"):
        unpacked_scales({"norm:0": DAMAGED[name]})  # type: ignore[dict-item]


@pytest.mark.parametrize("entry", ["a text", {"": "?"}, "fewer"])
def test_verification_refuses_damaged_scales(entry: Any, calibrated: Path, tmp_path: Path) -> None:
    """Damaged scales are reported before anything is compared."""
    from vlpack.verification import verify

    folder = tmp_path / "other"
    shutil.copytree(calibrated, folder)
    described = manifest(folder)
    scales = described["calibration"]["scales"]
    if entry == "fewer":
        name = next(iter(scales))
        exponents = np.rint(np.log2(unpacked_scales(scales)[name])).astype(np.int8)
        entry = {**scales, **packed_scales({name: exponents[1:]})}
    described["calibration"]["scales"] = entry
    (folder / "vlpack.json").write_text(json.dumps(described), encoding="utf-8")
    seal(folder)
    with pytest.raises(PackageError, match="channel scales"):
        verify(folder, DIGITS, tokens=2)


def test_a_file_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "own.txt"
    text.write_text(
        "The river rose in the night, and by morning the fields stood under water. " * 200, encoding="utf-8"
    )
    said = vlpack(capsys, "build", DIGITS, "-p", "int4", "--part", "text", "--calibrate", text, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    described = manifest(tmp_path / "out")["calibration"]
    assert described["texts"] == "a file"
    assert described["tokens"] >= 1024


def conversation(image: str, words: str = "What is written in this picture, and how large is it?") -> dict[str, Any]:
    content = [{"type": "image", "path": image}, {"type": "text", "text": words}]
    answer = {"role": "assistant", "content": "Four digits stand there, one beside the other. " * 8}
    return {"messages": [{"role": "user", "content": content}, answer]}


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """A JSONL file of conversations with images in a folder beside it."""
    (tmp_path / "data" / "seen").mkdir(parents=True)
    picture(320, 224, 1).save(tmp_path / "data" / "seen" / "a.png")
    path = tmp_path / "data" / "own.jsonl"
    path.write_text((json.dumps(conversation("seen/a.png")) + "\n") * 6, encoding="utf-8")
    return path


def test_a_file_of_conversations(
    conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image paths are relative to the file; the built-in pictures are omitted, because the user gives some."""
    monkeypatch.chdir(tmp_path)
    said = vlpack(capsys, "build", DIGITS, "-p", "int4", "--calibrate", conversations, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    described = manifest(tmp_path / "out")["calibration"]
    assert described["texts"] == "a file"
    assert described["pictures"] == 6
    assert described["tokens"] >= 1024


def test_conversations_are_whole_prompts(conversations: Path) -> None:
    """Prompts contain the last answer of a conversation, and no header of another answer follows it."""
    builder = prompt_builder(DIGITS, Checkpoint.open(DIGITS).config["image_token_id"])
    made = conversations_of(conversations, builder)
    assert len(made) == 6
    assert all(prompt.has_images and prompt.text.rstrip().endswith("<|im_end|>") for prompt in made)


LINES = {
    "not JSON": ("{", "line 2 is not JSON"),
    "no messages": ('{"prompt": "a"}', "line 2 has no 'messages'"),
    "an unknown role": ('{"messages": [{"content": "a"}]}', "line 2: Message 1 has no 'role'"),
    "a missing image": (json.dumps(conversation("seen/none.png")), "line 2: There is no image file seen/none.png"),
    "no image": (json.dumps(conversation("own.jsonl")), "line 2: .*own.jsonl is not an image"),
    "a long one": (json.dumps(conversation("seen/a.png", "words " * 5000)), "line 2 has .* tokens; at most 4096"),
}


@pytest.mark.parametrize("name", LINES)
def test_unusable_lines_of_conversations(name: str, conversations: Path) -> None:
    line, words = LINES[name]
    lines = conversations.read_text(encoding="utf-8").splitlines()
    conversations.write_text("\n".join([lines[0], line, *lines[1:]]), encoding="utf-8")
    builder = prompt_builder(DIGITS, Checkpoint.open(DIGITS).config["image_token_id"])
    with pytest.raises(InputError, match=f"own.jsonl, {words}"):
        conversations_of(conversations, builder)


def test_conversations_need_a_chat_template(conversations: Path) -> None:
    with pytest.raises(OptionError, match="no chat template"):
        conversations_of(conversations, None)


def test_images_count_at_most_as_much_as_words() -> None:
    """With ten image tokens and four words, the products of image tokens are multiplied by 0.4."""
    few, many = np.array([True, False]), np.array([True] * 9 + [False])
    shown = [Shown({}, 2, few), Shown({}, 10, many), Shown({}, 2)]
    assert layers.row_factors([shown[0], shown[2]]) == [None, None]
    factors = layers.row_factors(shown)
    assert factors[2] is None
    sums = Gram(5)
    x = rng().standard_normal((14, 5)).astype(np.float32)
    for rows, one in zip(np.split(x, [2, 12]), factors, strict=True):
        sums.add(rows, one)
    images = np.concatenate([few, many, [False, False]])
    wanted = x[~images].T @ x[~images] + 0.4 * x[images].T @ x[images]
    np.testing.assert_allclose(sums.total(), wanted, rtol=1e-5, atol=1e-6)
    assert sums.rows == pytest.approx(8)


def test_a_calibrated_head_and_the_embedding(tmp_path: Path) -> None:
    """A 4-bit head is calibrated, too; the embedding has no inputs to calibrate with and keeps 8 bits."""
    options = parse_extra_options(["matmul_mixed_precision=last_matmul:int4,mixed_layers:int8", "is_symmetric=false"])
    build(DIGITS, tmp_path / "out", precision="int4", calibrate="self", extra_options=options)
    storages = {rule["role"]: rule["storage"] for rule in manifest(tmp_path / "out")["policy"]}
    assert storages["text.head"] == "int4 block 128 asymmetric 8-bit scales calibrated"
    assert storages["text.embedding"] == "int8 block 128 asymmetric"


MISTAKES = {
    "another precision": (["-p", "fp16", "--calibrate", "self"], "needs the precision int8 or int4"),
    "no decoder": (["-p", "int4", "--part", "vision", "--calibrate", "self"], "--part vision"),
    "no such file": (["-p", "int4", "--calibrate", "nowhere.txt"], "no calibration file nowhere.txt"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_options_that_exclude_calibration(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, words = MISTAKES[name]
    said = vlpack(capsys, "build", DIGITS, "-o", tmp_path / "out", *options)
    assert said.code == 2
    assert words in said.err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("data", "words"), [(b"short", "calibration needs 1024"), (b"\xff\xfe\xff", "not UTF-8")])
def test_unusable_calibration_files(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(OptionError, match=words):
        texts_of(tmp_path / "text", Tokenizer.from_folder(DIGITS))
