"""Embedding models and rerankers compared with live transformers, from checkpoint to result, and their errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import vlpack
from kept import Kept
from parity import relative
from retrieval import (
    AREA,
    BIASED,
    EMBEDDING_STEPS,
    RERANKER_STEPS,
    Recipe,
    add_steps,
    make_text,
    make_vision,
    picture,
)
from samples import edit_json
from samples import vlpack as run_vlpack
from tiny import IMAGE
from vlpack.errors import CheckpointError, InputError, OptionError, PackageError
from vlpack.options import parse_extra_options
from vlpack.preprocess.mrope import mrope_positions
from vlpack.quantize.policy import OFFERED
from vlpack.runtime.model import Model
from vlpack.runtime.retrieval import BATCH_TOKENS, Embedder, Reranker, _batches

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
TASK = "Given a web search query, retrieve relevant passages that answer the query"
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
RETRIEVE = "Given a search query, retrieve relevant candidates that answer the query."
TEXTS = ["The capital of China is Beijing.", "no", "Gravity attracts bodies. " * 9, "", "日本語 and <think> tokens"]
WIDE, TALL, SMALL = picture(1, 96, 64), picture(2, 40, 101), picture(3, 8, 9)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint that is made once and shared, so tests must not change it."""
    makers: dict[str, Callable[[Path], Path]] = {
        "text": make_text,
        "untied": lambda folder: make_text(folder, BIASED),
        "vision": make_vision,
        "vision untied": lambda folder: make_vision(folder, seed=5, tied=False, style="v4", deepstack=(2, 0)),
        "bare": lambda folder: bare(make_text(folder)),
        "bare vision": lambda folder: bare(make_vision(folder)),
    }
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = makers[name](tmp_path_factory.mktemp("checkpoint") / "tiny")
        return made[name]

    return get


@pytest.fixture(scope="module")
def loaded(source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def get(name: str, task: str, **options: Any) -> Any:
        key = (name, task, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("package") / "package"
            vlpack.build(source(name), folder, task=task, threads=1, **{"precision": "fp32", **options})
            made[key] = vlpack.load(folder, threads=1)
        return made[key]

    return get


@pytest.fixture(scope="module")
def recipe(source: Callable[[str], Path]) -> Callable[[str], Recipe]:
    made: dict[str, Recipe] = {}

    def get(name: str) -> Recipe:
        if name not in made:
            made[name] = Recipe(source(name))
        return made[name]

    return get


@pytest.fixture
def copy(source: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint that the test may change."""
    return lambda name: Path(shutil.copytree(source(name), tmp_path / "copy"))


def bare(folder: Path) -> Path:
    """A copy of the checkpoint in the form of a model without a head, whose tensor names have no prefix."""
    config = (folder / "config.json").read_text(encoding="utf-8")
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    names = transformers.AutoModel.from_pretrained(folder).state_dict()
    assert not any(name.startswith("model.") for name in names)
    (folder / "config.json").write_text(config, encoding="utf-8")  # published checkpoints name the class with a head
    return folder


def same(value: Any, reference: Any) -> bool:
    return relative(value, reference) < TOLERANCE


# embedding


@pytest.mark.parametrize("name", ["text", "untied", "bare"])
def test_texts(loaded: Any, recipe: Any, name: str) -> None:
    model, reference = loaded(name, "embedding"), recipe(name)
    assert isinstance(model, Embedder)
    got = model.embed(TEXTS)
    assert got.dtype == np.float32
    assert same(got, [reference.text(text) for text in TEXTS])
    queries = model.embed(TEXTS[:2], instruction=TASK)
    assert same(queries, [reference.text(f"Instruct: {TASK}\nQuery:{text}") for text in TEXTS[:2]])
    own = model.embed([{"text": "x", "instruction": "Compare."}, {"text": ["a", "b"]}], instruction=None)
    assert same(own, [reference.text("Instruct: Compare.\nQuery:x"), reference.text("ab")])


def parts(*items: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": i} if isinstance(i, str) else {"type": "image", "image": i} for i in items]


@pytest.mark.parametrize("name", ["vision", "vision untied", "bare vision"])
def test_images_and_texts_in_one_batch(loaded: Any, recipe: Any, name: str) -> None:
    model, reference = loaded(name, "embedding"), recipe(name)
    inputs = [
        "a text",
        {"image": WIDE},
        {"image": [TALL, WIDE, SMALL], "text": "three"},
        {"text": ["a", "b"]},
        "c" * 90,
    ]
    seen = [parts("a text"), parts(WIDE), parts(TALL, WIDE, SMALL, "three"), parts("a", "b"), parts("c" * 90)]
    expected = [reference.embedding(reference.seen("Represent the user's input.", p)) for p in seen]
    assert same(model.embed(inputs), expected)
    # a full stop is added to an instruction that has none
    told = [reference.embedding(reference.seen("Find it.", parts(WIDE)))]
    assert same(model.embed([{"image": WIDE}], instruction=" Find it "), told)
    assert same(model.embed([{"image": WIDE, "instruction": "Find it."}]), told)


def test_the_decoder_of_a_vision_model_as_a_text_model(loaded: Any, recipe: Any) -> None:
    model = loaded("vision", "embedding", part="text")
    expected = recipe("vision").seen("Represent the user's input.", parts("a text"))
    assert same(model.embed(["a text"])[0], expected / np.linalg.norm(expected))
    with pytest.raises(InputError, match=r"Input 1: The package has no vision part"):
        model.embed([{"image": WIDE}])


@pytest.mark.parametrize("name", ["text", "vision"])
def test_a_batch_gives_the_same_results_as_single_rows(loaded: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(name, "embedding")
    inputs: list[Any] = [text * count for text, count in zip(TEXTS * 3, [1, 2, 3] * 5, strict=True)]
    if name == "vision":
        inputs[2:2] = [{"image": WIDE}, {"image": SMALL, "text": "x"}]
    alone = np.concatenate([model.embed([item]) for item in inputs])
    assert np.allclose(model.embed(inputs), alone, atol=1e-6)
    for limit, value in {"BATCH_TOKENS": 64, "WINDOW_PROMPTS": 4, "WINDOW_BYTES": 1000}.items():
        monkeypatch.setattr(f"vlpack.runtime.retrieval.{limit}", value)
    assert np.allclose(model.embed(inputs), alone, atol=1e-6)
    assert model.embed([]).shape == (0, 64)


def test_batches_stay_within_their_budget() -> None:
    lengths = [5, BATCH_TOKENS * 2, 1000, 1100, 1200, 3, 900, 1000]
    batches = list(_batches(lengths))
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    assert batches[0] == [1]
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= BATCH_TOKENS for b in batches)


def test_dimensions(loaded: Any) -> None:
    model = loaded("text", "embedding")
    whole, short = model.embed(TEXTS), model.embed(TEXTS, dimensions=16)
    assert short.shape == (len(TEXTS), 16)
    assert same(short, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True))


@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.9999), ("int8", 0.99)])
@pytest.mark.parametrize("name", ["text", "vision"])
def test_precisions(loaded: Any, name: str, precision: str, least: float) -> None:
    inputs: list[Any] = [*TEXTS, *([{"image": WIDE, "text": "x"}] if name == "vision" else [])]
    exact = loaded(name, "embedding").embed(inputs)
    model = loaded(name, "embedding", precision=precision)
    near = model.embed(inputs)
    assert near.dtype == np.float32
    assert np.allclose(np.linalg.norm(near, axis=1), 1, atol=1e-5)
    cosines = (near * exact).sum(1)
    assert least < cosines.min() < 1 - 1e-9
    # padding must not influence the int8 scales of other tokens
    alone = np.concatenate([model.embed([item]) for item in inputs])
    assert (near * alone).sum(1).min() > 1 - (1 - least) / 5


@pytest.mark.parametrize("changed", [None, False], ids=["balanced and rotated", "plain"])
@pytest.mark.parametrize("name", ["text", "vision"])
def test_int4_is_exact_with_its_dequantized_weights(loaded: Any, source: Any, name: str, changed: bool | None) -> None:
    """Compared with dequantized weights, int4 is exact; compared with the original ones, a bound would show little."""
    options = {"vision_precision": "fp32"} if name == "vision" else {}
    extra = vlpack.ExtraOptions(accuracy_level=1, balance=changed, rotation=changed)
    channels: dict[str, Any] = {"balance": changed, "rotation": changed}
    reference, kept = Recipe(source(name)), Kept(source(name), "int4", task="embedding", vision="fp32", **channels)
    for path, parameter in reference.body.named_parameters():
        if parameter.ndim == 2 and "visual" not in path:
            parameter.data = torch.tensor(kept(f"model.{path}", parameter.detach().numpy()))
    model = loaded(name, "embedding", precision="int4", extra_options=extra, **options)
    if name == "text":
        assert same(model.embed(TEXTS), [reference.text(text) for text in TEXTS])
    else:
        seen = reference.seen("Represent the user's input.", parts(WIDE, "x"))
        assert same(model.embed([{"image": WIDE, "text": "x"}, "y"])[0], reference.embedding(seen))


# reranking


@pytest.mark.parametrize("name", ["text", "untied"])
def test_scores_of_texts(loaded: Any, recipe: Any, name: str) -> None:
    model, reference = loaded(name, "reranker"), recipe(name)
    assert isinstance(model, Reranker)
    yes, no = reference.rows()
    for instruction in (None, "Which is true?"):
        expected = []
        for text in TEXTS:
            body = f"<Instruct>: {instruction or TASK}\n<Query>: What is it?\n<Document>: {text}"
            prompt = (
                f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
                "<think>\n\n</think>\n\n"
            )
            hidden = reference.hidden(reference.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            logits = torch.tensor(np.array([hidden @ yes, hidden @ no], np.float64))
            expected.append(float(torch.log_softmax(logits, 0)[0].exp()))
        got = model.score("What is it?", TEXTS, instruction=instruction)
        assert all(isinstance(score, float) for score in got)
        assert same(got, expected)
        assert np.ptp(expected) > 0.02


@pytest.mark.parametrize("name", ["vision", "vision untied"])
def test_scores_of_images(loaded: Any, recipe: Any, name: str) -> None:
    model, reference = loaded(name, "reranker"), recipe(name)
    yes, no = reference.rows()
    query = {"text": "a query", "image": TALL}
    documents = ["a text", {"image": WIDE}, {"image": [WIDE, SMALL], "text": "both"}]
    expected = []
    for document in (["a text"], [WIDE], [WIDE, SMALL, "both"]):
        start = f"<Instruct>: {RETRIEVE}", "<Query>:", TALL, "a query", "\n<Document>:"
        hidden = reference.seen(JUDGE, parts(*start, *document))
        expected.append(1 / (1 + np.exp(-(hidden @ (yes - no)))))
    assert same(model.score(query, documents), expected)
    assert same([model.score(query, [document])[0] for document in documents], expected)


@pytest.mark.parametrize(("precision", "most"), [("fp16", 0.002), ("int8", 0.08), ("int4", 1.0)])
def test_precisions_of_scores(loaded: Any, precision: str, most: float) -> None:
    exact = loaded("vision", "reranker").score("a query", [*TEXTS, {"image": WIDE}])
    model = loaded("vision", "reranker", precision=precision)
    near = model.score("a query", [*TEXTS, {"image": WIDE}])
    assert 0 < np.abs(np.subtract(near, exact)).max() < most
    weights = model.manifest["parts"]["decoder.onnx"]["weights"]
    assert weights["head.answers"] == {"storage": "float32", "shape": [2, 64], "bytes": 512}
    assert "lm_head" not in weights


@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize(("provider", "precision"), [(p, kind) for p, offered in OFFERED.items() for kind in offered])
def test_every_precision_and_provider_gives_a_valid_model(
    source: Any, tmp_path: Path, task: str, provider: str, precision: str
) -> None:
    for name in ("text", "vision untied"):
        folder = tmp_path / name
        vlpack.build(source(name), folder, task=task, precision=precision, execution_provider=provider, threads=1)
        for graph in folder.glob("*.onnx"):
            onnx.checker.check_model(graph, full_check=True)
            model = onnx.load(graph, load_external_data=False)
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
            assert list(inferred.graph.output) == list(model.graph.output)


@pytest.mark.parametrize("name", ["text", "vision"])
def test_attention_in_plain_operators(loaded: Any, source: Any, tmp_path: Path, name: str) -> None:
    """Attention in standard operators, which fp32 on CUDA needs; here it runs on the CPU."""
    folder = vlpack.build(
        source(name), tmp_path / "p", task="embedding", precision="fp32", execution_provider="cuda"
    ).folder
    edit_json(folder / "vlpack.json", "execution_provider", value="cpu")
    graph = onnx.load(folder / ("model.onnx" if name == "text" else "decoder.onnx"), load_external_data=False)
    assert "GroupQueryAttention" not in {node.op_type for node in graph.graph.node}
    assert same(vlpack.load(folder).embed(TEXTS), loaded(name, "embedding").embed(TEXTS))


# positions


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_positions(merge: int) -> None:
    config = transformers.Qwen3VLConfig(vision_config={"spatial_merge_size": merge})
    # only the config is used, and building the model would take gigabytes
    reference = transformers.Qwen3VLModel.__new__(transformers.Qwen3VLModel)
    torch.nn.Module.__init__(reference)
    reference.config = config
    random = np.random.default_rng(merge)
    for images in (0, 1, 2, 4):
        grids = np.concatenate([np.ones((images, 1)), merge * random.integers(1, 7, (images, 2))], 1).astype(np.int64)
        ids: list[int] = list(random.integers(0, 99, random.integers(1, 5)))
        for grid in grids:
            ids += [IMAGE] * int(grid.prod() // merge**2) + list(random.integers(0, 99, random.integers(1, 5)))
        tokens = torch.tensor([ids])
        wanted, _ = reference.get_rope_index(tokens, (tokens == IMAGE).int(), image_grid_thw=torch.tensor(grids))
        assert mrope_positions(np.array(ids), grids, IMAGE, merge).tolist() == wanted[:, 0].tolist()


# choosing the task


def built(folder: Path, output: Path, **options: Any) -> tuple[str, tuple[str, ...]]:
    result = vlpack.build(folder, output / "package", precision="fp32", threads=1, **options)
    return json.loads((result.folder / "vlpack.json").read_text(encoding="utf-8"))["task"], result.notes


def test_tasks_that_the_checkpoint_shows(copy: Any, tmp_path: Path) -> None:
    folder = copy("text")
    assert built(folder, tmp_path / "1") == ("generate", ())
    named = folder.rename(tmp_path / "My-Reranker")
    task, notes = built(named, tmp_path / "2")
    assert task == "generate"
    assert "task='reranker'" in notes[0]
    add_steps(named, RERANKER_STEPS, true_token_id=2046, false_token_id=2047)
    task, notes = built(named, tmp_path / "3")
    assert (task, len(notes)) == ("reranker", 1)
    assert "modules.json" in notes[0]
    assert built(named, tmp_path / "4", task="generate") == ("generate", ())
    (named / "1_LogitScore" / "config.json").unlink()  # one published checkpoint lacks this file
    assert built(named, tmp_path / "5")[0] == "reranker"


@pytest.mark.parametrize("settings", [{"pooling_mode": "lasttoken"}, {"pooling_mode_lasttoken": True}])
def test_pooling_as_sentence_transformers_writes_it(copy: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = copy("text")
    add_steps(folder, EMBEDDING_STEPS, pooling_mode_mean_tokens=False, include_prompt=True, **settings)
    prompts = {"query": f"Instruct: {TASK}\nQuery:", "document": ""}
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": prompts, "default_prompt_name": None}), encoding="utf-8")
    task, notes = built(folder, tmp_path)
    assert (task, len(notes)) == ("embedding", 1)
    model = vlpack.load(tmp_path / "package")
    assert same(model.embed(["x"], prompt="query"), model.embed(["x"], instruction=TASK))
    assert same(model.embed(["x"], prompt="document"), model.embed(["x"]))
    with pytest.raises(OptionError, match=r"no prompt 'passage'") as caught:
        model.embed(["x"], prompt="passage")
    assert "query, document" in str(caught.value)
    edit_json(path, "default_prompt_name", value="query")
    vlpack.build(folder, tmp_path / "default", precision="fp32")
    assert same(vlpack.load(tmp_path / "default").embed(["x"]), model.embed(["x"], prompt="query"))


def test_bare_names_are_an_embedding_model(source: Any, copy: Any, tmp_path: Path) -> None:
    task, notes = built(source("bare"), tmp_path / "names")
    assert (task, len(notes)) == ("embedding", 1)
    folder = copy("bare")
    edit_json(folder / "config.json", "architectures", value=["Qwen3Model"])
    assert built(folder, tmp_path / "class")[0] == "embedding"
    with pytest.raises(CheckpointError, match="Qwen3Model is not offered for the task generate"):
        built(folder, tmp_path / "no", task="generate")
    described = vlpack.inspect(folder)
    assert described["task"] == "embedding"
    assert described["graphs"]["text"]["outputs"] == {"sentence_embedding": ["FLOAT", ["batch_size", 64]]}


def refused(folder: Path, tmp_path: Path, match: str, **options: Any) -> None:
    with pytest.raises((CheckpointError, OptionError), match=match):
        vlpack.build(folder, tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()


def test_steps_that_are_not_computed(copy: Any, tmp_path: Path) -> None:
    folder = copy("text")
    for settings in ({"pooling_mode": "mean"}, {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}, {}):
        add_steps(folder, EMBEDDING_STEPS, **settings)
        refused(folder, tmp_path, "pooling by")
    (folder / "1_Pooling" / "config.json").unlink()
    refused(folder, tmp_path, "lacks 1_Pooling/config.json", task="embedding")
    add_steps(folder, (*EMBEDDING_STEPS[:2], "models.Dense", EMBEDDING_STEPS[2]), pooling_mode="lasttoken")
    refused(folder, tmp_path, "Transformer, Pooling, Dense, Normalize are not supported")
    add_steps(folder, EMBEDDING_STEPS, pooling_mode="lasttoken")
    refused(folder, tmp_path, "for the task embedding, not reranker", task="reranker")
    for ids in ({"true_token_id": 7, "false_token_id": 2047}, {"true_token_id": 2046, "false_token_id": None}):
        add_steps(folder, RERANKER_STEPS, **ids)
        refused(folder, tmp_path, "the score has")
    steps = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    for path in ("../1_LogitScore", "/etc", "a/b"):
        (folder / "modules.json").write_text(json.dumps([steps[0], steps[1] | {"path": path}]), encoding="utf-8")
        refused(folder, tmp_path, "not a plain file name")
    for text, match in (("{}", "must hold a JSON list"), ("[", "not valid JSON"), ("[1]", "every step")):
        (folder / "modules.json").write_text(text, encoding="utf-8")
        refused(folder, tmp_path, match)
    (folder / "modules.json").unlink()
    configs: list[dict[str, Any]] = [{"prompts": {"query": 1}}, {"prompts": []}, {"default_prompt_name": "x"}]
    for config in configs:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(config), encoding="utf-8")
        if config == {"prompts": []}:  # empty prompts count as none
            continue
        refused(folder, tmp_path, "prompts|default_prompt_name", task="embedding")


def test_checkpoints_without_what_a_task_needs(copy: Any, source: Any, tmp_path: Path) -> None:
    folder = copy("untied")
    tokenizer = json.loads((source("untied") / "tokenizer.json").read_text(encoding="utf-8"))
    del tokenizer["model"]["vocab"]["yes"]
    tokenizer["model"]["merges"].remove(["y", "es"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    refused(folder, tmp_path, "'yes' is not one token", task="reranker")
    for name, value in (("is_causal", False), ("use_bidirectional_attention", True)):
        edit_json(folder / "config.json", name, value=value)
        for task in ("embedding", "reranker", "generate"):
            refused(folder, tmp_path, name, task=task)
        edit_json(folder / "config.json", name, value=...)
    model = transformers.AutoModel.from_pretrained(folder)
    model.save_pretrained(folder)
    edit_json(folder / "config.json", "architectures", value=["Qwen3ForCausalLM"])
    for task in ("generate", "reranker"):
        refused(folder, tmp_path, "lm_head.weight is missing", task=task)
    refused(source("text"), tmp_path, "Unknown task 'rank'", task="rank")


@pytest.mark.parametrize(
    ("extra", "options", "match"),
    [
        (["prune_lm_head=false"], {}, "prune_lm_head has no effect"),
        (["shared_embeddings=true"], {}, "shared_embeddings has no effect"),
        (["exclude_embeds=true"], {"part": "text"}, "exclude_embeds"),
        (["algo_config=rtn_last"], {"precision": "int4"}, "rtn_last"),
        (["matmul_mixed_precision=last_matmul:int8"], {"precision": "int4"}, "last_matmul"),
        (["accuracy_level=1"], {"precision": "int8"}, "accuracy_level"),
    ],
)
def test_options_without_effect(source: Any, tmp_path: Path, extra: list[str], options: Any, match: str) -> None:
    for name, asked in (("bare", "auto"), ("text", "reranker")):
        refused(source(name), tmp_path, match, task=asked, extra_options=parse_extra_options(extra), **options)


def test_options_with_effect(source: Any, tmp_path: Path) -> None:
    extra = parse_extra_options(["block_size=16", "accuracy_level=1", "filename=m.onnx"])
    result = vlpack.build(source("text"), tmp_path / "p", task="embedding", precision="int4", extra_options=extra)
    assert result.parts["text"][0] == "m.onnx"
    assert vlpack.load(result.folder).embed(["x"]).shape == (1, 64)


# the package


def test_the_package(loaded: Any) -> None:
    model = loaded("vision", "embedding")
    names = {path.name for path in model.folder.iterdir()}
    assert {"decoder.onnx", "vision.onnx", "embedding.onnx", "README.md", "preprocessor_config.json"} <= names
    assert not names & {"genai_config.json", "processor_config.json", "generation_config.json"}
    image = model.manifest["encoder"]["image"]
    assert (image["min_pixels"], image["max_pixels"]) == (4 * AREA, 1800 * AREA)
    described = vlpack.inspect(model.folder)
    assert (described["task"], described["problems"]) == ("embedding", [])
    outputs = described["parts"]["decoder"]["outputs"]
    assert list(outputs) == ["sentence_embedding"]


def test_the_readme_shows_how_to_run_the_package(loaded: Any) -> None:
    import onnxruntime as ort

    for name, task in (("text", "embedding"), ("text", "reranker"), ("vision", "embedding"), ("vision", "reranker")):
        model = loaded(name, task)
        card = (model.folder / "README.md").read_text(encoding="utf-8")
        ports = [port.name for file in model.folder.glob("*.onnx") for port in ort.InferenceSession(file).get_inputs()]
        assert all(f"`{port}`" in card for port in ports)
        assert (".score(" if task == "reranker" else ".embed(") in card
        if task == "reranker":
            prompt = model._form.reranker("QUERY", "DOCUMENT", model.instruction, "")
            assert f"```\n{prompt.text}```" in card
        elif name == "vision":
            assert f"```\n{model._form.embedding('TEXT', None, model.instruction, '').text}```" in card
    # the same steps that callers in other languages take, for a text
    model = loaded("text", "embedding")
    session = ort.InferenceSession(model.folder / "model.onnx")
    ids = [model._form.tokenizer.encode(text, add_special_tokens=True) for text in TEXTS[:3]]
    width = max(map(len, ids))
    arrays = {
        "input_ids": np.array([row + [2048] * (width - len(row)) for row in ids], np.int64),
        "attention_mask": np.array([[1] * len(row) + [0] * (width - len(row)) for row in ids], np.int64),
    }
    assert same(session.run(["sentence_embedding"], arrays)[0], model.embed(TEXTS[:3]))


def test_the_same_input_gives_the_same_bytes(source: Any, tmp_path: Path) -> None:
    for name, threads in (("a", 1), ("b", 3)):
        vlpack.build(source("text"), tmp_path / name, task="reranker", precision="int4", threads=threads)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_other_tasks_packages(loaded: Any, capsys: Any) -> None:
    embedder, reranker, model = (loaded("text", task) for task in ("embedding", "reranker", "generate"))
    assert isinstance(model, Model)
    wrong = [
        (embedder, "generate", "embed"),
        (embedder, "stream", "embed"),
        (embedder, "score", "embed"),
        (reranker, "generate", "score"),
        (reranker, "embed", "score"),
        (model, "embed", "generate"),
        (model, "score", "generate"),
    ]
    for one, method, instead in wrong:
        assert not hasattr(one, method)
        with pytest.raises(PackageError, match=f"for the task {one.task}") as caught:
            getattr(one, method)("x")
        assert f".{instead}(" in str(caught.value)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = embedder.nothing
    for verb, arguments, folder in (
        ("run", ["x"], embedder.folder),
        ("run", ["x"], reranker.folder),
        ("embed", ["x"], model.folder),
        ("score", ["x", "y"], embedder.folder),
    ):
        done = run_vlpack(capsys, verb, folder, *arguments)
        assert done.code == 2
        assert "does nothing else" in done.err
        assert "On the command line: vlpack " in done.err


def test_damaged_packages(loaded: Any, source: Any, tmp_path: Path) -> None:
    def altered(change: Callable[[dict[str, Any]], Any]) -> Path:
        folder = Path(shutil.copytree(loaded("vision", "embedding").folder, tmp_path / "p", dirs_exist_ok=True))
        path = folder / "vlpack.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        change(manifest)
        path.write_text(json.dumps(manifest), encoding="utf-8")
        return folder

    changes: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("section 'encoder' is damaged", lambda m: m.pop("encoder")),
        ("section 'encoder' is damaged", lambda m: m["encoder"].update(form="x")),
        ("section 'encoder' is damaged", lambda m: m["encoder"].update(max_length="x")),
        ("section 'encoder' is damaged", lambda m: m["encoder"].update(image={})),
        ("does not know", lambda m: m.update(task="x")),
        ("holds only vision", lambda m: [m["parts"].pop(name) for name in ("decoder.onnx", "embedding.onnx")]),
        ("not among its files", lambda m: m["parts"].update({"../x.onnx": m["parts"].pop("vision.onnx")})),
        ("installed onnxruntime lacks", lambda m: m.update(execution_provider="cuda")),
    ]
    for match, change in changes:
        with pytest.raises(PackageError, match=match):
            vlpack.load(altered(change))
    folder = altered(lambda m: None)
    size = (folder / "vision.onnx").stat().st_size
    (folder / "vision.onnx").write_bytes(b"x" * size)
    with pytest.raises(PackageError, match="onnxruntime cannot load"):
        vlpack.load(folder)
    (folder / "vision.onnx").write_bytes(b"x")
    with pytest.raises(PackageError, match="is damaged"):
        vlpack.load(folder)
    vlpack.build(source("vision"), tmp_path / "part", task="embedding", part="vision")
    with pytest.raises(PackageError, match="holds only vision"):
        vlpack.load(tmp_path / "part")


def test_inputs_that_are_not_usable(loaded: Any) -> None:
    model, seeing, reranker = loaded("text", "embedding"), loaded("vision", "embedding"), loaded("text", "reranker")
    wrong: list[tuple[Any, str]] = [
        ("a text", "inputs must be a list"),
        ([1], "Input 1 must be a text or a dictionary"),
        (["a", {}], "Input 2 must be a text or a dictionary"),
        ([{"txt": "a"}], "it has"),
        ([{"text": 1}], "must be texts"),
        ([{"text": []}], "neither text nor image"),
        ([{"text": "a", "instruction": 1}], "must be texts"),
        ([{"image": WIDE}], "takes only text"),
        (["x " * 600], r"Input 1 has \d+ tokens"),
    ]
    for inputs, match in wrong:
        with pytest.raises(InputError, match=match):
            model.embed(inputs)
    for item, match in (
        ("<|image_pad|>", "Input 1: The prompt has 1 image"),
        ({"image": "no.png"}, r"Input 1: .*no.png"),
    ):
        with pytest.raises(InputError, match=match):
            seeing.embed([item])
    for query, documents, match in (
        ("q", "d", "documents must be a list"),
        ({"image": WIDE}, ["d"], "The query has an image"),
        ("q", ["d", {"image": WIDE}], "Document 2 has an image"),
        ("q", [{"text": "d", "instruction": "x"}], "Document 1 must be"),
        ("q", ["d", "x " * 600], r"Document 2 has \d+ tokens"),
    ):
        with pytest.raises(InputError, match=match):
            reranker.score(query, documents)
    assert reranker.score("q", []) == []
    for options, match in (
        ({"dimensions": 0}, "dimensions is 0"),
        ({"dimensions": 65}, "dimensions is 65"),
        ({"dimensions": True}, "dimensions is True"),
        ({"instruction": "x", "prompt": "y"}, "both given"),
        ({"prompt": "y"}, "Its prompts: none"),
    ):
        with pytest.raises(OptionError, match=match):
            model.embed(["x"], **options)


def test_options_of_load(loaded: Any) -> None:
    folder = loaded("vision", "embedding").folder
    with pytest.raises(OptionError, match="threads is 0"):
        vlpack.load(folder, threads=0)
    with pytest.raises(OptionError, match="have no effect"):
        vlpack.load(loaded("text", "embedding").folder, max_pixels=5000)
    small = vlpack.load(folder, max_pixels=2048)
    assert same(small.embed([{"image": SMALL}]), loaded("vision", "embedding").embed([{"image": SMALL}]))
    assert not same(small.embed([{"image": WIDE}]), loaded("vision", "embedding").embed([{"image": WIDE}]))


# the command line


def test_embed_and_score(loaded: Any, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    WIDE.save(tmp_path / "wide.png")
    model = loaded("vision", "embedding")
    arguments = ("embed", model.folder, "a text", "b", "--image", tmp_path / "wide.png", "--threads", 1)
    done = run_vlpack(capsys, *arguments, "--json")
    assert (done.code, done.err) == (0, "")
    shown = json.loads(done.out)
    assert shown["dimensions"] == 64
    assert same(shown["embeddings"], model.embed(["a text", "b", {"image": WIDE}]))
    done = run_vlpack(capsys, *arguments, "--instruction", "Find.")
    assert done.code == 0
    assert "3 embeddings of 64 dimensions" in done.out
    assert "1.000" in done.out
    monkeypatch.setattr("sys.stdin", io.StringIO("a text\n\nb\n"))
    done = run_vlpack(capsys, "embed", model.folder, "--json", "--dimensions", 8)
    assert np.shape(json.loads(done.out)["embeddings"]) == (2, 8)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run_vlpack(capsys, "embed", model.folder).code == 2

    reranker = loaded("text", "reranker")
    done = run_vlpack(capsys, "score", reranker.folder, "q", *TEXTS[:3], "--json")
    assert same(json.loads(done.out)["scores"], reranker.score("q", TEXTS[:3]))
    done = run_vlpack(capsys, "score", reranker.folder, "q", *TEXTS[:3], "--instruction", "Which?")
    scores = [float(line.split()[0]) for line in done.out.splitlines()]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 3


def test_build_on_the_command_line(source: Any, capsys: Any, tmp_path: Path) -> None:
    done = run_vlpack(capsys, "build", source("bare"), "-o", tmp_path / "p", "-p", "fp32")
    assert done.code == 0
    assert "note: Built for the task embedding" in done.out
    done = run_vlpack(capsys, "inspect", tmp_path / "p")
    assert "embedding, fp32 for cpu" in done.out
