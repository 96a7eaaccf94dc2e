"""LoRA adapters: packages compared with live peft, tensor names of other versions, and adapters that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from family import ROPE, Member, make_member
from parity import Package, Reference, make_inputs, relative
from retrieval import Recipe, make_text
from runtime.test_parity_runtime import QUESTION, TOKENS, check, make_images
from samples import DIGITS, content, copy_digits, edit_json, vlpack
from tiny import Tiny, make_checkpoint
from vlpack.architectures import architecture_of
from vlpack.builder import build
from vlpack.calibration.run import start_calibration
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.files import sha256_file
from vlpack.checkpoint.hub import ResolvedSource
from vlpack.errors import CheckpointError, VlpackError
from vlpack.lora.merge import FILES, Adapter, Merged, merge
from vlpack.options import parse_extra_options
from vlpack.quantize import storage
from vlpack.runtime.load import load
from vlpack.runtime.model import Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 1e-5
TINY = Tiny(layers=3, depth=2, deepstack=(0, 1), seed=1)
UNTIED = TINY.but(tied=False, attention_bias=True, sharded=True)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

TEXT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["qkv", "attn.proj", "linear_fc1", "linear_fc2"]
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"proj": 5, "q_proj": 2, r"layers\.(0|2)\.mlp\.up_proj": 6, "visual.merger.linear_fc1": 3},
    "alpha_pattern": {r".*layers\.1\..*down_proj": 3, "model.language_model.layers.0.self_attn.q_proj": 11},
}


# --- compared with peft ------------------------------------------------------------------------------------


def train(model: Any, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Saves a peft adapter with random weights in all its tensors; peft wraps ``model``, which cannot be used again."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder


def merged_reference(base: Path, *adapters: Path) -> Reference:
    """The base model in transformers with the adapters merged by peft, one after another."""
    reference = Reference(base)
    for adapter in adapters:
        reference.model = peft.PeftModel.from_pretrained(reference.model, adapter).merge_and_unload().eval()
    return reference


def all_logits(base: Path, folder: Path, *adapters: Path, **options: Any) -> Package:
    extra = parse_extra_options(["prune_lm_head=false"])
    options = {"precision": "fp32", "extra_options": extra, "threads": 2, **options}
    build(base, folder, lora=[str(adapter) for adapter in adapters], **options)
    return Package(folder)


CASES: dict[str, tuple[Tiny, dict[str, Any]]] = {
    "text": (TINY, {"target_modules": TEXT}),
    "vision": (TINY, {"target_modules": VISION}),
    "all-linear": (TINY, {"target_modules": "all-linear", "lora_dropout": 0.3, "init_lora_weights": "gaussian"}),
    "rslora": (TINY, {"target_modules": TEXT + VISION, "use_rslora": True}),
    "patterns": (TINY, {"target_modules": TEXT + VISION, **PATTERNS}),
    "rslora and patterns": (UNTIED, {"target_modules": TEXT + VISION, "use_rslora": True, **PATTERNS}),
    "pos_embed": (TINY, {"target_modules": ["pos_embed", "q_proj"]}),
    "untied embedding and head": (UNTIED, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "saved modules": (
        TINY,
        {"target_modules": TEXT, "modules_to_save": ["language_model.norm", "visual.merger", "norm1"]},
    ),
    "saved encoder": (UNTIED, {"target_modules": TEXT, "modules_to_save": ["visual"]}),
    "saved head, tied": (TINY, {"target_modules": TEXT, "modules_to_save": ["lm_head"]}),
    "saved embedding, tied": (TINY, {"target_modules": TEXT, "modules_to_save": ["embed_tokens"]}),
    "saved pair, tied": (TINY, {"target_modules": TEXT, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved pair, untied": (UNTIED, {"target_modules": TEXT, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved together": (
        TINY,
        {"target_modules": TEXT, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "biases": (UNTIED, {"target_modules": ["q_proj", "linear_fc1"], "bias": "all"}),
    "biases of targets": (UNTIED, {"target_modules": ["q_proj", "linear_fc1"], "bias": "lora_only"}),
    "a bias of B": (UNTIED, {"target_modules": ["q_proj", "k_proj", "qkv"], "lora_bias": True}),
    "some layers": (TINY, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_merge_and_unload(
    case: str, checkpoint: Callable[[Tiny], Path], reference: Callable[[Tiny], Reference], tmp_path: Path
) -> None:
    tiny, how = CASES[case]
    base = checkpoint(tiny)
    adapter = train(Reference(base).model, tmp_path / "adapter", **how)
    inputs = make_inputs(tiny, ((1, 4, 6), (1, 8, 4)))
    wanted, before = merged_reference(base, adapter)(inputs), reference(tiny)(inputs)
    assert relative(before.logits, wanted.logits) > 0.02  # the adapter has an effect
    package = all_logits(base, tmp_path / "package", adapter)
    features = np.concatenate([wanted.merged, *wanted.levels], axis=1)
    assert relative(package.features(inputs), features) < TOLERANCE
    assert relative(package.logits(inputs, wanted.positions), wanted.logits) < TOLERANCE


@pytest.fixture(scope="module")
def everything(checkpoint: Callable[[Tiny], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes all kinds of weights."""
    model = Reference(checkpoint(TINY)).model
    folder = tmp_path_factory.mktemp("everything") / "adapter"
    return train(model, folder, target_modules=TEXT + VISION, modules_to_save=["norm"], **PATTERNS)


@pytest.mark.parametrize("images", [[], [(96, 64), (32, 80)]], ids=["text", "images"])
def test_greedy_tokens_through_the_stock_runtime(
    images: list[tuple[int, int]], checkpoint: Callable[[Tiny], Path], everything: Path, tmp_path: Path
) -> None:
    base = checkpoint(TINY)
    build(base, tmp_path / "package", precision="fp32", lora=everything)
    build(base, tmp_path / "plain", precision="fp32")
    model, pictures = Model(tmp_path / "package", threads=1), make_images(images)
    check(model, merged_reference(base, everything), pictures)
    answers = [m.generate(QUESTION, pictures, max_tokens=TOKENS) for m in (model, Model(tmp_path / "plain"))]
    assert answers[0].tokens != answers[1].tokens


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("fp16", 1e-3), ("int8", 1e-2), ("int4", 1e-2)])
def test_like_a_build_of_the_merged_checkpoint(
    precision: str, bound: float, checkpoint: Callable[[Tiny], Path], everything: Path, tmp_path: Path
) -> None:
    base = checkpoint(TINY)
    shutil.copytree(base, tmp_path / "merged")
    merged_reference(base, everything).model.save_pretrained(tmp_path / "merged")
    inputs = make_inputs(TINY, ((1, 4, 6),))
    positions = np.broadcast_to(np.arange(inputs.ids.shape[1]), (3, *inputs.ids.shape)).astype(np.int64)
    logits = [
        all_logits(source, tmp_path / name, *adapters, precision=precision).logits(inputs, positions)
        for source, name, adapters in ((tmp_path / "merged", "a", []), (base, "b", [everything]))
    ]
    # the last bit of a sum may decide how a value is rounded
    assert relative(logits[1].astype(np.float32), logits[0].astype(np.float32)) < bound
    sizes = [{p.name: p.stat().st_size for p in (tmp_path / n).glob("*.data")} for n in "ab"]
    assert sizes[0] == sizes[1]  # the tied head is still stored once


def test_two_adapters_are_merged_one_after_another(checkpoint: Callable[[Tiny], Path], tmp_path: Path) -> None:
    base = checkpoint(TINY)
    first = train(Reference(base).model, tmp_path / "first", target_modules=TEXT, modules_to_save=["lm_head"])
    model = merged_reference(base, first).model
    second = train(
        model, tmp_path / "second", 1, target_modules=["lm_head", "q_proj", "qkv"], modules_to_save=["layers.0.mlp"]
    )
    inputs = make_inputs(TINY, ((1, 4, 6),))
    wanted = merged_reference(base, first, second)(inputs)
    logits = all_logits(base, tmp_path / "package", first, second).logits(inputs, wanted.positions)
    assert relative(logits, wanted.logits) < TOLERANCE


@pytest.mark.parametrize("head", ["of the base", "of the adapter", "nowhere"])
def test_an_embedding_that_was_saved_but_not_trained(
    head: str, checkpoint: Callable[[Tiny], Path], tmp_path: Path
) -> None:
    """peft may save the embedding although it was not trained, and loads it into the base model, which stays tied."""
    base = tmp_path / "base"
    shutil.copytree(checkpoint(TINY), base)
    adapted = peft.get_peft_model(Reference(base).model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    path = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(path)
    for name in (f"{PREFIX}{EMBEDDING}.weight", f"{PREFIX}{HEAD}.weight"):
        tensors[name] = tensors[name][::-1].copy()
    if head != "of the adapter":
        del tensors[f"{PREFIX}{HEAD}.weight"]
    save_file(tensors, path)
    if head == "of the base":
        weights = load_file(base / "model.safetensors")
        save_file(weights | {f"{HEAD}.weight": weights[f"{EMBEDDING}.weight"]}, base / "model.safetensors")
    inputs = make_inputs(TINY, ((1, 4, 6),))
    wanted = merged_reference(base, tmp_path / "adapter")(inputs)
    package = all_logits(base, tmp_path / "package", tmp_path / "adapter")
    assert relative(package.logits(inputs, wanted.positions), wanted.logits) < TOLERANCE
    plain = all_logits(base, tmp_path / "plain")
    assert relative(plain.logits(inputs, wanted.positions), wanted.logits) > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_text_models(tied: bool, tmp_path: Path) -> None:
    base = make_member(tmp_path / "base", Member(f"{tied}", "Qwen2Config", "Qwen2ForCausalLM", tied=tied))

    def fresh() -> Any:
        return transformers.Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    adapter = train(fresh(), tmp_path / "adapter", target_modules=TEXT, modules_to_save=["lm_head"], use_rslora=True)
    ids = np.random.default_rng(0).integers(0, 2048, (1, 30))
    with torch.no_grad():
        merged = peft.PeftModel.from_pretrained(fresh(), adapter).merge_and_unload()
        wanted = merged(torch.tensor(ids)).logits.numpy()
    package = all_logits(base, tmp_path / "package", adapter, part="text")
    ports = [port for port in package.sessions["decoder"].get_inputs() if port.name.startswith("past")]
    past = {port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32) for port in ports}
    mask, positions = np.ones((1, 30), np.int64), np.arange(30)[None]
    out = package.run("decoder", input_ids=ids, attention_mask=mask, position_ids=positions, **past)
    assert relative(out["logits"], wanted) < TOLERANCE


def test_an_embedding_model(tmp_path: Path) -> None:
    """An embedding model has no head, so nothing is tied, and its adapters were trained on a bare model."""
    base = make_text(tmp_path / "base")
    recipe = Recipe(base)
    adapter = train(recipe.body, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj", "up_proj"])
    recipe = Recipe(base)
    before = recipe.text("a text")
    recipe.body = peft.PeftModel.from_pretrained(recipe.body, adapter).merge_and_unload().eval()
    build(base, tmp_path / "package", precision="fp32", task="embedding", lora=adapter)
    assert "adapter `adapter` merged into it, by" in (tmp_path / "package" / "README.md").read_text(encoding="utf-8")
    got = load(tmp_path / "package").embed(["a text"])[0]
    assert relative(got, recipe.text("a text")) < TOLERANCE
    assert relative(got, before) > 0.1


def test_a_reranker(tmp_path: Path) -> None:
    base = make_text(tmp_path / "base")
    model = transformers.Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = train(model, tmp_path / "adapter", target_modules=TEXT, modules_to_save=["lm_head"])
    model = transformers.Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    shutil.copytree(base, tmp_path / "merged")
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    scores = []
    for source, name, lora in ((base, "a", adapter), (tmp_path / "merged", "b", ()), (base, "c", ())):
        build(source, tmp_path / name, precision="fp32", task="reranker", lora=lora)
        scores.append(load(tmp_path / name).score("a query", ["one", "another document"]))
    assert relative(scores[0], scores[1]) < TOLERANCE
    assert relative(scores[0], scores[2]) > 1e-3


def test_experts_of_a_mixture(tmp_path: Path) -> None:
    """An adapter for transformers 4, which had a Linear module per expert, is merged by the checkpoint's names."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    base = make_member(tmp_path / "base", Member("mixture", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", sizes))
    weights, random = load_file(base / "model.safetensors"), np.random.default_rng(0)
    factors: dict[str, Any] = {}
    changed = dict(weights)
    for name, weight in weights.items():
        if ".experts." in name or "mlp.gate." in name:
            a, b = (random.normal(0, 0.3, s).astype(np.float32) for s in ((2, weight.shape[1]), (weight.shape[0], 2)))
            module = PREFIX + name.removesuffix(".weight")
            factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            changed[name] = weight + 2 * b @ a
    adapter = write_adapter(tmp_path / "adapter", factors, r=2, lora_alpha=4)
    shutil.copytree(base, tmp_path / "changed")
    save_file(changed, tmp_path / "changed" / "model.safetensors")
    build(base, tmp_path / "a", precision="fp32", lora=adapter)
    build(tmp_path / "changed", tmp_path / "b", precision="fp32")
    a, b = (np.fromfile(tmp_path / name / "model.onnx.data", np.float32) for name in "ab")
    assert relative(a, b) < 1e-6


def test_experts_in_one_tensor_are_not_replaced(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    member = Member("fused", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", sizes, fused=True)
    base = make_member(tmp_path / "base", member)
    name = "model.layers.0.mlp.experts.down_proj"
    whole = {PREFIX + name: load_file(base / "model.safetensors")[name]}
    write_adapter(tmp_path / "adapter", whole, modules_to_save=["mlp.experts"])
    with pytest.raises(CheckpointError, match="stack of experts"):
        build(base, tmp_path / "package", lora=tmp_path / "adapter")


# --- names of other versions -------------------------------------------------------------------------

MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
QWEN2_VL = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
STYLES: dict[str, Callable[[str], str]] = {
    "today's": lambda name: name,
    "before 4.52": lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual."),
    "language_model.model": lambda name: name.replace("model.language_model.", "language_model.model."),
    "a bare model": lambda name: name.removeprefix("model."),
}


@pytest.fixture(scope="module")
def aged(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A Qwen2-VL with transformers 5's tensor names, one with older tensor names, and an adapter for both."""
    folder = tmp_path_factory.mktemp("aged")
    made = {}
    for old in (False, True):
        member = Member("aged", "Qwen2VLConfig", "Qwen2VLForConditionalGeneration", MROPE, QWEN2_VL, old=old)
        made[old] = make_member(folder / f"{old}", member)
    model = member.model.from_pretrained(made[False], dtype=torch.float32)
    train(model, folder / "adapter", target_modules=["q_proj", "up_proj", "qkv", "fc1"], modules_to_save=["ln_q"])
    merged = peft.PeftModel.from_pretrained(
        member.model.from_pretrained(made[False], dtype=torch.float32), folder / "adapter"
    ).merge_and_unload()
    shutil.copytree(made[False], folder / "merged")
    merged.save_pretrained(folder / "merged")
    build(folder / "merged", folder / "wanted", precision="fp32")
    return made


@pytest.mark.parametrize("old", [False, True], ids=["new base", "old base"])
@pytest.mark.parametrize("style", STYLES)
def test_names(style: str, old: bool, aged: dict[bool, Path], tmp_path: Path) -> None:
    folder = aged[old].parent
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    renamed = {PREFIX + STYLES[style](name.removeprefix(PREFIX)): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "adapter" / WEIGHTS)
    build(aged[old], tmp_path / "package", precision="fp32", lora=tmp_path / "adapter")
    for name in ("decoder.onnx.data", "vision.onnx.data"):
        got, wanted = (np.fromfile(place / name, np.float32) for place in (tmp_path / "package", folder / "wanted"))
        assert relative(got, wanted) < 1e-6


# --- without peft: any rows, provenance, and refused adapters -----------------------------------------

QUERY, KEY = "model.language_model.layers.2.self_attn.q_proj", "model.language_model.layers.2.self_attn.k_proj"
QKV, NORM = "model.visual.blocks.0.attn.qkv", "model.language_model.norm"
SHAPES = {tensor.name: tensor.shape for tensor in Checkpoint.open(DIGITS).tensors.values()}
TABLE = "model.visual.pos_embed"
TABLE_AB = [np.random.default_rng(n).normal(0, 0.05, (n, 4)).astype(np.float32) for n in SHAPES[f"{TABLE}.weight"]]
TABLE_AB[0] = np.ascontiguousarray(TABLE_AB[0].T)
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "qkv"]}


def pair(module: str, rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """The matrices A and B of an adapter for a module of the digits checkpoint."""
    out, inner = SHAPES[f"{module}.weight"]
    random = np.random.default_rng(seed)
    a, b = (random.normal(0, 0.05, shape).astype(np.float32) for shape in ((rank, inner), (out, rank)))
    return {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(SETTINGS | settings), encoding="utf-8")
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "my-adapter", {**pair(QUERY), **pair(QKV, seed=1)})


@pytest.fixture(scope="module")
def digits() -> Checkpoint:
    return Checkpoint.open(DIGITS)


@pytest.fixture(scope="module")
def merged(digits: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    tensors = {**pair(QUERY), f"{PREFIX}{NORM}.weight": np.ones(SHAPES[f"{NORM}.weight"], np.float32)}
    tensors |= {f"{PREFIX}{TABLE}.lora_embedding_{name}": factor for name, factor in zip("AB", TABLE_AB, strict=True)}
    folder = write_adapter(tmp_path_factory.mktemp("merged") / "adapter", tensors)
    return merge(digits, Adapter.open(ResolvedSource(folder, None, None)), architecture_of(digits)[0])


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_rows(data: st.DataObject, merged: Merged, digits: Checkpoint) -> None:
    a, b = pair(QUERY).values()
    wanted = {
        f"{QUERY}.weight": digits.read(f"{QUERY}.weight").astype(np.float32) + 2 * b @ a,
        f"{KEY}.weight": digits.read(f"{KEY}.weight"),
        f"{TABLE}.weight": digits.read(f"{TABLE}.weight").astype(np.float32) + 2 * (TABLE_AB[1] @ TABLE_AB[0]).T,
        f"{NORM}.weight": np.ones(SHAPES[f"{NORM}.weight"], np.float32),
    }
    name = data.draw(st.sampled_from(sorted(wanted)))
    rows = SHAPES[name][0]
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "SLAB", data.draw(st.integers(500, 20_000)))
        cols = int(np.prod(SHAPES[name][1:]))
        width = data.draw(st.sampled_from([None, cols]))
        got = merged.rows(name, start, stop, width=width)
    assert got.ndim == (len(SHAPES[name]) if width is None else 2)
    np.testing.assert_allclose(
        got.astype(np.float32).reshape(stop - start, cols),
        wanted[name][start:stop].astype(np.float32).reshape(stop - start, cols),
        atol=1e-6,
    )
    np.testing.assert_allclose(merged.read(name).astype(np.float32), wanted[name].astype(np.float32), atol=1e-6)


def test_rows_that_do_not_exist(merged: Merged) -> None:
    for start, stop in ((0, 10_000), (-1, 2)):
        with pytest.raises(CheckpointError, match="do not exist"):
            merged.rows(f"{QUERY}.weight", start, stop)


def test_calibration_uses_the_merged_weights(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is also merged into the 8-bit package that calibration builds."""
    seen: list[dict[str, Any]] = []

    def start(model: Any, *given: Any) -> Any:
        seen.append(json.loads((model.folder / "vlpack.json").read_text(encoding="utf-8")))
        return start_calibration(model, *given)

    monkeypatch.setattr("vlpack.calibration.run.start_calibration", start)
    build(DIGITS, tmp_path / "package", precision="int4", lora=adapter, calibrate="self")
    made = json.loads((tmp_path / "package" / "vlpack.json").read_text(encoding="utf-8"))
    assert seen[0]["precision"] == "int8"
    assert seen[0]["source"]["adapters"] == made["source"]["adapters"]


def test_builds_are_reproducible_with_and_without_adapters(adapter: Path, tmp_path: Path) -> None:
    build(DIGITS, tmp_path / "a", precision="int4", lora=adapter, threads=1)
    build(DIGITS, tmp_path / "b", precision="int4", lora=[str(adapter)], threads=3)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    write_adapter(tmp_path / "zero", {key: 0 * tensor for key, tensor in pair(QUERY).items()})
    for name, lora in (("c", ()), ("d", tmp_path / "zero")):
        build(DIGITS, tmp_path / name, precision="int4", lora=lora)
    plain, zero, changed = (content(tmp_path / name)["decoder.onnx.data"] for name in "cda")
    assert plain == zero != changed


@pytest.mark.parametrize("together", [True, False])
def test_a_tied_weight_that_was_trained_is_stored_once(together: bool, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(0, 0.05, SHAPES[f"{EMBEDDING}.weight"]).astype(np.float32)
    tensors = {f"{PREFIX}{name}.weight": values for name in (EMBEDDING, HEAD)}
    saved = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": together}
    adapter = write_adapter(tmp_path / "adapter", tensors, **saved)
    plain = build(DIGITS, tmp_path / "plain", precision="fp32").total_bytes
    size = build(DIGITS, tmp_path / "package", precision="fp32", lora=adapter).total_bytes
    assert (size - plain > values.nbytes // 2) == (not together)


def test_buffers_of_a_saved_module_may_be_missing(tmp_path: Path) -> None:
    base = copy_digits(tmp_path / "base")
    weights = {name: tensor.astype(np.float32) for name, tensor in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()  # the copy is a hard link, so it must not be written into
    save_file(weights | {"model.visual.rotary_pos_emb.inv_freq": np.ones(4, np.float32)}, base / "model.safetensors")
    encoder = {PREFIX + name: tensor for name, tensor in weights.items() if name.startswith("model.visual.")}
    build(base, tmp_path / "a", lora=write_adapter(tmp_path / "adapter", encoder, modules_to_save=["visual"]))
    build(base, tmp_path / "b")
    assert content(tmp_path / "a")["vision.onnx.data"] == content(tmp_path / "b")["vision.onnx.data"]


def test_provenance(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = vlpack(capsys, "build", DIGITS, "-o", tmp_path / "package", "--lora", adapter)
    assert done.code == 0
    assert "note" not in done.out
    source = json.loads((tmp_path / "package" / "vlpack.json").read_text(encoding="utf-8"))["source"]
    hashes = {name: sha256_file(adapter / name) for name in (CONFIG, WEIGHTS)}
    assert source["adapters"] == [{"name": "my-adapter", "files": hashes}]
    assert str(tmp_path) not in json.dumps(source)
    card = (tmp_path / "package" / "README.md").read_text(encoding="utf-8")
    origin = "the folder `digits-qwen3-vl`, with the LoRA adapter `my-adapter` merged into it, by vlpack"
    assert f"Made from {origin}" in card
    shown = vlpack(capsys, "inspect", tmp_path / "package")
    assert "with the adapter my-adapter by vlpack" in " ".join(shown.out.split())
    as_json = json.loads(vlpack(capsys, "inspect", tmp_path / "package", "--json").out)
    assert as_json["source"]["adapters"] == [{"name": "my-adapter"}]
    edit_json(tmp_path / "package" / "vlpack.json", "source", "adapters", value=["x"])
    assert "is damaged" in vlpack(capsys, "inspect", tmp_path / "package").err


def test_from_the_hub(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("ab" * 20)
    shutil.copytree(adapter, snapshot)
    asked: list[Any] = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["revision"], options["allow_patterns"]))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    build(DIGITS, tmp_path / "package", lora="org/name@v1")
    assert asked == [("org/name", "v1", list(FILES))]
    source = json.loads((tmp_path / "package" / "vlpack.json").read_text(encoding="utf-8"))["source"]
    assert {k: source["adapters"][0][k] for k in ("repo_id", "commit")} == {"repo_id": "org/name", "commit": "ab" * 20}
    assert "huggingface.co/org/name" in (tmp_path / "package" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "noted"),
    [
        ("/home/me/digits-qwen3-vl/", False),
        ("org\\Digits-Qwen3-VL", False),
        ("", False),
        (None, False),
        ("Qwen/Qwen3-VL-2B", True),
    ],
)
def test_a_different_base_model_gives_a_note(name: str | None, noted: bool, adapter: Path, tmp_path: Path) -> None:
    edit_json(adapter / CONFIG, "base_model_name_or_path", value=name)
    notes = " ".join(build(DIGITS, tmp_path / "package", lora=adapter).notes)
    assert ("'Qwen/Qwen3-VL-2B'" in notes) == noted
    assert ("trained on" in notes) == noted


def test_an_adapter_for_other_parts_gives_a_note(tmp_path: Path) -> None:
    write_adapter(tmp_path / "vision", pair(QKV))
    notes = build(DIGITS, tmp_path / "package", part="text", lora=tmp_path / "vision").notes
    assert any("adapter vision changes nothing" in note for note in notes)


class Case:
    """A faulty adapter and words of its error; ``settings`` and ``tensors`` replace entries, or remove them by None."""

    def __init__(
        self, *words: str, settings: Any = None, tensors: Any = None, files: Callable[[Path], object] | None = None
    ) -> None:
        self.words, self.settings, self.tensors, self.files = words, settings or {}, tensors or {}, files


def link_out(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(DIGITS / "model.safetensors")


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def filled(key: str, value: float) -> np.ndarray:
    tensor = {**pair(QUERY), **pair(QKV)}[key].copy()
    tensor[1, 2] = value
    return tensor


QA, QB = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"
ZEROS = np.zeros((4, 4), np.float32)
HEAD, EMBEDDING = "lm_head", "model.language_model.embed_tokens"
PATCHES = "model.visual.patch_embed.proj"
BIAS = np.zeros(SHAPES[f"{QKV}.bias"], np.float32)
REFUSED: dict[str, Case] = {
    "no config": Case("has no adapter_config.json", files=lambda folder: (folder / CONFIG).unlink()),
    "no weights": Case("has no adapter_model", "pickle", files=lambda folder: (folder / WEIGHTS).unlink()),
    "a pickle": Case(
        "has no adapter_model", files=lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    ),
    "shards": Case(
        "is in shards", files=lambda folder: (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.index.json")
    ),
    "truncated": Case("is truncated", WEIGHTS, files=truncate),
    "a link out": Case(
        "leads out of",
        files=link_out,
    ),
    "broken config": Case("not valid JSON", files=lambda folder: (folder / CONFIG).write_text("{")),
    "a list": Case("must hold a JSON object", files=lambda folder: (folder / CONFIG).write_text("[]")),
    "NaN in the config": Case("not valid JSON", settings={"lora_alpha": float("nan")}),
    "another method": Case("peft_type is 'IA3'", settings={"peft_type": "IA3"}),
    "no method": Case("peft_type is None", settings={"peft_type": None}),
    "DoRA": Case("'use_dora' is True; DoRA is not supported", "merge_and_unload", settings={"use_dora": True}),
    "experts": Case("bare parameters", settings={"target_parameters": ["mlp.experts.gate_up_proj"]}),
    "tokens": Case("single tokens", settings={"trainable_token_indices": [1]}),
    "replicated": Case("replicating layers", settings={"layer_replication": [[0, 2], [1, 3]]}),
    "aLoRA": Case("Activated LoRA", settings={"alora_invocation_tokens": [1, 2]}),
    "a new setting": Case("'use_more' is 1", "does not know", settings={"use_more": 1}),
    "PiSSA": Case("init_lora_weights is 'pissa_niter_16'", settings={"init_lora_weights": "pissa_niter_16"}),
    "OLoRA": Case("init_lora_weights is 'olora'", settings={"init_lora_weights": "olora"}),
    "a new beginning": Case("init_lora_weights is 7", settings={"init_lora_weights": 7}),
    "fan_in_fan_out": Case("fan_in_fan_out", settings={"fan_in_fan_out": True}),
    "a bad bias": Case("'bias' is 'some'", settings={"bias": "some"}),
    "r is zero": Case("'r' is 0", settings={"r": 0}),
    "r is text": Case("'r' is '4'", settings={"r": "4"}),
    "alpha is below zero": Case("'lora_alpha' is -1", settings={"lora_alpha": -1}),
    "rslora is text": Case("'use_rslora' is 'yes'", settings={"use_rslora": "yes"}),
    "a pattern's rank": Case("rank_pattern: 'q_proj' is 2.5", settings={"rank_pattern": {"q_proj": 2.5}}),
    "a pattern's syntax": Case("is not a regular expression", settings={"alpha_pattern": {"q_(proj": 2}}),
    "an endless pattern": Case("too complex", settings={"rank_pattern": {"(a+)+b": 2}}),
    "patterns as a list": Case("'rank_pattern' is [1]", settings={"rank_pattern": [1]}),
    "names as text": Case("'modules_to_save' must be a list", settings={"modules_to_save": "norm"}),
    "rank of the config": Case("is 4 in lora_A.weight, 4 in lora_B.weight and 8 by", settings={"r": 8}),
    "rank of a pattern": Case("and 2 by adapter_config.json", settings={"rank_pattern": {"qkv": 2}}),
    "ranks that disagree": Case("they must be equal", tensors={QB: np.zeros((*SHAPES[f"{QUERY}.weight"][:1], 3))}),
    "A without B": Case("without lora_B.weight", tensors={QB: None}),
    "B without A": Case("without lora_A.weight", tensors={QA: None}),
    "half an embedding": Case(
        "without lora_embedding_B", tensors={f"{PREFIX}model.visual.pos_embed.lora_embedding_A": ZEROS}
    ),
    "a wrong width": Case("has the shape [4, 4]", "another model", tensors={QA: ZEROS}),
    "one number": Case("the rank of", tensors={QA: np.zeros((), np.float32)}),
    "integers": Case("is of type int32", tensors={QA: np.zeros((4, 64), np.int32)}),
    "no prefix": Case("does not begin with base_model.model.", tensors={"x.lora_A.weight": ZEROS}),
    "an unknown target": Case(
        "changes 'model.language_model.layers.2.self_attn.qq_proj.weight', which the base does not have",
        f"nearest name is '{QUERY}.weight'",
        tensors={
            QA.replace("q_proj", "qq_proj"): pair(QUERY)[QA],
            QB.replace("q_proj", "qq_proj"): pair(QUERY)[QB],
        },
    ),
    "a magnitude": Case(
        "belongs to a method", tensors={f"{PREFIX}{QUERY}.lora_magnitude_vector": np.zeros(4, np.float32)}
    ),
    "a token's row": Case(
        "belongs to a method", tensors={f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta": ZEROS}
    ),
    "twice": Case(
        "changes model.language_model.norm.weight as",
        tensors={f"{PREFIX}{n}.weight": np.zeros(SHAPES[f"{NORM}.weight"], np.float32) for n in (NORM, NORM[6:])},
    ),
    "a norm": Case(
        "which is not one matrix",
        tensors={f"{PREFIX}{NORM}.lora_A.weight": ZEROS, f"{PREFIX}{NORM}.lora_B.weight": ZEROS},
    ),
    "a convolution": Case(
        "which is a convolution",
        tensors={f"{PREFIX}{PATCHES}.lora_A.weight": ZEROS, f"{PREFIX}{PATCHES}.lora_B.weight": ZEROS},
    ),
    "a resized embedding": Case(
        "vocabulary was resized", tensors={f"{PREFIX}{EMBEDDING}.weight": np.zeros((9, 4), np.float32)}
    ),
    "a bias out of place": Case("is not a name that peft uses", tensors={f"{PREFIX}{QKV}.bias": BIAS}),
    "a base layer without LoRA": Case(
        "is not a name that peft uses", tensors={f"{PREFIX}{NORM}.base_layer.weight": np.ones(4, np.float32)}
    ),
    "a bias of B that the config has not": Case("disagree on a bias", tensors={f"{PREFIX}{QKV}.lora_B.bias": BIAS}),
    "a bias of B that only the config has": Case("disagree on a bias", settings={"lora_bias": True}),
    "a saved module that is missing": Case(
        f"lacks {NORM}.weight, which modules_to_save", settings={"modules_to_save": ["language_model.norm"]}
    ),
    "a tied head": Case(
        "LoRA on lm_head, which is tied",
        "tie_word_embeddings false",
        tensors={f"{PREFIX}{HEAD}.lora_A.weight": ZEROS, f"{PREFIX}{HEAD}.lora_B.weight": ZEROS},
    ),
    "a tied embedding": Case(
        f"LoRA on {EMBEDDING}, which is tied",
        tensors={f"{PREFIX}{EMBEDDING}.lora_embedding_A": ZEROS, f"{PREFIX}{EMBEDDING}.lora_embedding_B": ZEROS},
    ),
    "a head unlike its embedding": Case(
        "differs from",
        tensors={f"{PREFIX}{HEAD}.weight": np.zeros(SHAPES[f"{EMBEDDING}.weight"], np.float32)},
    ),
    "NaN": Case(f"{QB} of my-adapter holds nan at row 1, column 2", tensors={QB: filled(QB, np.nan)}),
    "infinity": Case(f"{QA} of my-adapter holds inf at row 1, column 2", tensors={QA: filled(QA, np.inf)}),
    "NaN in a saved module": Case(
        f"{PREFIX}{NORM}.weight of my-adapter holds nan at row 0",
        tensors={f"{PREFIX}{NORM}.weight": np.full(SHAPES[f"{NORM}.weight"], np.nan, np.float32)},
    ),
    "too large": Case(f"{QUERY}.weight holds", tensors={QA: filled(QA, 3e38), QB: filled(QB, 3e38) * 0 + 3e38}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_faulty_adapters_are_refused(
    case: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = REFUSED[case]
    for name, value in fault.settings.items():
        edit_json(adapter / CONFIG, name, value=value)
    if fault.tensors:
        tensors = load_file(adapter / WEIGHTS) | fault.tensors
        save_file({k: np.ascontiguousarray(t) for k, t in tensors.items() if t is not None}, adapter / WEIGHTS)
    if fault.files:
        fault.files(adapter)
    before = sorted(tmp_path.rglob("*"))
    done = vlpack(capsys, "build", DIGITS, "-o", tmp_path / "package", "--lora", adapter)
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) <= 2
    for word in fault.words:
        assert word in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_options(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(VlpackError, match="There is no folder"):
        build(DIGITS, tmp_path / "package", lora=tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        build(DIGITS, tmp_path / "package", lora=DIGITS)
    with pytest.raises(CheckpointError, match="is an adapter, not a model") as caught:
        build(adapter, tmp_path / "package")
    assert f"lora='{adapter}'" in str(caught.value)
    # the adapter is checked first, so that nothing is downloaded in vain
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        build("org/name", tmp_path / "package", lora=DIGITS)


def test_a_faulty_base_model_is_reported_as_such(adapter: Path, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", TINY)
    edit_json(base / "config.json", "text_config", "intermediate_size", value=128)
    with pytest.raises(CheckpointError, match="do not belong together"):
        build(base, tmp_path / "package", lora=adapter)


def test_verification_with_adapters(checkpoint: Callable[[Tiny], Path], everything: Path, tmp_path: Path) -> None:
    from vlpack.verification.cases import built_in
    from vlpack.verification.run import verify

    base = checkpoint(TINY)
    build(base, tmp_path / "package", precision="int4", threads=1, lora=everything)
    cases = built_in(sees=True)[2:3]
    assert verify(tmp_path / "package", base, cases=cases, tokens=4, lora=everything).findings == []
    without = verify(tmp_path / "package", base, cases=cases, tokens=4)
    assert without.findings[0].stage == "weights"
    merged_reference(base, everything).model.save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copyfile(base / name, tmp_path / "merged" / name)
    shutil.copyfile(base / "generation_config.json", tmp_path / "merged" / "generation_config.json")
    report = verify(tmp_path / "package", tmp_path / "merged", cases=cases, tokens=4)
    assert {finding.stage for finding in report.findings} <= {
        "weights"
    }  # peft adds in another order, so that a few weights are rounded differently
    assert max(stage.graph.relative for stage in report.cases[0].stages if stage.graph) < 1e-5
