"""Vision encoders in GGUF files (mmproj): features, logits and answers of packages, and files that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from family import ROPE, Member, make_member
from gguf_files import matrices_as, write
from gguf_vision import Change, set_values, write_both, write_mmproj
from parity import Inputs, Package, make_inputs, relative
from samples import vlpack
from tiny import EXAMPLE, IMAGE, Tiny
from vlpack.builder import build
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.demo import QUESTIONS
from vlpack.errors import CheckpointError, OptionError
from vlpack.inspection import inspect
from vlpack.options import parse_extra_options
from vlpack.package.manifest import read_manifest
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling
from vlpack.shipped import examples_folder

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TOLERANCE = 1e-5
SIZES: dict[str, Any] = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
QWEN3: dict[str, Any] = SIZES | {"num_position_embeddings": 64, "deepstack_visual_indexes": [2, 0]}
QWEN3 |= {"hidden_act": "gelu_pytorch_tanh"}
INTERLEAVED = {"head_dim": 32, "rope_parameters": ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}}
CHUNKED = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def member(family: str, text: dict[str, Any], vision: dict[str, Any]) -> Member:
    return Member(family, f"{family}Config", f"{family}ForConditionalGeneration", text=text, vision=vision)


QWEN3_VL = member("Qwen3VL", INTERLEAVED, QWEN3)
MOE = member("Qwen3VLMoe", INTERLEAVED | EXPERTS, QWEN3)
QWEN2_5_VL = member("Qwen2_5_VL", CHUNKED, SIZES | {"window_size": 112, "fullatt_block_indexes": [1]})
QWEN2_VL = member("Qwen2VL", CHUNKED, {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2})
CASES: dict[str, tuple[Member, Type, dict[str, Any]]] = {
    "F32": (QWEN3_VL, Type.F32, {}),
    "F16": (QWEN3_VL, Type.F16, {"frames": (Type.F16, Type.F32)}),
    "Q8_0": (QWEN3_VL, Type.Q8_0, {}),
    "experts": (MOE, Type.F16, {}),
    "Qwen2.5-VL in Q8_0": (QWEN2_5_VL, Type.Q8_0, {}),
    "Qwen2-VL": (QWEN2_VL, Type.F16, {}),
    "Qwen2-VL of 2024": (QWEN2_VL, Type.F32, {"legacy": True}),
}


def reference_outputs(model: Any, inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The image features with all DeepStack levels, the logits and the positions of transformers' model."""
    ids, pixels, grid = torch.tensor(inputs.ids), torch.tensor(inputs.pixels), torch.tensor(inputs.grid)
    kinds = (ids == IMAGE).int()
    positions, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grid)
    with torch.no_grad():
        out = model.model.visual(pixels, grid_thw=grid)
        levels = getattr(out, "deepstack_features", None) or []
        features = torch.cat([out.pooler_output, *levels], dim=-1).numpy()
        logits = model(
            input_ids=ids, position_ids=positions, use_cache=False, pixel_values=pixels, image_grid_thw=grid,
            mm_token_type_ids=kinds,
        ).logits.numpy()  # fmt: skip
    return features, logits, positions.numpy()


@pytest.mark.parametrize("name", CASES)
def test_features_and_logits(name: str, tmp_path: Path) -> None:
    case, kind, settings = CASES[name]
    checkpoint = make_member(tmp_path / "checkpoint", case)
    values = write_both(checkpoint, tmp_path / "gguf", kind, **settings)
    options = parse_extra_options(["prune_lm_head=false"])
    build(tmp_path / "gguf", tmp_path / "package", precision="fp32", extra_options=options, threads=1)
    model = case.model.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    set_values(model, values)
    inputs = make_inputs(Tiny(), ((1, 10, 22),))
    features, logits, positions = reference_outputs(model, inputs)
    package = Package(tmp_path / "package")
    assert relative(package.features(inputs), features) < TOLERANCE
    assert relative(package.logits(inputs, positions), logits) < TOLERANCE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_member(tmp_path_factory.mktemp("vision") / "checkpoint", QWEN3_VL)


def answers(package: Path) -> list[str]:
    """The answers to one question about each of the shipped images."""
    model, greedy = Model(package, threads=1), Sampling(temperature=0)
    images = sorted((examples_folder() / "digits-images").glob("*.png"))
    return [model.generate(QUESTIONS["read"], [image], max_tokens=12, sampling=greedy).text for image in images]


def test_answers_of_the_trained_model(tmp_path: Path) -> None:
    """With the image settings of the original beside it, the package has the original's graphs and answers."""
    folder = tmp_path / "digits-GGUF"
    write_both(EXAMPLE, folder, Type.BF16)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    result = build(folder, tmp_path / "package", precision="fp32", threads=1)
    assert not result.notes
    build(EXAMPLE, tmp_path / "wanted", precision="fp32", threads=1)
    for name in ("vision.onnx", "embedding.onnx", "decoder.onnx"):
        for end in ("", ".data"):
            ours, wanted = tmp_path / "package" / f"{name}{end}", tmp_path / "wanted" / f"{name}{end}"
            assert ours.is_file() == wanted.is_file()
            assert not ours.is_file() or ours.read_bytes() == wanted.read_bytes(), ours.name
    found = answers(tmp_path / "package")
    assert len(found) == 24
    assert found == answers(tmp_path / "wanted")


def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_both(checkpoint, tmp_path / "gguf", Type.BF16)
    model, mmproj, package = tmp_path / "gguf" / "model.gguf", tmp_path / "gguf" / "mmproj.gguf", tmp_path / "package"
    assert vlpack(capsys, "build", model, "--mmproj", mmproj, "-o", package, "-p", "fp32", "--threads", 1).code == 0
    manifest = read_manifest(package)
    assert manifest["source"]["architecture"] == "Qwen3VLForConditionalGeneration"
    assert list(manifest["source"]["files"]) == ["mmproj.gguf", "model.gguf"]
    settings = json.loads((package / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert settings["size"] == {"shortest_edge": 65536, "longest_edge": 16777216}
    assert settings["image_mean"] == [0.5, 0.5, 0.5]
    done = vlpack(capsys, "inspect", model, "--mmproj", mmproj, "--json")
    description = json.loads(done.out)
    assert description["deepstack_levels"] == 2
    assert set(description["files"]) == {"model.gguf", "mmproj.gguf"}
    assert any("published ones of Qwen3-VL: images of 65536 to 16777216" in note for note in description["notes"])
    assert vlpack(capsys, "run", package, "--image", next((examples_folder() / "digits-images").glob("*.png")),
                  QUESTIONS["read"], "--max-tokens", 4).code == 0  # fmt: skip
    done = vlpack(capsys, "verify", package, "--reference", model, "--mmproj", mmproj, "--prompt", "Hi", "--tokens", 2)
    assert done.code == 0, done.out + done.err
    alone = vlpack(capsys, "build", model, "-o", tmp_path / "alone", "--threads", 1)
    assert alone.code == 0
    assert "give the model's vision encoder (mmproj-….gguf) with --mmproj" in " ".join(alone.out.split())


def test_kept_codes(checkpoint: Path, tmp_path: Path) -> None:
    """Without a precision, the matrices of both files keep their codes, also those that are stored apart."""
    for number, case in enumerate((QWEN3_VL, QWEN2_5_VL)):
        folder = checkpoint if case is QWEN3_VL else make_member(tmp_path / "other", case)
        write_both(folder, tmp_path / f"gguf{number}", Type.Q8_0)
        result = build(tmp_path / f"gguf{number}", tmp_path / f"package{number}", threads=1)
        manifest = read_manifest(tmp_path / f"package{number}")
        weights = manifest["parts"]["vision.onnx"]["weights"]
        assert weights["model.visual.blocks.1.attn.qkv"]["storage"] == "int8 kept"  # one block is a whole row
        inner = "merger.linear_fc1" if case is QWEN3_VL else "merger.mlp.0"
        assert weights[f"model.visual.{inner}"]["storage"] == "int8 block 32 kept"
        assert "kept" not in weights["model.visual.patch_embed.proj"]["storage"]
        assert any("keep their codes and scales, without any loss" in note for note in result.notes), result.notes


def test_limits_and_tokens_that_the_files_have(checkpoint: Path, tmp_path: Path) -> None:
    def limits(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("clip.vision.image_min_pixels", 1024)
        writer.add_uint32("clip.vision.image_max_pixels", 4096)

    write_both(checkpoint, tmp_path / "gguf", Type.F16, change=limits)
    with Checkpoint.open(tmp_path / "gguf") as opened:
        images = opened.json("preprocessor_config.json")
        assert images is not None
        assert images["size"] == {"shortest_edge": 1024, "longest_edge": 4096}
        assert opened.config["image_token_id"] == IMAGE
        assert "images of" not in " ".join(opened.notes)
        assert "videos of" in " ".join(opened.notes)

    def without_tokens(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0] = {key: value for key, value in writer.kv_data[0].items() if "tokenizer." not in key}

    write(checkpoint, tmp_path / "gguf" / "model.gguf", matrices_as(Type.F16), without_tokens)
    with Checkpoint.open(tmp_path / "gguf") as opened:
        assert "image_token_id" not in opened.config
        assert "the token ids of images and videos" in " ".join(opened.notes)
    shutil.copyfile(checkpoint / "tokenizer.json", tmp_path / "gguf" / "tokenizer.json")
    with Checkpoint.open(tmp_path / "gguf") as opened:
        assert opened.config["image_token_id"] == IMAGE


def without_tensor(name: str) -> Change:
    return lambda writer: writer.tensors[0].pop(name)


def key(name: str, value: Any) -> Change:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(name, None)
        if value is not None:
            writer.kv_data[0][name] = gguf.gguf_writer.GGUFValue(value=value, type=gguf.GGUFValueType.get_type(value))

    return change


def shaped(name: str, *shape: int) -> Change:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.tensors[0].pop(name)
        writer.add_tensor(name, np.zeros(shape, np.float32))

    return change


HOSTILE: dict[str, tuple[Change, str]] = {
    "another kind of file": (key("general.architecture", "qwen3"), "mmproj.gguf has no vision encoder: .* 'qwen3'"),
    "another projector": (key("clip.projector_type", "mlp"), "of the type 'mlp', .* 'qwen3vl' needs one of the type"),
    "no projector": (key("clip.projector_type", None), "of the type None"),
    "a number as projector": (key("clip.projector_type", 7), "of the type 7"),
    "another width": (key("clip.vision.projection_dim", 128), "another model .*projection_dim gives 128"),
    "a negative width": (key("clip.vision.embedding_length", -32), "'clip.vision.embedding_length' is -32"),
    "another real width": (key("clip.vision.embedding_length", 64), "the shape"),
    "no blocks": (key("clip.vision.block_count", 0), "'clip.vision.block_count' is 0"),
    "many blocks": (key("clip.vision.block_count", 1 << 30), "'clip.vision.block_count' is 1073741824"),
    "another number of blocks": (key("clip.vision.block_count", 2), "must be a list of 2 truth values"),
    "no heads": (key("clip.vision.attention.head_count", 0), "'clip.vision.attention.head_count' is 0"),
    "odd heads": (key("clip.vision.attention.head_count", 5), r"not a multiple of 4 · num_heads \(5\)"),
    "a huge patch": (key("clip.vision.patch_size", 1 << 20), "'clip.vision.patch_size' is 1048576"),
    "another patch": (key("clip.vision.patch_size", 16), "patch_embed.proj.weight has the shape"),
    "a giant merge": (key("clip.vision.spatial_merge_size", 1 << 16), "'clip.vision.spatial_merge_size' is 65536"),
    "another activation": (key("clip.use_silu", True), "'clip.use_silu' is True; Qwen3-VL has another activation"),
    "no mean": (key("clip.vision.image_mean", None), "'clip.vision.image_mean' is None; .* three numbers"),
    "NaN as mean": (key("clip.vision.image_mean", [0.5, float("nan"), 0.5]), "'clip.vision.image_mean' is"),
    "zero deviation": (key("clip.vision.image_std", [0.5, 0.5, 0.0]), "numbers must be above zero"),
    "inverted limits": (key("clip.vision.image_min_pixels", 1 << 30), "min_pixels"),
    "flags as text": (key("clip.vision.is_deepstack_layers", "yes"), "must be a list of 3 truth values"),
    "other DeepStack blocks": (key("clip.vision.is_deepstack_layers", [True, True, False]), r"the blocks \[0, 1\]"),
    "no DeepStack tensor": (without_tensor("v.deepstack.2.fc1.weight"), "_list.1.linear_fc1.weight is missing"),
    "one frame": (without_tensor("v.patch_embd.weight.1"), "has 'v.patch_embd.weight' alone"),
    "unequal frames": (shaped("v.patch_embd.weight.1", 32, 3, 8, 4), "are the parts of one"),
    "frames without channels": (shaped("v.patch_embd.weight.1", 32, 3, 64), "are the parts of one"),
    "no positions": (without_tensor("v.position_embd.weight"), "'num_position_embeddings' is 0"),
    "a missing matrix": (without_tensor("mm.2.weight"), "model.visual.merger.linear_fc2.weight is missing"),
    "another tensor": (lambda writer: writer.add_tensor("a.conv.weight", np.zeros((4, 4), np.float32)), "no place for"),
    "a name twice": (
        lambda writer: writer.add_tensor("v.blk.0.attn_qkv.weight.1", np.zeros((4, 4), np.float32)), "no place for"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_do_not_fit(name: str, checkpoint: Path, tmp_path: Path) -> None:
    change, match = HOSTILE[name]
    write(checkpoint, tmp_path / "model.gguf", matrices_as(Type.F16))
    write_mmproj(checkpoint, tmp_path / "mmproj.gguf", Type.F16, change)
    with pytest.raises(CheckpointError, match=match):
        build(tmp_path / "model.gguf", tmp_path / "package", mmproj=tmp_path / "mmproj.gguf", threads=1)
    assert not (tmp_path / "package").exists()


def test_a_decoder_of_another_model(checkpoint: Path, tmp_path: Path) -> None:
    def levels(writer: gguf.GGUFWriter) -> None:
        writer.add_num_deepstack_layers(3)

    write_both(checkpoint, tmp_path / "gguf", Type.F16)
    write(checkpoint, tmp_path / "gguf" / "model.gguf", matrices_as(Type.F16), levels)
    with pytest.raises(CheckpointError, match=r"another model .*is_deepstack_layers gives 2, and .*layers 3"):
        inspect(tmp_path / "gguf")
    cut = (tmp_path / "gguf" / "mmproj.gguf").read_bytes()[:3000]
    (tmp_path / "gguf" / "mmproj.gguf").write_bytes(cut)
    with pytest.raises(CheckpointError, match=r"mmproj\.gguf: .*truncated"):
        inspect(tmp_path / "gguf")
    no_sections = key("qwen3vl.rope.dimension_sections", None)
    write_both(checkpoint, tmp_path / "gguf", Type.F16)
    write(checkpoint, tmp_path / "gguf" / "model.gguf", matrices_as(Type.F16), no_sections)
    with pytest.raises(CheckpointError, match=r"'qwen3vl\.rope\.dimension_sections' is missing"):
        inspect(tmp_path / "gguf")


def test_which_file_is_taken(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    write_both(checkpoint, folder, Type.F16)
    model, mmproj = folder / "model.gguf", folder / "mmproj.gguf"
    shutil.copyfile(mmproj, folder / "mmproj-2.gguf")
    with pytest.raises(CheckpointError, match=r"2 vision encoders: mmproj-2\.gguf, mmproj\.gguf") as caught:
        inspect(folder)
    assert "Choose one of them with mmproj" in str(caught.value)
    assert inspect(folder, mmproj=mmproj)["deepstack_levels"] == 2
    assert inspect(model)["architecture"] == "Qwen3ForCausalLM"
    shutil.copyfile(model, folder / "twin.gguf")
    with pytest.raises(CheckpointError, match="has no vision encoder: its architecture is 'qwen3vl'"):
        inspect(model, mmproj=folder / "twin.gguf")
    with pytest.raises(CheckpointError, match=r"are both called model\.gguf"):
        inspect(model, mmproj=model)
    with pytest.raises(CheckpointError, match="There is no file"):
        inspect(model, mmproj=tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="a vision encoder alone"):
        inspect(mmproj)
    attempts: list[Callable[[], object]] = [
        lambda: build(checkpoint, tmp_path / "package", mmproj=mmproj),
        lambda: build("org/name", mmproj=mmproj),
        lambda: inspect(checkpoint, mmproj=mmproj),
    ]
    for attempt in attempts:
        with pytest.raises(OptionError, match=r"is the vision encoder of a GGUF file, and .* is none"):
            attempt()
    for name in ("model.gguf", "twin.gguf"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="only vision encoders"):
        inspect(folder)


def test_a_vision_encoder_beside_a_text_model(checkpoint: Path, tmp_path: Path) -> None:
    write_both(checkpoint, tmp_path / "gguf", Type.F16)
    text = make_member(tmp_path / "text", Member("Qwen3", "Qwen3Config", "Qwen3ForCausalLM", text={"head_dim": 32}))
    write(text, tmp_path / "gguf" / "model.gguf", matrices_as(Type.F16))
    notes = inspect(tmp_path / "gguf")["notes"]
    assert any("model.gguf is for text alone, so mmproj.gguf is not read" in note for note in notes)
    with pytest.raises(CheckpointError, match="architecture 'qwen3' is built for text alone"):
        inspect(tmp_path / "gguf", mmproj=tmp_path / "gguf" / "mmproj.gguf")
