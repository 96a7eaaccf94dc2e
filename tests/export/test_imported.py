"""Packages of quantized checkpoints: which matrices keep their codes, and what becomes of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import quantized
from family import Member, make_member
from parity import Package, Reference, make_inputs, relative
from quantized import Format, Matrix, quantize
from samples import content, vlpack
from tiny import Tiny, make_checkpoint
from vlpack.architectures import architecture_of
from vlpack.builder import build
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import OptionError
from vlpack.export.graph import Weight
from vlpack.inspection import inspect
from vlpack.options import ExtraOptions, parse_extra_options
from vlpack.package.manifest import read_manifest
from vlpack.quantize.blocks import unpack
from vlpack.verification.weights import Parameters, Weights, policy_of

KEPT: dict[str, tuple[Format, str, str]] = {
    "pack": (quantized.compressed(), "int4", "int4 block 32 kept"),
    "pack-zeros": (quantized.compressed(symmetric=False, dtype=np.float32), "int4", "int4 block 32 asymmetric kept"),
    "pack-channel": (quantized.compressed(group=-1, symmetric=False), "int4", "int4 block 64 asymmetric kept"),
    "int-quantized": (quantized.int_quantized(), "int8", "int8 kept"),
    "awq": (quantized.awq(16), "int4", "int4 block 16 asymmetric kept"),
    "gptq": (quantized.gptq(), "int4", "int4 block 32 kept"),
    "gptq-v2": (quantized.gptq(symmetric=False, version=2), "int4", "int4 block 32 asymmetric kept"),
    "gptq-zeros": (quantized.gptq(symmetric=False), "int4", "int4 block 32 asymmetric kept"),
}
"""Name → format, the precision that a package gets by default, and the storage of the matrices with 64 columns."""
WEIGHTS_ALONE = {
    "pack-int8": quantized.compressed(bits=8, symmetric=False),
    "pack-int8-channel": quantized.compressed(bits=8, group=-1),
    "gptq-v2": quantized.gptq(bits=8, symmetric=False, version=2),
    "int8": quantized.int8(),
}
"""Name → format with 8-bit weights whose inputs the checkpoint's own model does not round."""
PLAIN = Tiny(layers=2, depth=1, deepstack=(0,))


@pytest.fixture(scope="module")
def copies(
    checkpoint: Callable[[Tiny], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, dict[str, Matrix]]]:
    """Returns the folder of a quantized copy of a tiny checkpoint, and its matrices."""

    def get(form: Format, **chosen: Any) -> tuple[Path, dict[str, Matrix]]:
        folder = tmp_path_factory.mktemp("imported") / "checkpoint"
        return folder, quantize(checkpoint(PLAIN), folder, form, **chosen)

    return get


def stored(package: Path, checkpoint: Path) -> tuple[Weights, dict[str, Weight]]:
    """The weights of a package's decoder, by path; they must be closed with ``weights.checkpoint.close()``."""
    manifest = read_manifest(package)
    architecture, named = architecture_of(Checkpoint.open(checkpoint))
    graphs = {
        part["name"]: ir.load(package / file) for file, part in manifest["parts"].items() if part["name"] != "embedding"
    }
    policy = policy_of(manifest, architecture.precision_facts)
    weights = Weights(architecture, named, policy, graphs, manifest.get("calibration", manifest.get("imported")))
    return weights, {weight.path: weight for _, weight in weights.all()}


def outcome(package: Path) -> dict[str, tuple[str, str]]:
    """What a package's description says of each group of matrices, by the last two words of its name."""
    groups = inspect(package)["imported"]["groups"]
    return {group["modules"].partition("*.")[2]: (group["done"], group["why"]) for group in groups}


@pytest.mark.parametrize("name", KEPT)
def test_codes_are_kept(name: str, copies: Callable[..., tuple[Path, dict[str, Matrix]]], tmp_path: Path) -> None:
    form, precision, label = KEPT[name]
    folder, matrices = copies(form)
    result = build(folder, tmp_path / "package", threads=2)
    manifest = read_manifest(tmp_path / "package")
    assert manifest["precision"] == precision
    assert any("All 10 quantized matrices of the model keep" in note for note in result.notes)
    assert {done for done, _ in outcome(tmp_path / "package").values()} == {"kept"}
    weights, by_path = stored(tmp_path / "package", folder)
    for layer in range(2):
        stem = f"model.language_model.layers.{layer}"
        for path, names in {
            f"{stem}.self_attn.qkv_proj": [f"{stem}.self_attn.{one}_proj" for one in "qkv"],
            f"{stem}.mlp.down_proj": [f"{stem}.mlp.down_proj"],
        }.items():
            weight, parts = by_path[path], [matrices[f"{one}.weight"] for one in names]
            arrays = weights.held("decoder", weight)
            codes, scales, zeros = (
                np.concatenate([getattr(part, what) for part in parts]) for what in ("codes", "scales", "zeros")
            )
            if weight.cols == 64:
                assert weight.storage.label == label
            if "block" not in weight.storage.label:
                np.testing.assert_array_equal(arrays["qweight"].T.view(np.uint8) ^ 128, codes)
                np.testing.assert_array_equal(arrays["scales"][:, None], scales)
                continue
            bits = 4 if "int4" in weight.storage.label else 8
            repeats = arrays["scales"].shape[1] // scales.shape[1]
            np.testing.assert_array_equal(unpack(arrays["qweight"], bits).reshape(len(codes), -1), codes)
            np.testing.assert_array_equal(arrays["scales"], np.repeat(scales, repeats, axis=1))
            if "zero_points" in arrays:
                packed = unpack(arrays["zero_points"], bits)[:, : arrays["scales"].shape[1]]
                np.testing.assert_array_equal(packed, np.repeat(zeros, repeats, axis=1))
            else:
                assert (zeros == 1 << (bits - 1)).all()
            values = np.concatenate([part.values for part in parts])
            np.testing.assert_array_equal(weights.stored("decoder", weight), values)
        norm = by_path[f"{stem}.input_layernorm.weight"]
        assert norm.transform.is_identity  # its channels are read by kept matrices only
    weights.checkpoint.close()


@pytest.mark.parametrize("name", WEIGHTS_ALONE)
def test_8_bits_of_weights_alone_are_rounded_again_with_rotation(
    name: str, copies: Callable[..., tuple[Path, dict[str, Matrix]]], tmp_path: Path
) -> None:
    """Inputs with outliers, rounded without rotation, would cost a hundred times what rounding the weights costs."""
    folder, _ = copies(WEIGHTS_ALONE[name])
    for source, package in ((folder, "package"), (folder.with_name("checkpoint-values"), "plain")):
        build(source, tmp_path / package, threads=2)
    one, two = content(tmp_path / "package"), content(tmp_path / "plain")
    assert one["decoder.onnx.data"] == two["decoder.onnx.data"]
    found = outcome(tmp_path / "package")
    assert {done for done, _ in found.values()} == {"rounded again"}
    assert all("whose inputs are not rounded" in why for _, why in found.values())


@pytest.mark.parametrize("form", [quantized.fp8(), quantized.nf4(), quantized.gptq(desc_act=True, symmetric=False)])
def test_fp32_packages_have_the_dequantized_values(
    form: Format, copies: Callable[..., tuple[Path, dict[str, Matrix]]], tmp_path: Path
) -> None:
    folder, _ = copies(form)
    for source, package in ((folder, "package"), (folder.with_name("checkpoint-values"), "plain")):
        build(source, tmp_path / package, precision="fp32", threads=2)
    one, two = content(tmp_path / "package"), content(tmp_path / "plain")
    for name in ("decoder.onnx", "decoder.onnx.data", "vision.onnx.data"):
        assert one[name] == two[name]


@pytest.mark.parametrize("name", ["pack-zeros", "awq", "gptq"])
def test_logits_of_kept_codes(name: str, copies: Callable[..., tuple[Path, dict[str, Matrix]]], tmp_path: Path) -> None:
    folder, matrices = copies(KEPT[name][0])
    extra = parse_extra_options(["prune_lm_head=false", "accuracy_level=1"])
    build(folder, tmp_path / "package", vision_precision="fp32", extra_options=extra, threads=2)
    reference, inputs = Reference(folder.with_name("checkpoint-values")), make_inputs(PLAIN, ((1, 4, 6),))
    weights, _ = stored(tmp_path / "package", folder)
    parameters = Parameters(weights, stored=True)
    positions = reference(inputs).positions

    def rounded(tensor: str, weight: np.ndarray) -> np.ndarray:
        if tensor in matrices:
            return matrices[tensor].values
        if "visual" in tensor:
            return weight
        return parameters("lm_head.weight" if "embed_tokens" in tensor else tensor, weight.shape)

    with reference.with_weights(rounded):
        expected = reference.forward(inputs).logits
    weights.checkpoint.close()
    assert relative(Package(tmp_path / "package").logits(inputs, positions), expected) < 1e-5


@pytest.mark.parametrize(
    ("form", "done", "why"),
    [
        (quantized.gptq(desc_act=True), "rounded again", "desc_act"),
        (quantized.compressed(actorder=True), "rounded again", "actorder"),
        (quantized.fp8(), "rounded again", "FP8"),
        (quantized.nf4(), "rounded again", "codebook"),
        (quantized.compressed(group=8), "rounded again", "groups of 8"),
    ],
)
def test_what_has_no_place_is_rounded_again(
    form: Format, done: str, why: str, copies: Callable[..., tuple[Path, dict[str, Matrix]]], tmp_path: Path
) -> None:
    result = build(copies(form)[0], tmp_path / "package", part="text", threads=2)
    assert all(found == done and why in reason for found, reason in outcome(tmp_path / "package").values())
    assert any(why in note and "rounded again" in note for note in result.notes)
    weights, by_path = stored(tmp_path / "package", copies(form)[0])
    assert by_path["model.language_model.layers.0.mlp.up_proj"].transform.input_rotation > 1
    weights.checkpoint.close()


def test_a_stack_is_kept_only_as_a_whole(copies: Callable[..., tuple[Path, dict[str, Matrix]]], tmp_path: Path) -> None:
    folder, _ = copies(quantized.awq(), chosen=lambda name: quantized.in_decoder(name) and "k_proj" not in name)
    build(folder, tmp_path / "package", part="text", threads=2)
    found = outcome(tmp_path / "package")
    assert found["self_attn.qkv_proj"] == ("rounded again", "only some of its parts are quantized")
    assert found["self_attn.o_proj"] == ("kept", "")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"precision": "int8"}, "it has 4 bits there and 8 here"),
        ({"precision": "fp32"}, "the precision stores it in float32"),
        ({"extra_options": ExtraOptions(block_size=64)}, "block_size=64 asks for it"),
        ({"extra_options": ExtraOptions(rotation=True)}, "rotation=True asks for it"),
    ],
)
def test_options_are_obeyed(
    options: dict[str, Any], why: str, copies: Callable[..., tuple[Path, dict[str, Matrix]]], tmp_path: Path
) -> None:
    result = build(copies(quantized.awq())[0], tmp_path / "package", part="text", threads=2, **options)
    manifest = read_manifest(tmp_path / "package")
    assert manifest["precision"] == options.get("precision", "int4")
    assert not any("kept" in rule["storage"] for rule in manifest["policy"])
    assert any(why in note for note in result.notes)
    assert {found[1] for found in outcome(tmp_path / "package").values()} == {why}


def test_calibration_without_effect(copies: Callable[..., tuple[Path, dict[str, Matrix]]], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="calibrate has no effect"):
        build(copies(quantized.awq())[0], tmp_path / "package", precision="int4", calibrate="self")
    assert not (tmp_path / "package").exists()


def test_a_quantized_head_and_zero_biases(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", PLAIN.but(tied=False))
    folder = tmp_path / "checkpoint"
    quantize(source, folder, quantized.gptq(), lambda name: quantized.in_decoder(name) or name == "lm_head.weight")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    bias = "model.language_model.layers.0.mlp.up_proj.bias"
    save_file({**tensors, bias: np.zeros(96, np.float16)}, folder / "model.safetensors")
    build(folder, tmp_path / "package", part="text", threads=2)
    groups = {one["modules"]: one for one in inspect(tmp_path / "package")["imported"]["groups"]}
    assert groups["lm_head"]["storage"] == "int4 block 32 kept"


@pytest.mark.parametrize("form", [quantized.gptq(symmetric=False), quantized.int_quantized()])
def test_experts(form: Format, tmp_path: Path) -> None:
    text = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    member = Member("imported mixture", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**text, "mlp_only_layers": []})
    source, folder = make_member(tmp_path / "source", member), tmp_path / "checkpoint"
    quantize(source, folder, form, lambda name: "proj" in name)
    extra = parse_extra_options(["prune_lm_head=false", "accuracy_level=1"])
    build(folder, tmp_path / "package", extra_options=extra, threads=2)
    assert {done for done, _ in outcome(tmp_path / "package").values()} == {"kept"}
    weights, _ = stored(tmp_path / "package", folder)
    for result in weights.compare():
        assert result.same, result
        assert result.error == 0 or "kept" not in result.storage
    weights.checkpoint.close()
    plain = tmp_path / "plain"
    build(
        folder.with_name("checkpoint-values"),
        plain,
        precision="fp32",
        extra_options=parse_extra_options(["prune_lm_head=false"]),
    )
    ids = np.random.default_rng(3).integers(0, 2048, (1, 24))
    both = []
    for place in (tmp_path / "package", plain):
        package = Package(place)
        ports = [port for port in package.sessions["decoder"].get_inputs() if port.name.startswith("past")]
        past = {port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32) for port in ports}
        tokens = {"input_ids": ids, "attention_mask": np.ones((1, 24), np.int64), "position_ids": np.arange(24)[None]}
        both.append(package.run("decoder", **tokens, **past)["logits"])
    assert relative(*both) < 0.05  # the head and the embedding have 8 bits


def test_lora_on_kept_codes(copies: Callable[..., tuple[Path, dict[str, Matrix]]], tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    folder, matrices = copies(quantized.awq())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = "model.language_model.layers.1.mlp.up_proj"
    random = np.random.default_rng(0)
    a, b = random.normal(0, 0.1, (2, 64)).astype(np.float32), random.normal(0, 0.1, (96, 2)).astype(np.float32)
    prefix = f"base_model.model.{stem}.lora_"
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    build(folder, tmp_path / "package", part="text", precision="fp32", lora=adapter, threads=2)
    weights, by_path = stored(tmp_path / "package", folder)
    expected = matrices[f"{stem}.weight"].values + b @ a
    assert relative(weights.stored("text", by_path[stem]), expected) < 1e-6
    weights.checkpoint.close()
    build(folder, tmp_path / "kept", part="text", lora=adapter, threads=2)
    groups = inspect(tmp_path / "kept")["imported"]["groups"]
    found = {(group["modules"].rpartition(".")[2], group["done"], group["count"], group["why"]) for group in groups}
    changed = ("up_proj", "rounded again", 1, "an adapter changes it")
    assert {("up_proj", "kept", 1, ""), changed, ("gate_proj", "kept", 2, "")} <= found


@pytest.mark.parametrize(("form", "done"), [(quantized.awq(), "kept"), (quantized.fp8(), "rounded again")])
def test_inspect(
    form: Format,
    done: str,
    copies: Callable[..., tuple[Path, dict[str, Matrix]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = copies(form)
    build(folder, tmp_path / "package", part="text", threads=2)
    for place, key in ((folder, "quantized"), (tmp_path / "package", "imported")):
        described = inspect(place)[key]
        assert {group["done"] for group in described["groups"]} == {done}
        shown = vlpack(capsys, "inspect", str(place))
        assert f"quantized: {described['format']}" in shown.out
        assert f"2 × model.language_model.layers.*.mlp.down_proj {done}" in shown.out
    (folder / "model.safetensors").unlink()
    assert inspect(folder)["quantized"] == {"format": described["format"], "bits": described["bits"]}
