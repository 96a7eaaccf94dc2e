"""GGUF files as checkpoints: values of all types, logits of all architectures, tokenizers, and kept codes."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx_ir as ir
import pytest
from gguf import GGMLQuantizationType as Type

from family import ROPE, Member, make_member
from gguf_files import matrices_as, write
from gguf_vision import set_values
from parity import Package, nothing_yet, relative
from tiny import BOS, EOS
from vlpack.architectures import architecture_of
from vlpack.builder import build
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.gguf.types import BLOCKS
from vlpack.errors import CheckpointError
from vlpack.inspection import inspect
from vlpack.options import parse_extra_options
from vlpack.package.manifest import read_manifest
from vlpack.preprocess import Tokenizer
from vlpack.quantize.blocks import unpack
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling
from vlpack.verification.weights import Weights, policy_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TOLERANCE = 1e-5
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"rope_type": "llama3", "factor": 32.0, "rope_theta": 500000.0}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
VISION = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
QWEN3_VL = VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
MROPE = ROPE | {"mrope_section": [6, 5, 5]}


def member(family: str, kind: str = "CausalLM", **settings: Any) -> Member:
    return Member(family, f"{family}Config", f"{family}For{kind}", **settings)


SEES = "ConditionalGeneration"
CASES: dict[str, tuple[Member, Type]] = {
    "qwen2": (member("Qwen2", tied=True), Type.F32),
    "qwen3": (member("Qwen3", text={"head_dim": 32, "attention_bias": True}), Type.F16),
    "qwen3-yarn": (member("Qwen3", text={"head_dim": 32, "rope_parameters": YARN}, tied=True), Type.BF16),
    "qwen3moe": (member("Qwen3Moe", text=EXPERTS | {"norm_topk_prob": True}), Type.F16),
    "llama": (member("Llama", text={"attention_bias": True, "rms_norm_eps": 1e-3}), Type.F32),
    "llama3": (member("Llama", text={"head_dim": 32, "rope_parameters": LLAMA3}), Type.Q8_0),
    "qwen3-q4": (member("Qwen3", text={"head_dim": 32}, tied=True), Type.Q4_0),
    "qwen2vl": (member("Qwen2_5_VL", SEES, text={"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}},
                       vision=VISION | {"window_size": 64, "fullatt_block_indexes": [1]}), Type.F16),
    "qwen3vl": (member("Qwen3VL", SEES, text={"head_dim": 32, "rope_parameters": MROPE}, vision=QWEN3_VL), Type.F16),
}  # fmt: skip


@pytest.mark.parametrize("number", BLOCKS)
def test_values_are_those_of_gguf(number: int) -> None:
    kind = Type(number)
    values, octets = gguf.GGML_QUANT_SIZES[kind]
    assert (kind.name, values, octets) == (BLOCKS[number].name, BLOCKS[number].values, BLOCKS[number].block.itemsize)
    raw = np.random.default_rng(number).integers(0, 256, (50, 3 * octets), np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw, kind)
    found = BLOCKS[number].dequantized(raw)
    # NaN in both places; all other values bit for bit
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    assert np.array_equal(found.view(np.uint32)[~np.isnan(found)], wanted.view(np.uint32)[~np.isnan(wanted)])


def reference_logits(folder: Path, member: Member, values: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The logits of transformers' model with the values of the GGUF file in the place of its own."""
    model = member.model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    set_values(model, values)
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor(ids)).logits.numpy()
    return logits


def package_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    package, length = Package(folder), ids.shape[1]
    past = [port for port in package.sessions["decoder"].get_inputs() if port.name.startswith("past")]
    positions = np.arange(length, dtype=np.int64)[None]
    out = package.run(
        "decoder", input_ids=ids, attention_mask=np.ones((1, length), np.int64), position_ids=positions,
        **{port.name: nothing_yet(port, 1) for port in past},
    )  # fmt: skip
    return out["logits"]


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tmp_path: Path) -> None:
    member, kind = CASES[name]
    checkpoint = make_member(tmp_path / "checkpoint", member)
    values = write(checkpoint, tmp_path / "model.gguf", matrices_as(kind))
    options = parse_extra_options(["prune_lm_head=false"])
    result = build(tmp_path / "model.gguf", tmp_path / "package", precision="fp32", extra_options=options, threads=1)
    ids = np.random.default_rng(0).integers(0, 2048, (1, 90))
    wanted = reference_logits(checkpoint, member, values, ids)
    assert relative(package_logits(tmp_path / "package", ids), wanted) < TOLERANCE
    assert any("text alone" in note for note in result.notes) is (member.vision is not None)


PLAIN = member("Qwen3", text={"head_dim": 32}, tied=True)
TEXTS = ["It's 2025: naïve cafés… 你好!\n\n  x = 10**3;\t", "<|im_start|>user\nHi<|im_end|>\n", "  ", "e\u0301 ｱ ½"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a tiny Qwen3 checkpoint whose matrices K-quants divide."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}
    return make_member(tmp_path_factory.mktemp("plain") / "checkpoint", member("Qwen3", text=wide, tied=True))


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0])
def test_codes_are_kept(kind: Type, plain: Path, tmp_path: Path) -> None:
    values = write(plain, tmp_path / "model.gguf", matrices_as(kind))
    result = build(tmp_path / "model.gguf", tmp_path / "package", threads=1)
    manifest = read_manifest(tmp_path / "package")
    bits = 4 if kind is Type.Q4_0 else 8
    assert manifest["precision"] == f"int{bits}"
    assert manifest["source"]["name"] == "model.gguf"
    assert list(manifest["source"]["files"]) == ["model.gguf"]
    assert any("keep their codes and scales, without any loss" in note for note in result.notes), result.notes
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    with Checkpoint.open(tmp_path / "model.gguf") as opened:
        architecture, named = architecture_of(opened)
        graphs = {part["name"]: ir.load(tmp_path / "package" / file) for file, part in manifest["parts"].items()}
        policy = policy_of(manifest, architecture.precision_facts)
        weights = Weights(architecture, named, policy, graphs, manifest["imported"])
        by_path = {weight.path: weight for _, weight in weights.all()}
        for path, own, names in [
            ("model.layers.0.mlp.down_proj", ["blk.0.ffn_down"], ["mlp.down_proj"]),
            ("model.layers.0.self_attn.qkv_proj", [f"blk.0.attn_{one}" for one in "qkv"],
             [f"self_attn.{one}_proj" for one in "qkv"]),
        ]:  # fmt: skip
            weight = by_path[path]
            assert weight.storage.label == f"int{bits} block 32 kept"
            arrays = weights.held("text", weight)
            octets = np.concatenate([raw[f"{one}.weight"].data for one in own])
            blocks = octets.reshape(len(octets), -1, 2 + 32 * bits // 8)
            scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
            codes = blocks[..., 2:]
            codes = np.concatenate([codes & 15, codes >> 4], axis=-1) if bits == 4 else codes ^ 128
            np.testing.assert_array_equal(unpack(arrays["qweight"], bits).reshape(codes.shape), codes)
            np.testing.assert_array_equal(arrays["scales"], scales)
            dequantized = np.concatenate([values[f"model.layers.0.{one}.weight"] for one in names])
            np.testing.assert_array_equal(weights.stored("text", weight), dequantized)


def test_k_quants_are_dequantized(plain: Path, tmp_path: Path) -> None:
    kinds = {"attn_q": Type.Q2_K, "attn_v": Type.Q6_K, "ffn_up": Type.Q3_K, "ffn_down": Type.Q5_K}

    def choose(name: str, values: np.ndarray) -> Type:
        return kinds.get(name.split(".")[-2], Type.Q4_K) if values.ndim > 1 else Type.F32

    values = write(plain, tmp_path / "model.gguf", choose)
    result = build(tmp_path / "model.gguf", tmp_path / "package", threads=1)
    assert any("dequantized and rounded again" in note and "Q4_K is not a grid" in note for note in result.notes)
    assert read_manifest(tmp_path / "package")["precision"] == "int4"
    with Checkpoint.open(tmp_path / "model.gguf") as opened:
        _, named = architecture_of(opened)
        assert set(named.tensors) == set(values)
        for name, wanted in values.items():
            assert np.array_equal(named.read(name), wanted), name
            if wanted.ndim > 1:
                assert np.array_equal(named.rows(name, 7, 20), wanted[7:20]), name
    description = inspect(tmp_path / "model.gguf")
    assert description["kind"] == "checkpoint"
    assert description["files"] == {"model.gguf": (tmp_path / "model.gguf").stat().st_size}


def test_rows_of_llama(tmp_path: Path) -> None:
    """Every range of rows of queries and keys, whose order in the file is another one."""
    settings = {"num_hidden_layers": 1, "attention_bias": True}
    folder = make_member(tmp_path / "checkpoint", member("Llama", text=settings))
    for kind in (Type.F16, Type.Q4_0):
        values = write(folder, tmp_path / "model.gguf", matrices_as(kind))
        with Checkpoint.open(tmp_path / "model.gguf") as opened:
            _, named = architecture_of(opened)
            for one, part in itertools.product(("q_proj", "k_proj"), ("weight", "bias")):
                name = f"model.layers.0.self_attn.{one}.{part}"
                count = len(values[name])
                for start, stop in itertools.combinations(range(0, count + 1, 5), 2):
                    assert np.array_equal(named.rows(name, start, stop), values[name][start:stop])


def test_tokenizer_and_answers(plain: Path, tmp_path: Path) -> None:
    write(plain, tmp_path / "model.gguf", matrices_as(Type.F32))
    build(tmp_path / "model.gguf", tmp_path / "package", precision="fp32", threads=1)
    build(plain, tmp_path / "wanted", precision="fp32", threads=1)
    one, two = (Tokenizer.from_folder(tmp_path / name) for name in ("package", "wanted"))
    for text in TEXTS:
        assert one.encode(text, add_special_tokens=True) == two.encode(text, add_special_tokens=True)
        assert one.decode(one.encode(text)) == two.decode(two.encode(text))
    og = pytest.importorskip("onnxruntime_genai")
    answers: list[Any] = []
    for name in ("package", "wanted"):
        model = Model(tmp_path / name, threads=1)
        prompt = model.prompt("What is here?", []).named_arrays()["input_ids"].tolist()
        answer = model.generate("What is here?", max_tokens=8, sampling=Sampling(temperature=0))
        answers.append((prompt, answer.tokens, answer.text))
        # the runtime's own tokenizer, for callers without Python
        runtime = og.Tokenizer(og.Model(str(tmp_path / name)))
        answers[-1] += ([list(runtime.encode(text)) for text in TEXTS[:2]],)
    assert answers[0] == answers[1]
    config, wanted = (
        json.loads((tmp_path / name / "genai_config.json").read_text(encoding="utf-8"))["model"]
        for name in ("package", "wanted")
    )
    assert set(config["eos_token_id"]) == set(wanted["eos_token_id"])
    assert config["context_length"] == wanted["context_length"]


def test_a_folder_with_a_tokenizer_of_its_own(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(plain, folder / "model.gguf", matrices_as(Type.F16), pre="unheard")
    with pytest.raises(CheckpointError, match="'gpt2', 'unheard', which is not read") as caught:
        build(folder, tmp_path / "package")
    assert "into one folder" in str(caught.value.hint)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(plain / name, folder / name)
    build(folder, tmp_path / "package", threads=1)
    assert (tmp_path / "package" / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()

    def without_tokens(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0] = {key: value for key, value in writer.kv_data[0].items() if "tokenizer." not in key}
        writer.add_tokenizer_model("no_vocab")

    write(plain, folder / "model.gguf", matrices_as(Type.F16), without_tokens)
    shutil.copyfile(plain / "generation_config.json", folder / "generation_config.json")
    build(folder, tmp_path / "second", threads=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (plain / name).read_bytes()
    shutil.copyfile(folder / "model.gguf", folder / "second.gguf")
    with pytest.raises(CheckpointError, match="2 models in GGUF files: model"):
        build(folder, tmp_path / "other")
    shutil.copyfile(plain / "config.json", folder / "config.json")
    with pytest.raises(CheckpointError, match="and its weights only as GGUF") as caught:
        build(folder, tmp_path / "other")
    assert "Give the GGUF file itself" in str(caught.value.hint)


@pytest.mark.parametrize(("family", "pre"), [("Qwen3", "qwen2"), ("Llama", "llama-bpe")])
def test_token_ids_are_those_of_transformers(family: str, pre: str, tmp_path: Path) -> None:
    """transformers reads the tokenizers of GGUF files too."""
    transformers = pytest.importorskip("transformers")
    folder = make_member(tmp_path / "checkpoint", member(family, text={"num_hidden_layers": 1, "head_dim": 32}))

    def with_numbers(writer: gguf.GGUFWriter) -> None:
        """Adds tokens of several digits, which the rules allow in different numbers."""
        writer.add_bos_token_id(BOS)
        tokens, kinds, merges = (
            writer.kv_data[0][f"tokenizer.ggml.{name}"].value for name in ("tokens", "token_type", "merges")
        )
        for number, (first, second) in enumerate([("1", "2"), ("12", "3"), ("123", "4")]):
            tokens[2100 + number], kinds[2100 + number] = first + second, gguf.TokenType.NORMAL
            merges.append(f"{first} {second}")

    write(folder, tmp_path / "model.gguf", matrices_as(Type.F16), with_numbers, pre=pre)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    with Checkpoint.open(tmp_path / "model.gguf") as opened:
        ours = Tokenizer.from_folder(opened.folder)
    # the last text is left out: transformers does not normalize it here, as Qwen's own tokenizer.json does (NFC)
    for text in [*TEXTS[:-1], "1234567", "don't I'LL  stop\r\n\r\n", "naïve—“quoted” 東京 \U0001f600"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_tokens_around_a_text(plain: Path, tmp_path: Path) -> None:
    def begin_and_end(writer: gguf.GGUFWriter) -> None:
        writer.add_bos_token_id(BOS)
        writer.kv_data[0]["tokenizer.ggml.add_bos_token"].value = True
        writer.add_add_eos_token(True)

    write(plain, tmp_path / "model.gguf", matrices_as(Type.F16), begin_and_end)
    with Checkpoint.open(tmp_path / "model.gguf") as opened:
        tokenizer = Tokenizer.from_folder(opened.folder)
    wanted = [BOS, *Tokenizer.from_folder(plain).encode("Hello"), EOS]
    assert tokenizer.encode("Hello", add_special_tokens=True) == wanted
    assert tokenizer.encode("Hello") == wanted[1:-1]
