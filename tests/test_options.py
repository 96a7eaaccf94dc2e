"""Extra options, named as in the builder: each has its effect, and one that would have none is an error or a note."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest

from samples import ANSWERS, COUNT, DIGITS, IMAGES, READ, content, copy_digits, vlpack
from vlpack.build_plan import BuildOptions
from vlpack.builder import build
from vlpack.cli.app import spread_extra_options
from vlpack.errors import OptionError
from vlpack.options import _PARSERS, ExtraOptions, parse_extra_options
from vlpack.quantize.policy import OFFERED, PRECISIONS, QuantizationOptions, make_policy
from vlpack.quantize.storage import Blocks
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling

Capsys = pytest.CaptureFixture[str]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Returns the folder of a package built with extra options, which tests share and must not alter."""
    made: dict[Any, Path] = {}

    def get(*extra: str, **options: Any) -> Path:
        key = (extra, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("package") / "package"
            build(DIGITS, made[key], extra_options=parse_extra_options(extra), **options)
        return made[key]

    return get


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., OptionError]:
    def get(*extra: str, match: str, source: Path = DIGITS, **options: Any) -> OptionError:
        with pytest.raises(OptionError, match=match) as caught:
            build(source, tmp_path / "package", extra_options=parse_extra_options(extra), **options)
        assert list(tmp_path.iterdir()) == []
        return caught.value

    return get


def attributes(path: Path, op: str) -> list[dict[str, Any]]:
    """The attributes and the number of inputs of every node of an operator."""
    graph = onnx.load(path, load_external_data=False).graph
    return [
        {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute} | {"inputs": len(node.input)}
        for node in graph.node
        if node.op_type == op
    ]


def right(folder: Path, images: int = 4) -> int:
    """Number of correct answers to two questions about each of the first ``images`` images."""
    model = Model(folder)
    count = 0
    for image in list(ANSWERS)[:images]:
        for key, question in (("read", READ), ("count", COUNT)):
            answer = model.generate(question, [IMAGES / image], max_tokens=16, sampling=Sampling(temperature=0))
            count += answer.text.split() == ANSWERS[image][key].split()
    return count


def labels(folder: Path, part: str) -> dict[str, str]:
    manifest = json.loads((folder / "vlpack.json").read_text())
    graph = next(graph for graph in manifest["parts"].values() if graph["name"] == part)
    return {path: weight["storage"] for path, weight in graph["weights"].items()}


INT4, INT8 = "int4 block 32 8-bit scales", "int8 block 128"
DOWN = "model.language_model.layers.{}.mlp.down_proj"


# effects of options


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_block_size(make: Make, size: int) -> None:
    folder = make(f"block_size={size}", precision="int4")
    assert {node["block_size"] for node in attributes(folder / "decoder.onnx", "MatMulNBits")} == {size}
    assert {node["block_size"] for node in attributes(folder / "embedding.onnx", "GatherBlockQuantized")} == {size}
    assert labels(folder, "decoder")[DOWN.format(0)] == f"int4 block {size} 8-bit scales"
    assert right(folder) >= 6


@pytest.mark.parametrize(
    ("provider", "linear", "head"),
    [
        ("cpu", INT4, INT8),
        ("cuda", "int4 block 32", "int8 block 32"),
        ("webgpu", "int4 block 32", "int8 block 32"),
        ("dml", "int4 block 32", "int4 block 32"),
    ],
)
def test_blocks_by_default(provider: str, linear: str, head: str) -> None:
    assert make_policy("int8", "cpu", QuantizationOptions()).storage("text.head").label == "int8 block 64"
    policy = make_policy("int4", provider, QuantizationOptions())
    assert (policy.storage("text.linear").label, policy.storage("text.head").label) == (linear, head)
    # a requested block size applies to all weights in blocks
    asked = make_policy("int4", provider, QuantizationOptions(block_size=16, is_symmetric=False))
    kinds = [(label[:4], " 8-bit scales" * ("8-bit" in label)) for label in (linear, head)]
    assert [asked.storage(role).label for role in ("text.linear", "text.head")] == [
        f"{bits} block 16 asymmetric{scales}" for bits, scales in kinds
    ]


def test_narrow_scales_are_widened_once(make: Make, tmp_path: Path) -> None:
    """Narrow scales are int8 in the files; onnxruntime's optimized graph has them as fp32 constants of MatMulNBits."""
    path = make(precision="int4") / "decoder.onnx"
    optimized = tmp_path / "optimized.onnx"
    model = onnx.load(path, load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    source = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in ("Cast", "Mul")}
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits" and "lm_head" not in node.input[1]]
    assert len(products) > 8
    assert {kinds[source[source[node.input[2]]]] for node in products} == {onnx.TensorProto.INT8}
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3  # suppresses the warning that an optimized graph is only for this machine
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(optimized, load_external_data=False).graph
    kept = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert onnx.TensorProto.INT8 not in kept.values()
    loaded = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(loaded) == len(products) + 1
    assert {kept[node.input[2]] for node in loaded} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("size", [16, 64])
def test_is_symmetric(make: Make, precision: str, size: int) -> None:
    folder = make("is_symmetric=false", f"block_size={size}", precision=precision)
    assert {node["inputs"] for node in attributes(folder / "decoder.onnx", "MatMulNBits")} == {4}
    assert {node["inputs"] for node in attributes(folder / "embedding.onnx", "GatherBlockQuantized")} == {4}
    symmetric = make("is_symmetric=true", f"block_size={size}", precision=precision)
    assert {node["inputs"] for node in attributes(symmetric / "decoder.onnx", "MatMulNBits")} == {3}
    assert right(folder) >= 6


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_accuracy_level(make: Make, level: int) -> None:
    folder = make(f"accuracy_level={level}", precision="int4")
    assert {node["accuracy_level"] for node in attributes(folder / "decoder.onnx", "MatMulNBits")} == {level}
    assert right(folder, 2) >= 3


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_balance_and_rotation(make: Make, precision: str) -> None:
    """Balance and rotation are on by default for the decoder; without them, graphs and weights differ."""
    as_it_comes = make(precision=precision)
    asked = content(
        make("balance=true", "rotation=true", precision=precision)
    )  # balance=true also balances the encoder's float weights
    for name in ("decoder.onnx", "decoder.onnx.data"):
        assert asked[name] == content(as_it_comes)[name]
    decoders = [content(as_it_comes)["decoder.onnx.data"]]
    for extra in (["balance=false"], ["rotation=false"], ["balance=false", "rotation=false"]):
        folder = make(*extra, precision=precision)
        decoders.append(content(folder)["decoder.onnx.data"])
        model = onnx.load(folder / "decoder.onnx", load_external_data=False)
        rotates = any(tensor.name.startswith("rotation_") for tensor in model.graph.initializer)
        assert rotates is ("rotation=false" not in extra)
        assert right(folder) >= 6
    # for 4 bits, no channel of this model is far from the median ratio
    assert len(set(decoders)) == (4 if precision == "int8" else 2)
    assert right(as_it_comes) >= 6


def test_wrong_values_of_balance_and_rotation(refused: Callable[..., OptionError]) -> None:
    refused("balance=true", part="embedding", match="balance has no effect with part='embedding'")
    for name in ("balance", "rotation"):
        with pytest.raises(OptionError, match=f"{name}=maybe: it must be true or false"):
            parse_extra_options([f"{name}=maybe"])


def test_algo_config(make: Make) -> None:
    assert content(make("algo_config=rtn", precision="int4")) == content(make(precision="int4"))
    assert content(make("algo_config=default", precision="int4")) == content(make(precision="int4"))
    # the option has an effect if the embedding is not shared
    rtn_last = labels(make("algo_config=rtn_last", precision="int4"), "decoder")
    assert (rtn_last["lm_head"], rtn_last[DOWN.format(2)]) == (INT8, INT4)


def test_matmul_mixed_precision(make: Make) -> None:
    default = labels(make(precision="int4"), "decoder")
    assert (default["lm_head"], default[DOWN.format(2)]) == (INT8, INT4)
    folder = make("matmul_mixed_precision=last_matmul:int4,mixed_layers:int8", precision="int4")
    mixed = labels(folder, "decoder")
    assert (mixed["lm_head"], mixed[DOWN.format(2)], mixed[DOWN.format(1)]) == (INT4, INT8, INT4)
    assert mixed["model.language_model.layers.2.self_attn.qkv_proj"] == INT8
    assert mixed["model.language_model.layers.2.mlp.gate_proj"] == INT4
    assert right(folder) >= 6


@pytest.mark.parametrize(
    ("options", "mixed", "bits"),
    [
        ({"precision": "int4"}, {}, 4),
        ({"precision": "int4", "execution_provider": "cuda"}, {}, 8),
        ({"precision": "int4", "calibrate": None}, {}, 8),
        ({"precision": "int8"}, {}, 8),
        ({"bits": 5.5}, {}, 8),
        ({"bits": 5.5}, {"last_matmul": "int4"}, 4),
        ({"precision": "int4"}, {"last_matmul": "int8"}, 8),
        ({"precision": "int4"}, {"mixed_layers": "int8"}, 4),
    ],
)
def test_the_head_has_4_bits_only_in_calibrated_int4_packages(
    options: dict[str, Any], mixed: dict[str, str], bits: int
) -> None:
    chosen = {"calibrate": "self", "extra": ExtraOptions(matmul_mixed_precision=mixed or None), **options}
    policy = BuildOptions(**chosen).policy()
    head = policy.storage("text.head")
    assert isinstance(head, Blocks)
    assert head.bits == bits
    assert policy.scores_candidates == (bits == 4)


def test_exclude_embeds(make: Make) -> None:
    def inputs(folder: Path) -> set[str]:
        (path,) = folder.glob("*.onnx")
        return {value.name for value in onnx.load(path, load_external_data=False).graph.input}

    assert "input_ids" in inputs(make(part="text"))
    without = inputs(make("exclude_embeds=true", part="text"))
    assert ("inputs_embeds" in without, "input_ids" in without) == (True, False)
    assert make("exclude_embeds=false", part="text").joinpath("model.onnx").is_file()


def test_prune_lm_head(make: Make) -> None:
    def logits(folder: Path) -> Any:
        (value,) = (
            v for v in onnx.load(folder / "decoder.onnx", load_external_data=False).graph.output if v.name == "logits"
        )
        dimension = value.type.tensor_type.shape.dim[1]
        return dimension.dim_value or dimension.dim_param

    assert logits(make()) == logits(make("prune_lm_head=true")) == 1
    assert logits(make("prune_lm_head=false")) == "sequence_length"
    assert right(make("prune_lm_head=false")) >= 6


def test_shared_embeddings(make: Make) -> None:
    assert not (make("shared_embeddings=true") / "embedding.onnx.data").exists()
    apart = make("shared_embeddings=false")
    assert (apart / "embedding.onnx.data").is_file()
    assert right(apart) >= 6


def test_filename(make: Make) -> None:
    for part in ("all", "text"):
        folder = make("filename=qwen.onnx", part=part)
        assert (folder / "qwen.onnx").is_file()
        assert (folder / "qwen.onnx.data").is_file()
        assert json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "qwen.onnx"
        assert Model(folder).generate("Hello", max_tokens=2).tokens


@pytest.mark.parametrize(
    ("value", "token"), [("hf_abc", "hf_abc"), ("false", False), ("False", False), ("0", False), (None, None)]
)
def test_hub_options_reach_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, token: str | bool | None
) -> None:
    import huggingface_hub

    calls = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options["token"], options["revision"], options["cache_dir"]))
        return str(copy_digits(tmp_path / "download"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    extra = parse_extra_options([] if value is None else [f"hf_token={value}"])
    options: dict[str, Any] = {"extra_options": extra, "revision": "v2", "cache_dir": tmp_path / "cache"}
    result = build("org/digits", tmp_path / "package", part="embedding", **options)
    assert calls == [("org/digits", token, "v2", str(tmp_path / "cache"))]
    assert result.notes == ()
    source = json.loads((tmp_path / "package" / "vlpack.json").read_text())["source"]
    assert source["repo_id"] == "org/digits"
    assert not any(
        value and value.encode() in data for data in content(tmp_path / "package").values() if value == "hf_abc"
    )


@pytest.mark.parametrize("vision", ["fp32", "fp16", "int8", "int4"])
def test_vision_precision(make: Make, vision: str) -> None:
    folder = make(precision="fp32", vision_precision=vision)
    expected = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": INT4}[vision]
    assert labels(folder, "vision")["model.visual.blocks.0.attn.qkv"] == expected
    assert labels(folder, "decoder")[DOWN.format(0)] == "float32"
    assert right(folder) >= 6


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_answers(make: Make, precision: str) -> None:
    assert right(make(precision=precision)) == 8


# options without effect, contradictions, and precisions that are not offered


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("provider", OFFERED)
def test_every_precision_and_provider_is_built_or_refused(
    tmp_path: Path, refused: Callable[..., OptionError], precision: str, provider: str
) -> None:
    if precision in OFFERED[provider]:
        build(DIGITS, tmp_path / "package", part="embedding", precision=precision, execution_provider=provider)
        return
    error = refused(match="not offered on", precision=precision, execution_provider=provider)
    assert precision in error.message and provider in error.message  # noqa: PT018
    assert ", ".join(OFFERED[provider]) in str(error.hint)


@pytest.mark.parametrize(
    ("extra", "options", "match"),
    [
        ("block_size=32", {"precision": "fp32"}, "block_size has no effect"),
        ("block_size=64", {"precision": "fp16"}, "block_size"),
        ("block_size=32", {"precision": "int8", "part": "vision"}, "block_size has no effect"),
        ("is_symmetric=true", {"precision": "fp16"}, "is_symmetric has no effect"),
        ("is_symmetric=false", {"precision": "int4", "part": "vision"}, "is_symmetric has no effect"),
        ("algo_config=rtn", {"precision": "fp32"}, "algo_config has no effect"),
        ("algo_config=rtn_last", {"precision": "int8"}, "needs the precision int4"),
        ("algo_config=rtn_last", {"precision": "int4", "part": "embedding"}, "rtn_last' needs"),
        ("algo_config=rtn_last matmul_mixed_precision=last_matmul:int4", {"precision": "int4"}, "contradict"),
        ("accuracy_level=4", {"precision": "fp32"}, "accuracy_level has no effect"),
        ("accuracy_level=1", {"precision": "int4", "execution_provider": "cuda"}, "accuracy_level has no effect"),
        ("accuracy_level=1", {"precision": "int8", "part": "embedding"}, "accuracy_level has no effect"),
        ("matmul_mixed_precision=last_matmul:int8", {"precision": "int8"}, "needs the precision int4"),
        ("matmul_mixed_precision=last_matmul:int8", {"precision": "int4", "part": "vision"}, "option of the decoder"),
        ("matmul_mixed_precision=last_matmul:int8", {"precision": "int4", "execution_provider": "dml"}, "DirectML"),
        ("exclude_embeds=true", {}, "part='text'"),
        ("exclude_embeds=false", {"part": "vision"}, "part='text'"),
        ("prune_lm_head=true", {"part": "vision"}, "option of the decoder"),
        ("shared_embeddings=true", {"part": "vision"}, "shared_embeddings has no effect"),
        ("shared_embeddings=false", {"part": "embedding"}, "shared_embeddings has no effect"),
        ("shared_embeddings=true exclude_embeds=true", {"part": "text"}, "shared_embeddings has no effect"),
        ("filename=a.onnx", {"part": "embedding"}, "option of the decoder"),
        ("filename=vision.onnx", {}, "another part's"),
        ("filename=Embedding.onnx", {}, "another part's"),
        ("", {"part": "text", "vision_precision": "fp32"}, "no vision encoder"),
        ("", {"part": "embedding", "vision_precision": "fp32"}, "no vision encoder"),
        ("", {"vision_precision": "int2"}, "int2"),
        ("", {"execution_provider": "cuda", "vision_precision": "int8"}, "not offered on cuda"),
        ("", {"execution_provider": "tpu"}, "Unknown execution provider"),
        ("", {"precision": "int3"}, "int3"),
        ("", {"part": "audio"}, "audio"),
        ("", {"revision": "main"}, "revision"),
        ("", {"threads": 0}, "threads"),
    ],
)
def test_options_that_can_have_no_effect_are_errors(
    refused: Callable[..., OptionError], extra: str, options: dict[str, Any], match: str
) -> None:
    refused(*extra.split(), match=match, **options)


def test_options_are_checked_before_anything_is_downloaded(
    refused: Callable[..., OptionError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlpack.export.preflight.resolve", lambda *arguments, **options: pytest.fail("was looked for"))
    refused("block_size=64", match="block_size", source=Path("org/name"), precision="fp32")
    refused(match="not offered", source=Path("org/name"), precision="int8", execution_provider="cuda")


def test_options_of_the_hub_with_a_folder_are_noted(tmp_path: Path) -> None:
    # users of the builder pass a cache folder for local folders, too
    extra = parse_extra_options(["hf_token=false"])
    result = build(DIGITS, tmp_path / "package", part="embedding", cache_dir=tmp_path / "cache", extra_options=extra)
    assert len(result.notes) == 1
    assert "cache_dir and hf_token had no effect" in result.notes[0]
    assert not (tmp_path / "cache").exists()


def test_embeddings_that_cannot_be_shared_give_a_note(tmp_path: Path) -> None:
    extra = parse_extra_options(["shared_embeddings=true"])
    result = build(DIGITS, tmp_path / "package", precision="int4", execution_provider="cuda", extra_options=extra)
    assert ["different ways" in note for note in result.notes] == [True]


# the syntax of extra options


@pytest.mark.parametrize(
    ("pair", "parts"),
    [
        ("block_sise=32", ["block_sise", "Did you mean block_size?"]),
        ("int4_blocksize=32", ["int4_blocksize", "vlpack has: "]),
        ("use_webgpu_fp32=1", ["use_webgpu_fp32", "vlpack has: accuracy_level, "]),
        ("exclude_lm_head=true", ["exclude_lm_head", "Did you mean"]),
        ("block_size", ["KEY=VALUE"]),
        ("block_size=48", ["48", "16, 32, 64, 128, 256"]),
        ("block_size=", ["block_size="]),
        ("accuracy_level=0", ["1, 2, 3, 4"]),
        ("is_symmetric=maybe", ["true or false"]),
        ("algo_config=k_quant", ["default, rtn"]),
        ("matmul_mixed_precision=head:int8", ["head:int8", "last_matmul and mixed_layers"]),
        ("matmul_mixed_precision=last_matmul:int2", ["last_matmul:int2"]),
        ("matmul_mixed_precision=last_matmul:int8,last_matmul:int4", ["twice"]),
        ("filename=../model.onnx", ["plain file name"]),
        ("filename=model", ["plain file name"]),
        ("filename=", ["plain file name"]),
        ("filename=.onnx", ["plain file name"]),
        ("filename=a\nb.onnx", ["plain file name"]),
        ("hf_token=", ["empty"]),
    ],
)
def test_bad_extra_options(pair: str, parts: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse_extra_options([pair])
    for part in parts:
        assert part in str(caught.value)


def test_an_option_given_twice() -> None:
    for second in ("block_size=32", "int4_block_size=64"):
        with pytest.raises(OptionError, match="block_size is given twice"):
            parse_extra_options(["block_size=32", second])


def test_every_option_has_a_parser_and_old_names_still_work() -> None:
    assert {field.name for field in fields(ExtraOptions)} == set(_PARSERS)
    pairs = ["int4_block_size=64", "int4_is_symmetric=0", "int4_accuracy_level=1", "int4_algo_config=rtn"]
    expected = ExtraOptions(block_size=64, is_symmetric=False, accuracy_level=1, algo_config="rtn")
    assert parse_extra_options(pairs) == expected


def test_values_from_python_are_checked() -> None:
    for options in ({"block_size": 17}, {"algo_config": "gptq"}, {"matmul_mixed_precision": {"head": "int8"}}):
        with pytest.raises(OptionError):
            ExtraOptions(**options)  # type: ignore[arg-type]
    assert ExtraOptions(matmul_mixed_precision={"last_matmul": "int4", "mixed_layers": "int8"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--extra_options A=1 B=2", ["A=1", "B=2"]),
        ("--extra-options A=1 --extra_options B=2 C=3", ["A=1", "B=2", "C=3"]),
        ("--extra_options A=1", ["A=1"]),
    ],
)
def test_several_values_after_one_flag(given: str, expected: list[str]) -> None:
    spread = spread_extra_options(["build", *given.split(), "-o", "out", "source"])
    assert [value for flag, value in pairwise(spread) if flag.startswith("--extra")] == expected
    assert spread[-3:] == ["-o", "out", "source"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--extra_options A=1 B=2 source", "--extra_options A=1 --extra_options B=2 source"),
        ("--extra_options A=1 -- a=b", "--extra_options A=1 -- a=b"),
        ("--extra_options -o out", "--extra_options -o out"),
        ("-o out --extra_options", "-o out --extra_options"),
        ("a=b --extra-options=A=1", "a=b --extra-options=A=1"),
    ],
)
def test_other_arguments_are_not_taken_for_extra_options(given: str, expected: str) -> None:
    assert spread_extra_options(given.split()) == expected.split()


# command lines of the builder


@pytest.mark.parametrize(
    "command",
    [
        "-i {source} -o {output} -p int4 -e cpu -c {cache} --part text",
        "--input {source} --output {output} --precision int4 --execution_provider cpu --part text",
        "{source} --output {output} --precision int4 --execution-provider cpu --cache_dir {cache} --part text",
        "-m {source} -o {output} -p int4 -e cpu --part text --extra_options accuracy_level=4 hf_token=false",
        "-o {output} -p int4 --extra_options prune_lm_head=true int4_accuracy_level=4 -e cpu --part text -i {source}",
        "-o {output} -p int4 --part text --extra_options prune_lm_head=true --extra_options accuracy_level=4 {source}",
    ],
)
def test_the_builders_command_lines(make: Make, tmp_path: Path, capsys: Capsys, command: str) -> None:
    places = {"source": DIGITS, "output": tmp_path / "package", "cache": tmp_path / "cache"}
    done = vlpack(capsys, "build", *(word.format(**places) for word in command.split()))
    assert done.code == 0, done
    assert content(tmp_path / "package") == content(make(precision="int4", part="text"))


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("-o {output}", "Which checkpoint?"),
        ("{source} -i {source} -o {output}", "Give one checkpoint"),
        ("{source}", "Where should the package go?"),
        ("{source} -o {output} --extra_options block_sise=32", "Did you mean block_size?"),
        ("{source} -o {output} --extra_options", "--extra_options"),
        ("{source} -o {output} -p int8 -e cuda", "not offered on cuda"),
        ("{source} -o {output} --threads 0", "threads"),
        ("{source} -o {output} --colour red", "--colour"),
    ],
)
def test_wrong_command_lines(tmp_path: Path, capsys: Capsys, command: str, part: str) -> None:
    places = {"source": DIGITS, "output": tmp_path / "package"}
    done = vlpack(capsys, "build", *(word.format(**places) for word in command.split()))
    assert (done.code, done.out) == (2, "")
    assert part in done.err
    assert list(tmp_path.iterdir()) == []
