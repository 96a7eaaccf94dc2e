"""The scripts in `benchmarks/` that measure the quality of quantized models: figures, inputs, tables and plots."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from checkpoint_copies import permuted, planted, write_copy
from family import Member, make_member
from vlpack.calibration.prompts import OPENINGS, QUESTIONS
from vlpack.preprocess.tokenizer import Tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script by its name, and removes it and the scripts it imports from sys.modules afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    member = Member("quality", "Qwen2Config", "Qwen2ForCausalLM", tied=True)
    return make_member(tmp_path_factory.mktemp("quality") / "checkpoint", member)


def row(model: str, name: str, kl: float, bits: float) -> dict[str, Any]:
    return {
        "model": model, "name": name, "kl": kl, "error": kl / 10, "top1": 0.8, "bits": bits, "head": 8.5,
        "texts": [kl], "version": "a peer 1",
    }  # fmt: skip


def test_divergence(load: Any) -> None:
    divergence = load("quality_scores").divergence
    expected, found = np.log([[0.5, 0.5], [0.8, 0.2]]), np.log([[0.9, 0.1], [0.4, 0.1]])
    kl, top1 = divergence(
        expected, found + 7
    )  # a constant added to the logits changes nothing; the second row differs in its scale
    assert kl == pytest.approx((0.5 * np.log(5 / 9) + 0.5 * np.log(5)) / 2)
    assert top1 == 1
    assert divergence(expected, np.stack([found[0], found[1, ::-1]]))[1] == 0.5
    with pytest.raises(ValueError, match="shape"):
        divergence(expected, found[:1])
    with pytest.raises(ValueError, match="finite"):
        divergence(expected, np.array([[0.0, np.nan], [0.0, 0.0]]))


def test_names_of_builds(load: Any) -> None:
    named = load("quality").named
    options = ["--precision", "int4", "--calibrate", "self", "--extra-options", "block_size=64"]
    assert named("--precision int4 --calibrate self --extra-options block_size=64") == (
        "vlpack int4, calibrate self, block_size=64",
        options,
    )
    assert named("best: -p int8") == ("vlpack best", ["-p", "int8"])
    for wrong in ("int8", "best: int8", "best: "):
        with pytest.raises(ValueError, match="not made of options"):
            named(wrong)


@pytest.mark.slow
def test_packages_are_measured(load: Any, checkpoint: Path, tmp_path: Path) -> None:
    """The command with a tiny model: fp32 has a divergence of 0, fewer bits have one, and outliers increase it."""
    scores, inputs = load("quality_scores"), load("quality_inputs")
    work, output = tmp_path / "work", tmp_path / "quality.json"
    work.mkdir()
    write_copy(checkpoint, work / "mild", permuted)
    write_copy(checkpoint, work / "outliers", permuted, planted)
    ids = np.random.default_rng(0).integers(0, 2000, (3, 40))
    np.save(work / scores.TOKENS, ids)
    (work / scores.CALIBRATION).write_text("{}")
    for model in scores.MODELS:
        inputs.write_reference(work / model, ids, scores.reference_file(work, model))
    command = [sys.executable, str(BENCHMARKS / "quality.py"), str(work), "--output", str(output), "--threads", "1"]
    builds = ["--build", "-p fp32", "--build", "plain: -p int4 --extra-options block_size=32"]
    subprocess.run([*command, *builds], check=True)
    found = json.loads(output.read_text())["quality"]
    rows = {(row["model"], row["name"]): row for row in found}
    assert len(rows) == len(found) == 4
    for model in scores.MODELS:
        plain = rows[model, "vlpack fp32"]
        assert abs(plain["kl"]) < 1e-6
        assert plain["top1"] > 0.99
        assert (plain["bits"], plain["head"]) == (32, 32)
        quantized = rows[model, "vlpack plain"]
        assert quantized["kl"] > 1e-4
        assert quantized["kl"] == pytest.approx(np.mean(quantized["texts"]))
        assert 4.5 < quantized["bits"] < 6
    subprocess.run([*command, "--models", "mild", "--build", "plain: -p int8"], check=True)
    again = json.loads(output.read_text())["quality"]
    assert [before == after for before, after in zip(found, again, strict=True)] == [True, True, False, True]
    wrong = subprocess.run([*command, "--build", "-p int5"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, "int5" in wrong.stderr, "Traceback" in wrong.stderr) == (1, True, False)


def test_texts_are_long_enough_and_held_out(
    load: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = load("quality_inputs")
    assert inputs.tokens(checkpoint).shape == (8, inputs.COUNT)
    whole = "\n".join(path.read_text(encoding="utf-8") for path in inputs.TEXTS.glob("*.txt"))
    asked = (*QUESTIONS, *inputs.QUESTIONS)
    assert not any(text in whole for text in (*asked, *(text for text in OPENINGS if len(text) > 15)))
    (tmp_path / "short.txt").write_text("Too short.")
    monkeypatch.setattr(inputs, "TEXTS", tmp_path)
    with pytest.raises(ValueError, match=r"short\.txt"):
        inputs.tokens(checkpoint)


def test_the_model_writes_calibration_texts(load: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = load("quality_inputs")
    monkeypatch.setattr(inputs, "LENGTH", 64)
    written = inputs.calibration(checkpoint)
    tokenizer = Tokenizer.from_folder(checkpoint)
    assert len(written["ids"]) == len(written["texts"]) >= len(inputs.OPENINGS)
    assert all(len(ids) <= 64 for ids in written["ids"])
    assert max(map(len, written["ids"])) == 64
    opening = tokenizer.encode(inputs.OPENINGS[6])
    assert any(ids[: len(opening)] == opening and len(ids) > len(opening) for ids in written["ids"])


@pytest.mark.parametrize(
    ("kind", "error", "bits"), [("f32", 0, (32, 32)), ("q8_0", 0.02, (8.5, 8.5)), ("q4_0", 0.2, (4.5, 8.5))]
)
def test_gguf_files_contain_the_weights(
    load: Any, checkpoint: Path, tmp_path: Path, kind: str, error: float, bits: tuple[float, float]
) -> None:
    gguf = pytest.importorskip("gguf")
    from safetensors.numpy import load_file

    load("gguf_model").write(checkpoint, tmp_path / "model.gguf", kind=kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights = load_file(checkpoint / "model.safetensors")
    assert len(tensors) == len(weights)
    for name, own in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.1.attn_k.bias", "model.layers.1.self_attn.k_proj.bias"),
        ("blk.2.ffn_down.weight", "model.layers.2.mlp.down_proj.weight"),
    ):
        values = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert np.allclose(values, weights[own], atol=0 if "bias" in name else error * np.abs(weights[own]).max())
    assert load("quality_llama").bits(tmp_path / "model.gguf") == bits


def test_bits_of_an_onnx_graph(load: Any, tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper, save

    # [32, 64] in blocks of 32: 4-bit codes and float32 scales; a head of [10, 64] in fp32
    codes, scales, head = np.zeros((32, 2, 16), np.uint8), np.ones((32, 2), np.float32), np.ones((64, 10), np.float32)
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "codes", "scales"], ["y"], "/model/layers.0/mlp/up_proj/MatMul_Q4",
            domain="com.microsoft", K=64, N=32, bits=4, block_size=32,
        ),
        helper.make_node("MatMul", ["x", "head"], ["z"], "/lm_head/MatMul"),
        helper.make_node("MatMul", ["y", "y"], ["w"], "/model/layers.0/attn/MatMul"),
    ]  # fmt: skip
    arrays: dict[str, Any] = {"codes": codes, "scales": scales, "head": head}
    values = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xz"]
    save(helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], values)), tmp_path / "model.onnx")
    assert load("quality_upstream").bits(tmp_path / "model.onnx") == (5, 32)


@pytest.mark.parametrize(("declared", "found"), [("heads, past, size", [1, 2, 0, 8]), ("3, past, 12", [1, 3, 0, 12])])
def test_caches_are_empty_at_the_beginning(load: Any, tmp_path: Path, declared: str, found: list[int]) -> None:
    """Shapes of caches have the graph's numbers, or those of the package's settings if the graph has names."""
    from onnx import parser, save

    graph = f"""<ir_version: 10, opset_import: ["": 21]>
    decoder (int64[batch, tokens] input_ids, float16[batch, {declared}] past_key_values_0_key) => (float logits) {{
        last = Constant <value_ints = [-1]> ()
        columns = Unsqueeze (input_ids, last)
        sizes = Shape (past_key_values_0_key)
        sums = Add (columns, sizes)
        logits = Cast <to = 1> (sums)
    }}"""
    save(parser.parse_model(graph), tmp_path / "model.onnx")
    decoder = {"filename": "model.onnx", "num_key_value_heads": 2, "head_size": 8}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    ids = np.array([[5, 6], [7, 8]])
    texts = list(load("onnx_logits").logits(tmp_path, ids, 1))
    assert [(rows - np.array(found)).T.tolist() for rows in texts] == [[row.tolist()] * 4 for row in ids]


@pytest.fixture
def results() -> list[dict[str, Any]]:
    ours = [row("mild", "vlpack int8", 0.0123, 8), row("outliers", "vlpack int8", 0.5, 8)]
    peers = [
        row("mild", "llama.cpp Q8_0", 0.0056, 8.5),
        row("mild", "llama.cpp Q4_0", 0.327, 4.5),
        row("outliers", "llama.cpp Q4_0", 0.35, 4.5),
        row("mild", "llama.cpp F32", 2e-6, 32),
    ]
    return [{"quality": ours}, {"quality": peers}]


def test_the_table(load: Any, results: list[dict[str, Any]]) -> None:
    lines = load("quality_page").table(results).splitlines()
    assert lines[0].endswith("weights in fp32: llama.cpp F32 2e-06.")
    assert lines[4:] == [
        "| llama.cpp Q8_0 | 8.50 | 8.50 | 0.0056 ± 0.0006 | 80.0% | - | - |",
        "| vlpack int8 | 8.00 | 8.50 | 0.0123 ± 0.0012 | 80.0% | 0.500 ± 0.050 | 80.0% |",
        "| llama.cpp Q4_0 | 4.50 | 8.50 | 0.327 ± 0.033 | 80.0% | 0.350 ± 0.035 | 80.0% |",
    ]


def test_the_page(results: list[dict[str, Any]], tmp_path: Path) -> None:
    """The command writes the table between its marks, and the plot has a panel of times if times are given."""
    (tmp_path / "benchmarks.md").write_text("# A\n<!-- quality -->\nold\n<!-- /quality -->\nend\n")
    for number, result in enumerate(results):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    runs = {"512": {"vlpack 2b-int8": [{"token": 0.041}], "llama.cpp Q4_0": [{"token": 0.05}, {"token": 0.043}]}}
    (tmp_path / "timing.json").write_text(json.dumps({"results": runs}))
    command = [sys.executable, str(BENCHMARKS / "page.py"), "--docs", str(tmp_path)]
    command += ["--quality", str(tmp_path / "0.json"), str(tmp_path / "1.json")]
    subprocess.run(command, check=True)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "old" not in page
    assert "| vlpack int8 | 8.00 |" in page
    plain = "".join(ElementTree.parse(tmp_path / "quality.svg").getroot().itertext())
    assert ("Q4_0" in plain, "planted" in plain, "ms per token" in plain, "F32" in plain) == (True, True, False, False)
    timed = ["--timing", str(tmp_path / "timing.json"), "--timed", "vlpack int8=vlpack 2b-int8"]
    subprocess.run([*command, *timed], check=True)
    words = [element.text for element in ElementTree.parse(tmp_path / "quality.svg").getroot().iter()]
    assert "ms per token" in words
    assert (words.count("int8"), words.count("Q4_0"), words.count("Q8_0")) == (3, 3, 1)
    assert (tmp_path / "benchmarks.md").read_text() == page
    wrong = subprocess.run([*command, str(tmp_path / "timing.json")], capture_output=True, text=True, check=False)
    assert (wrong.returncode, "not a result" in wrong.stderr) == (1, True)


@pytest.mark.parametrize(("lowest", "highest"), [(0.0055, 0.327), (1, 1), (0.1, 0.2), (3e-7, 40)])
def test_an_axis_of_decades_contains_all_values(load: Any, lowest: float, highest: float) -> None:
    found = load("scatter").decades(lowest, highest)
    assert found[0] <= lowest * (1 + 1e-6) < found[1] * (1 + 1e-6)
    assert found[-1] >= highest * (1 - 1e-6)
    assert len(found) >= 2
    assert found == sorted(found)


def test_labels_do_not_overlap_if_there_is_room(load: Any) -> None:
    scatter: ModuleType = load("scatter")
    frame = (0.0, 0.0, 400.0, 400.0)
    places = [(390.0, 200.0), (380.0, 203.0), (200.0, 5.0), (203.0, 200.0), (207.0, 207.0), (200.0, 197.0)]
    boxes = scatter.label_boxes(places, ["Q4_K_M, imatrix", "IQ4_XS", "int4", "int4 g64", "k_quant", "Q8_0"], frame)
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for index, box in enumerate(boxes):
        assert scatter.overlap(box, frame) == pytest.approx((box[2] - box[0]) * (box[3] - box[1]))
        assert not any(scatter.overlap(box, other) for other in (*boxes[:index], *marks))
