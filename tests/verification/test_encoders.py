"""`verify` for embedding and reranker packages: nothing is generated, and the last stage is a vector or a score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval import make_text, make_vision
from samples import seal
from vlpack.builder import build
from vlpack.errors import InputError
from vlpack.tasks import EMBEDDING, RERANKER
from vlpack.verification.cases import built_in, read_cases
from vlpack.verification.result import Report
from vlpack.verification.run import verify

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {"text": make_text(folder / "text"), "vision": make_vision(folder / "vision")}


def check(source: Path, package: Path) -> Report:
    """Verifies a package with a text case and, if there is a vision encoder, a case with two images."""
    cases = built_in(sees=(package / "vision.onnx").is_file())
    return verify(package, source, cases=[cases[0], cases[-1]], threads=1)


@pytest.mark.parametrize("kind", ["text", "vision"])
@pytest.mark.parametrize(("task", "last"), [(EMBEDDING, "vector"), (RERANKER, "score")])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("int8", 0.15)])
def test_packages_without_faults(
    kind: str, task: str, last: str, precision: str, bound: float, sources: dict[str, Path], tmp_path: Path
) -> None:
    build(sources[kind], tmp_path / "package", precision=precision, task=task, threads=1)
    report = check(sources[kind], tmp_path / "package")
    assert report.findings == []
    for case in report.cases:
        stage = case.stages[-1]
        assert stage.name == last
        assert stage.graph is not None
        assert stage.graph.relative < 1e-5
        assert 0 < stage.total.relative < bound
        assert (case.tokens, case.generates, case.logits.mean_kl, case.logits.top1) == ([], False, 0.0, 1.0)
    assert all(weight.same for weight in report.weights)
    assert ("vision features" in {stage.name for stage in report.cases[1].stages}) == (kind == "vision")


def drop_deepstack(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vlpack.layers.deepstack.SideChannel.levels_of", lambda self, op, channel: [])


def swap_answers(patch: pytest.MonkeyPatch) -> None:
    from vlpack.layers.pooling import ScoreHead

    init = ScoreHead.__init__
    patch.setattr(
        ScoreHead, "__init__", lambda self, table, rows, size, answers: init(self, table, rows, size, answers[::-1])
    )


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = {
    "answers swapped": (swap_answers, RERANKER, "weights"),
    "DeepStack dropped": (drop_deepstack, EMBEDDING, "layer 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault: str, sources: dict[str, Path], tmp_path: Path) -> None:
    plant, task, stage = FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        build(sources["vision"], tmp_path / "package", task=task, threads=1)
    report = check(sources["vision"], tmp_path / "package")
    assert report.findings[0].stage == stage
    assert not report.ok


def test_the_wrong_token_is_pooled(sources: dict[str, Path], tmp_path: Path) -> None:
    """The last layer computes only the pooled token, so a wrong choice shows only after that layer."""
    import onnx_ir as ir

    build(sources["text"], tmp_path / "package", task=EMBEDDING, threads=1)
    path = tmp_path / "package" / "model.onnx"
    model = ir.load(path)
    for gather in [node for node in model.graph if node.op_type == "GatherND"]:
        last = gather.inputs[1]
        first = ir.node("Sub", [last, last])
        model.graph.insert_before(gather, first)
        gather.replace_input_with(1, first.outputs[0])
    ir.save(model, path)
    seal(path.parent)
    report = check(sources["text"], tmp_path / "package")
    assert [finding.stage for finding in report.findings] == ["layer 2", "layer 2"]


def test_documents(sources: dict[str, Path], tmp_path: Path) -> None:
    """A case may contain the document for a reranker; for other packages that is an error."""
    lines = [{"prompt": "Where is Lyon?", "document": text} for text in ("In France.", "In a pan.")]
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    build(sources["text"], tmp_path / "reranker", task=RERANKER, threads=1)
    report = verify(tmp_path / "reranker", sources["text"], cases=read_cases(path), threads=1)
    assert report.ok
    first, second = report.cases
    assert first.stages[1].total != second.stages[1].total
    build(sources["text"], tmp_path / "embedding", task=EMBEDDING, threads=1)
    with pytest.raises(InputError, match="line 1 has a document"):
        verify(tmp_path / "embedding", sources["text"], cases=read_cases(path), threads=1)
    build(sources["text"], tmp_path / "words", threads=1)
    with pytest.raises(InputError, match="line 1 has a document"):
        verify(tmp_path / "words", sources["text"], cases=read_cases(path), threads=1)
