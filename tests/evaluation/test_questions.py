"""`vlpack eval`: scores of known answers, refused data, and comparisons with transformers and without DeepStack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samples import ANSWERS, COUNT, DIGITS, IMAGES, READ, content, vlpack
from vlpack.builder import build
from vlpack.errors import CheckpointError, InputError, OptionError
from vlpack.evaluation.questions import Question, evaluate, interval, read_questions, score

CHOICES = ("red", "green", "A car")


@pytest.mark.parametrize(
    ("metric", "answers", "given", "value"),
    [
        ("exact", ("42",), " 42. ", 1.0),
        ("exact", ("4.2",), "42", 0.0),
        ("exact", ("A Car",), "a  car!", 1.0),
        ("exact", ("one", "two"), "Two", 1.0),
        ("exact", ("one",), "one two", 0.0),
        ("choice", ("B",), "B", 1.0),
        ("choice", ("B",), "(b) green", 1.0),
        ("choice", ("B",), "The answer is B.", 1.0),
        ("choice", ("B",), "green", 1.0),
        ("choice", ("C",), "A car", 1.0),  # the text of a choice, not the letter A
        ("choice", ("B",), "Because of it", 0.0),
        ("choice", ("B",), "D", 0.0),
        ("choice", ("B",), "", 0.0),
        ("anls", ("receipt",), "Receipt", 1.0),
        ("anls", ("receipt",), "receit", 1 - 1 / 7),
        ("anls", ("abcd",), "abxy", 0.5),
        ("anls", ("abcd",), "axyz", 0.0),
        ("anls", ("x", "total"), "totals", 1 - 1 / 6),
        ("anls", ("x",), "", 0.0),
    ],
)  # fmt: skip
def test_scores(metric: str, answers: tuple[str, ...], given: str, value: float) -> None:
    question = Question("?", (), answers, CHOICES if metric == "choice" else ())
    assert score(metric, question, given) == pytest.approx(value)


def test_intervals() -> None:
    mean, low, high = interval([1.0] * 8 + [0.0] * 2)
    assert (mean, round(low, 3), round(high, 3)) == (
        0.8,
        0.490,
        0.943,
    )  # computed by hand with the formula of Wilson 1927
    mean, low, high = interval([0.5, 0.7, 0.9, 0.6])
    assert mean == pytest.approx(0.675)
    assert low < mean < high
    assert interval([0.5, 0.7, 0.9, 0.6]) == (mean, low, high)


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_questions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((IMAGES / "00.png").read_bytes())
    one, two = read_questions(
        write(
            tmp_path,
            {"image": "a.png", "question": "Which?", "answer": "green", "choices": list(CHOICES)},
            "",
            {"question": "How many?", "answer": [3, "three"]},
        )
    )
    assert one == Question("Which?", (str(tmp_path / "a.png"),), ("B",), CHOICES)
    assert one.prompt == "Which?\nA. red\nB. green\nC. A car\nAnswer with the letter of the right choice only."
    assert two == Question("How many?", (), ("3", "three"))
    assert two.prompt == "How many?"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        {"question": "?"},
        {"question": 3, "answer": "x"},
        {"question": "?", "answer": []},
        {"question": "?", "answer": {"a": 1}},
        {"question": "?", "answer": "x", "image": "missing.png"},
        {"question": "?", "answer": "x", "choices": ["y", "z"]},
        {"question": "?", "answer": "x", "choices": [str(i) for i in range(30)]},
    ],
    ids=str,
)
def test_data_that_is_refused(line: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.jsonl"):
        read_questions(write(tmp_path, line))
    with pytest.raises(InputError, match=r"data\.jsonl"):
        read_questions(write(tmp_path, ""))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "digits"
    build(DIGITS, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = {"read": READ, "count": COUNT}
    return write(
        tmp_path_factory.mktemp("data"),
        *(
            {"image": str(IMAGES / name), "question": asked[kind], "answer": truth}
            for name, answers in ANSWERS.items()
            for kind, truth in answers.items()
            if kind in asked
        ),
    )


def test_without_deepstack_scores_are_lower(package: Path, data: Path) -> None:
    told: list[tuple[str, int, int]] = []
    before = content(package)
    result = evaluate(package, data, without_deepstack=True, progress=lambda *where: told.append(where))
    assert content(package) == before  # the package without DeepStack is made of these files, which must not change
    assert [path.name for path in package.parent.iterdir() if path.name.startswith(".")] == []
    whole, without = result.scores
    assert (whole.name, without.name) == ("package", "without DeepStack")
    assert whole.mean > 0.9
    assert without.mean < whole.mean - 0.2
    (comparison,) = result.comparisons
    assert comparison.mean == pytest.approx(whole.mean - without.mean)
    assert 0 < comparison.low < comparison.mean < comparison.high
    assert told[-1] == ("without DeepStack", result.questions, result.questions)


def test_the_reference_answers_the_same(package: Path, data: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    result = evaluate(package, data, reference=DIGITS, limit=12)
    assert result.questions == 12
    assert result.scores[0].answers == result.scores[1].answers
    assert result.comparisons[0].mean == 0


def test_options(package: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Unknown metric 'bleu'"):
        evaluate(package, data, metric="bleu")
    with pytest.raises(OptionError, match="needs choices"):
        evaluate(package, data, metric="choice")
    asked: list[object] = []
    with pytest.raises(CheckpointError, match=r"There is no folder '\./no/where'"):
        evaluate(package, data, reference="./no/where", progress=lambda *where: asked.append(where))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(OptionError, match="reference is in GGUF"):
        evaluate(package, data, reference=tmp_path / "model.gguf", progress=lambda *where: asked.append(where))
    assert asked == []
    build(DIGITS, tmp_path / "text", part="text")
    text = write(tmp_path, {"question": "How many?", "answer": "3"})
    with pytest.raises(OptionError, match="no DeepStack"):
        evaluate(tmp_path / "text", text, without_deepstack=True)


def test_the_command(package: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = vlpack(capsys, "eval", package, data, "--limit", 4, "--json")
    assert done.code == 0
    shown = json.loads(done.out)
    assert shown["questions"] == len(shown["scores"][0]["answers"]) == 4
    done = vlpack(capsys, "eval", package, data, "--limit", 4, "--metric", "anls", "--without-deepstack")
    assert "anls, %" in done.out
    assert "package against without DeepStack: " in done.out
    assert "4 questions." in done.out


def test_wrong_answers_are_shown(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(IMAGES / "01.png")
    lines = [{"image": image, "question": READ, "answer": answer} for answer in ("right", "zero one", "[bold]no")]
    lines[0]["answer"] = ANSWERS["01.png"]["read"]
    questions = write(tmp_path, *lines)
    shown = vlpack(capsys, "eval", package, questions).out
    assert "Not right (2 of 3):" in shown
    said = f"{READ} (01.png): {ANSWERS['01.png']['read']!r}, right is"
    assert f"{said} 'zero one'" in shown
    assert f"{said} '[bold]no'" in shown
    shown = vlpack(capsys, "eval", package, questions, "--wrong", 1).out
    assert shown.count(said) == 1
    assert "… and 1 more: --wrong 2 lists all, as --json does." in shown
    assert "Not right" not in vlpack(capsys, "eval", package, questions, "--wrong", 0).out
    found = json.loads(vlpack(capsys, "eval", package, questions, "--json").out)
    assert [one["answers"] for one in found["asked"]] == [[line["answer"]] for line in lines]
    assert found["scores"][0]["values"] == [1.0, 0.0, 0.0]
