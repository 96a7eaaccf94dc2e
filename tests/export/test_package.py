"""The contents of a package (settings, copied files, manifest), and that the stock runtime runs it without vlpack."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
from PIL import Image

from samples import ANSWERS, DIGITS, IMAGES, QUERY, READ, content, copy_digits, edit_json, vlpack
from vlpack.builder import build
from vlpack.errors import PackageError, VlpackError
from vlpack.export.processor_config import grid_difference
from vlpack.inspection import inspect
from vlpack.options import parse_extra_options
from vlpack.preprocess import ImageProcessor
from vlpack.runtime.genai_model import open_package
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling

Capsys = pytest.CaptureFixture[str]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns the folder of a package that tests share and must not alter."""
    made: dict[Any, Path] = {}

    def get(part: str = "all", *extra: str, **options: Any) -> Path:
        key = (part, extra, *options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("package") / part
            build(DIGITS, made[key], part=part, extra_options=parse_extra_options(extra), **options)
        return made[key]

    return get


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A newly built package that a test may alter."""
    build(DIGITS, tmp_path / "package")
    return tmp_path / "package"


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "genai_config.json").read_text(encoding="utf-8")))


def manifest_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "vlpack.json").read_text(encoding="utf-8")))


# parts


COPIES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
}
BESIDE = {*COPIES, "genai_config.json", "README.md", "vlpack.json"}


@pytest.mark.parametrize(
    ("part", "files"),
    [
        ("all", "decoder.onnx decoder.onnx.data vision.onnx vision.onnx.data embedding.onnx processor_config.json"),
        ("text", "model.onnx model.onnx.data"),
        ("vision", "vision.onnx vision.onnx.data processor_config.json"),
        ("embedding", "embedding.onnx embedding.onnx.data"),
    ],
)
def test_the_files_of_each_part(packages: Callable[..., Path], part: str, files: str) -> None:
    assert {path.name for path in packages(part).iterdir()} == BESIDE | set(files.split())


def test_every_graph_is_valid_onnx(packages: Callable[..., Path]) -> None:
    for folder in (packages(), packages("text")):
        for path in folder.glob("*.onnx"):
            onnx.checker.check_model(path)


def test_copies_are_byte_for_byte(packages: Callable[..., Path]) -> None:
    for part in ("all", "text"):
        for name in COPIES:
            assert (packages(part) / name).read_bytes() == (DIGITS / name).read_bytes()


def test_a_tied_weight_is_stored_once(packages: Callable[..., Path]) -> None:
    def places(path: Path) -> dict[str, dict[str, str]]:
        graph = onnx.load(path, load_external_data=False).graph
        return {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer}

    head, embedding = places(packages() / "decoder.onnx"), places(packages() / "embedding.onnx")
    heads = [place for name, place in head.items() if "lm_head" in name]
    tables = [place for name, place in embedding.items() if "embed_tokens" in name]
    assert {place["location"] for place in tables} == {"decoder.onnx.data"}
    assert len(tables) == 2
    for place in tables:
        assert place in heads
    size = (packages() / "decoder.onnx.data").stat().st_size
    twice = packages("all", "shared_embeddings=false")
    apart = (twice / "decoder.onnx.data").stat().st_size + (twice / "embedding.onnx.data").stat().st_size
    weights = manifest_of(packages())["parts"]["embedding.onnx"]["weights"]
    assert apart - size >= sum(weight["bytes"] for weight in weights.values()) > 500_000


@pytest.mark.parametrize(("part", "shared"), [("all", True), ("text", True), ("all", False)])
def test_sizes_are_bytes_on_disk(part: str, shared: bool, tmp_path: Path) -> None:
    extra = parse_extra_options([] if shared else ["shared_embeddings=false"])
    planned: list[int] = []
    progress = SimpleNamespace(start=planned.append, advance=lambda written, path: None)
    result = build(DIGITS, tmp_path / "package", part=part, extra_options=extra, progress=progress)
    data = sum(path.stat().st_size for path in result.folder.glob("*.data"))
    described = inspect(result.folder)
    groups = [group for name in described["parts"].values() for group in name["groups"]]
    shown = sum(group["bytes"] for group in groups)
    assert (
        shown == sum(planned) == pytest.approx(data, rel=0.03)
    )  # without padding; the embedding table is at least 0.05 of the whole
    of_build = sum(count for _, _, labels in result.parts.values() for count in labels.values())
    assert of_build == pytest.approx(data, rel=0.05)  # vectors such as norms and biases are not counted
    (table,) = [group for group in groups if group["modules"].endswith("embed_tokens")]
    assert (table["shared_with"], table["bytes"] > 500_000) == (["lm_head"] if shared else [], not shared)
    labels = [label for _, _, labels in result.parts.values() for label, count in labels.items() if not count]
    assert labels == (["int8 block 64 (shared)"] if shared else [])


def test_a_tied_weight_is_stored_once_in_fp32_and_in_the_text_part(packages: Callable[..., Path]) -> None:
    for part in ("all", "text"):
        once = packages(part, precision="fp32")
        twice = packages(part, "shared_embeddings=false", precision="fp32")
        sizes = [sum(path.stat().st_size for path in folder.glob("*.data")) for folder in (once, twice)]
        assert sizes[1] - sizes[0] == pytest.approx(4 * 2176 * 256, abs=8192)


# configs


def test_genai_config(packages: Callable[..., Path]) -> None:
    model = config_of(packages())["model"]
    source = json.loads((DIGITS / "config.json").read_text())
    text = source["text_config"]
    assert model["type"] == "qwen3_vl"
    assert model["eos_token_id"] == [2050, 2048]  # generation_config.json's list, not config.json's single one
    assert (model["bos_token_id"], model["pad_token_id"]) == (2048, 2048)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id"):
        assert model[name] == source[name]
    assert (model["context_length"], model["vocab_size"]) == (text["max_position_embeddings"], text["vocab_size"])
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"):
        assert model["decoder"][name] == text[name]
    assert model["decoder"]["head_size"] == text["head_dim"]
    assert model["vision"]["spatial_merge_size"] == 2
    assert model["vision"]["inputs"]["image_grid_thw"] == "image_grid_thw"
    for part in ("decoder", "vision", "embedding"):
        assert (packages() / model[part]["filename"]).is_file()
        assert model[part]["session_options"]["provider_options"] == []
        assert model[part]["session_options"].get("intra_op_num_threads") == (1 if part == "embedding" else None)


def test_genai_config_of_the_text_part(packages: Callable[..., Path]) -> None:
    model = config_of(packages("text"))["model"]
    assert model["type"] == "qwen3_vl_text"
    assert {"vision", "embedding", "image_token_id"} & set(model) == set()
    assert model["decoder"]["inputs"]["input_ids"] == "input_ids"


@pytest.mark.parametrize("provider", ["cuda", "dml", "webgpu"])
def test_provider_options(tmp_path: Path, provider: str) -> None:
    build(DIGITS, tmp_path / "package", execution_provider=provider)
    model = config_of(tmp_path / "package")["model"]
    for part in ("decoder", "vision", "embedding"):
        assert model[part]["session_options"]["provider_options"] == [{provider: {}}]
    assert manifest_of(tmp_path / "package")["precision"] == "fp16"


@pytest.mark.parametrize(("context", "expected"), [(262144, 4096), (1000, 1000)])
def test_max_length_is_within_the_context(tmp_path: Path, context: int, expected: int) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    edit_json(source / "config.json", "text_config", "max_position_embeddings", value=context)
    build(source, tmp_path / "package", part="text")
    config = config_of(tmp_path / "package")
    assert (config["model"]["context_length"], config["search"]["max_length"]) == (context, expected)


def test_search_follows_generation_config(tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    wanted = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.05}
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 2050, **wanted}))
    build(source, tmp_path / "package", part="text")
    config = config_of(tmp_path / "package")
    assert {name: config["search"][name] for name in wanted} == wanted
    assert config["model"]["eos_token_id"] == 2050
    assert Model(tmp_path / "package").generate("Hello", max_tokens=3).text is not None  # the runtime accepts top_k 0
    edit_json(source / "generation_config.json", "temperature", value=0.0)
    build(source, tmp_path / "package", part="text", force=True)
    assert config_of(tmp_path / "package")["search"]["do_sample"] is False


def test_lengths_follow_generation_config(tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    edit_json(source / "generation_config.json", "min_length", value=33)
    edit_json(source / "generation_config.json", "max_length", value=20)  # transformers' default counts as no choice
    build(source, tmp_path / "package", precision="fp32")
    assert config_of(tmp_path / "package")["search"]["max_length"] == 4096
    answer = Model(tmp_path / "package").generate(READ, [IMAGES / "01.png"], sampling=GREEDY)
    # transformers' generate(min_length=33) gives this; all end tokens are suppressed, not only the first of the list
    assert answer.stats.prompt_tokens == 25
    assert answer.tokens == [17, 198, 19, 18, 198, 21, 19, 1312, 632, 2050]
    edit_json(source / "generation_config.json", "max_length", value=300)
    build(source, tmp_path / "package", force=True)
    assert config_of(tmp_path / "package")["search"]["max_length"] == 300


NEUTRAL = {
    "min_p": 0.0,
    "presence_penalty": 0,
    "typical_p": 1.0,
    "num_beams": 1,
    "suppress_tokens": [],
    "sequence_bias": {},
    "stop_strings": None,
    "token_healing": False,
    "max_new_tokens": None,
    "use_cache": True,
    "transformers_version": "5.0.0",
}
LOST = {
    "min_p": 0.05,
    "presence_penalty": 1,
    "frequency_penalty": 0.5,
    "suppress_tokens": [0],
    "begin_suppress_tokens": [1],
    "bad_words_ids": [[1]],
    "forced_bos_token_id": 0,
    "num_beams": 4,
    "min_new_tokens": 1,
}


def test_generation_settings_that_cannot_be_kept_are_reported(tmp_path: Path) -> None:
    def notes(part: str, **settings: Any) -> tuple[str, ...]:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 2050, **settings}))
        return build(source, tmp_path / "package", part=part, force=True).notes

    source = copy_digits(tmp_path / "checkpoint")
    assert notes("text", **NEUTRAL) == ()
    (note,) = notes("text", **LOST)
    assert set(re.findall(r"\w+", note.partition("which")[0])) >= set(LOST)
    assert "may differ" in note
    (note,) = notes("text", max_new_tokens=2048)
    assert "max_new_tokens" in note
    assert "max_tokens" in note
    assert notes("vision", **LOST) == ()  # the vision part generates nothing
    config = og.Config(str(tmp_path / "package"))
    for name, value in LOST.items():
        if name != "num_beams":  # the note is wrong as soon as the runtime supports one of them
            with pytest.raises(RuntimeError, match="Unknown value"):
                config.overlay(json.dumps({"search": {name: value}}))


def test_processor_config_has_the_checkpoints_values(tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    settings = json.loads((source / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.6, 0.7], "rescale_factor": 0.25}
    settings["size"] = {"shortest_edge": 2048, "longest_edge": 131072}
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    build(source, tmp_path / "package", part="vision")
    processor = json.loads((tmp_path / "package" / "processor_config.json").read_text())["processor"]
    steps = {step["operation"]["type"]: step["operation"].get("attrs", {}) for step in processor["transforms"]}
    assert list(steps) == ["DecodeImage", "ConvertRGB", "Resize", "Rescale", "Normalize", "PatchImage"]
    resize = steps["Resize"]
    assert (resize["smart_resize"], resize["min_pixels"], resize["max_pixels"]) == (1, 2048, 131072)
    assert (resize["patch_size"], resize["merge_size"]) == (16, 2)
    assert steps["Rescale"] == {"rescale_factor": 0.25}
    assert steps["Normalize"] == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.6, 0.7], "qwen3_vl": 1}
    assert steps["PatchImage"] == {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}


def test_the_model_card_names_the_source_and_the_policy(packages: Callable[..., Path]) -> None:
    card = (packages() / "README.md").read_text(encoding="utf-8")
    assert "digits-qwen3-vl" in card
    assert "int8 for cpu" in card
    assert "`vision.onnx`" in card
    assert "--image" not in (packages("text") / "README.md").read_text(encoding="utf-8")
    assert "--part all" in (packages("vision") / "README.md").read_text(encoding="utf-8")


def test_the_example_of_a_grid_in_the_model_card_is_correct(packages: Callable[..., Path], tmp_path: Path) -> None:
    folder = packages()
    card = (folder / "README.md").read_text(encoding="utf-8")
    found = re.search(r"\((\d+)×(\d+): (\d+)×(\d+) patches instead of (\d+)×(\d+)\)", card)
    assert found
    width, height, *grids = map(int, found.groups())
    Image.new("RGB", (width, height)).save(tmp_path / "image.png")
    ours = Model(folder).prompt(READ, [tmp_path / "image.png"])
    processor = og.Model(str(folder)).create_multimodal_processor()
    inputs = processor(ours.text, images=og.Images.open(str(tmp_path / "image.png")))
    assert np.array(inputs["image_grid_thw"].as_numpy()).tolist() == [[1, *grids[:2]]]
    assert ours.image_grid_thw is not None
    assert ours.image_grid_thw.tolist() == [[1, *grids[2:]]]
    assert grids[:2] != grids[2:]


@pytest.mark.parametrize(("patch_size", "merge_size"), [(16, 2), (14, 2), (8, 2), (15, 1)])
def test_the_grid_example_follows_patch_and_merge_size(patch_size: int, merge_size: int) -> None:
    processor = ImageProcessor(patch_size, merge_size=merge_size, min_pixels=65536, max_pixels=16777216)
    difference = grid_difference(processor)
    if patch_size == 15:  # with an odd factor no size is halfway between two grids
        assert difference is None
        return
    assert difference is not None
    theirs = processor.target_size(difference.height, difference.width)
    assert difference.transformers == (theirs[0] // patch_size, theirs[1] // patch_size)
    assert difference.runtime != difference.transformers
    if patch_size == 16:  # the patch size of Qwen3-VL
        assert difference == (1280, 720, (46, 80), (44, 80), 32)


def test_the_readme_of_a_decoder_describes_its_inputs(packages: Callable[..., Path]) -> None:
    card = (packages("text", "exclude_embeds=true") / "README.md").read_text(encoding="utf-8")
    assert "The decoder takes `inputs_embeds` and `per_layer_inputs`" in card
    assert "The decoder takes" not in (packages("text") / "README.md").read_text(encoding="utf-8")


# the stock runtime alone, as used from C#, C++ and Java


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_runtimes_own_image_processor_gives_the_same_answer(packages: Callable[..., Path], precision: str) -> None:
    folder = packages("all", precision=precision)
    ours = Model(folder)
    model = og.Model(str(folder))
    processor, tokenizer = model.create_multimodal_processor(), og.Tokenizer(model)
    for image in list(ANSWERS)[:8]:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": READ}]}]
        prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        expected = ours.prompt(READ, [IMAGES / image])
        assert prompt == expected.text
        assert expected.image_grid_thw is not None
        assert expected.pixel_values is not None
        inputs = processor(prompt, images=og.Images.open(str(IMAGES / image)))
        grid = np.array(inputs["image_grid_thw"].as_numpy())
        assert grid.tolist() == expected.image_grid_thw.tolist()
        pixels = np.array(inputs["pixel_values"].as_numpy())
        np.testing.assert_allclose(pixels, expected.pixel_values, atol=0.1)
        assert np.array(inputs["input_ids"].as_numpy()).reshape(-1).tolist() == expected.input_ids[0].tolist()
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=128, do_sample=False)
        generator = og.Generator(model, params)
        generator.set_inputs(inputs)
        tokens = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        answer = ours.generate(READ, [IMAGES / image], sampling=GREEDY)
        assert tokens == answer.tokens
        assert answer.text.split() == ANSWERS[image]["read"].split()


def test_the_text_part_in_the_stock_runtime(packages: Callable[..., Path]) -> None:
    folder = packages("text")
    model = og.Model(str(folder))
    answer = Model(folder).generate("Count to three.", max_tokens=8, sampling=GREEDY)
    params = og.GeneratorParams(model)
    prompt = Model(folder).prompt("Count to three.").input_ids
    params.set_search_options(max_length=prompt.shape[1] + 8, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    assert tokens == answer.tokens


# manifest and inspection


def test_the_manifest(packages: Callable[..., Path]) -> None:
    manifest = manifest_of(packages())
    files = content(packages())
    assert set(manifest["files"]) == set(files) - {"vlpack.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
    assert manifest["source"]["name"] == "digits-qwen3-vl"
    assert manifest["source"]["architecture"] == "Qwen3VLForConditionalGeneration"
    for name in ("model.safetensors", "config.json"):
        digest = hashlib.sha256((DIGITS / name).read_bytes()).hexdigest()
        assert manifest["source"]["files"][name] == digest
    weights = manifest["parts"]["decoder.onnx"]["weights"]
    joined = QUERY.replace("q_proj.weight", "qkv_proj")
    assert weights[joined]["shape"] == [1024, 256]
    assert weights[joined]["storage"] == "int8"
    assert manifest["policy"][-1] == {"role": "text.*", "modules": "*", "storage": "int8"}


def test_one_flipped_byte_anywhere_is_found(package: Path, capsys: Capsys) -> None:
    assert vlpack(capsys, "inspect", package).code == 0
    for name, data in content(package).items():
        for position in {0, len(data) // 2, len(data) - 1}:
            altered = bytearray(data)
            altered[position] ^= 1
            (package / name).write_bytes(altered)
            done = vlpack(capsys, "inspect", package)
            assert done.code == (2 if name == "vlpack.json" and "damaged" not in done.out else 1), (name, done)
            assert name in done.out + done.err
        (package / name).write_bytes(data)
    assert vlpack(capsys, "inspect", package).code == 0


def test_an_altered_manifest_is_found(package: Path, capsys: Capsys) -> None:
    text = (package / "vlpack.json").read_text()
    (package / "vlpack.json").write_text(text.replace('"execution_provider": "cpu"', '"execution_provider": "cqu"'))
    done = vlpack(capsys, "inspect", package)
    assert (done.code, "vlpack.json was altered" in done.out) == (1, True)


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_missing_and_truncated_files(package: Path, capsys: Capsys, damage: str) -> None:
    path = package / "vision.onnx.data"
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "truncated" else data + b"\0")
    done = vlpack(capsys, "inspect", package, "--no-hashes", "--json")
    assert done.code == 1
    assert ["vision.onnx.data" in problem for problem in json.loads(done.out)["problems"]] == [True]
    done = vlpack(capsys, "run", package, "Hello")
    assert (done.code, done.out) == (2, "")
    assert "vision.onnx.data" in done.err


def test_loading_does_not_hash_the_weights(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlpack.package.manifest.sha256_file", lambda path: pytest.fail("hashed"))
    open_package(package)


MANIFESTS: list[tuple[str, Any]] = [
    ("files", None),
    ("files", []),
    ("files", {"vision.onnx": 5}),
    ("files", {"../config.json": {"bytes": 1, "sha256": ""}}),
    ("files", {"": {"bytes": 1, "sha256": ""}}),
    ("format", 99),
    ("parts", None),
    ("parts", {"vision.onnx": {}}),
    ("parts", {"vision.onnx": {"name": "[/bold]", "inputs": {}, "outputs": {}, "weights": {}}}),
    ("precision", "[/red]"),
    ("source", "nobody"),
    ("policy", [{"role": "[/w]", "modules": "[/x]", "storage": "[/y]"}]),
]


@pytest.mark.parametrize(("key", "value"), MANIFESTS)
def test_hostile_manifests(package: Path, capsys: Capsys, key: str, value: Any) -> None:
    edit_json(package / "vlpack.json", key, value=value)
    done = vlpack(capsys, "inspect", package)
    assert done.code in (1, 2)
    assert vlpack(capsys, "inspect", package, "--json").code == done.code
    assert "Traceback" not in done.out + done.err


def test_manifests_that_are_not_json(package: Path) -> None:
    for text in ("", "[]", "{", "[" * 100_000, "\udcff"):
        (package / "vlpack.json").write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(PackageError):
            inspect(package)


def test_inspect_describes_a_package(packages: Callable[..., Path]) -> None:
    described = inspect(packages())
    assert described["kind"] == "package"
    assert described["problems"] == []
    assert list(described["parts"]) == ["decoder", "vision", "embedding"]
    ports = described["parts"]["decoder"]["inputs"]
    assert "past_key_values.*.key" in ports
    assert "past_key_values.0.key" not in ports
    groups = {(group["modules"], group["storage"]): group for group in described["parts"]["decoder"]["groups"]}
    assert groups["model.language_model.layers.*.mlp.down_proj", "int8"]["count"] == 6


def test_inspect_describes_a_checkpoint() -> None:
    described = inspect(DIGITS)
    assert described["kind"] == "checkpoint"
    assert described["tied"] is True
    assert described["deepstack_levels"] == 3
    assert described["dtypes"]["bfloat16"]["tensors"] > 100
    assert described["parts"] == ["decoder", "vision", "embedding"]


def test_inspect_a_folder_that_is_neither(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", DIGITS / "config.json"):
        with pytest.raises(VlpackError):
            inspect(path)
