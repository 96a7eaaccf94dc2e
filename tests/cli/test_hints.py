"""Hints of the command line for common mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from samples import DIGITS, IMAGES, READ, vlpack
from vlpack.architectures import ARCHITECTURES
from vlpack.builder import build
from vlpack.errors import PackageError
from vlpack.runtime.load import load

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DIGITS, tmp_path_factory.mktemp("package") / "digits", precision="int4").folder


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_names_of_architectures_are_not_cut_at_80_columns(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = vlpack(capsys, "architectures").out
    for name in ARCHITECTURES:
        assert name in shown
    assert "…" not in shown


def test_a_checkpoint_in_place_of_a_package(tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLPACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for verb in ("run", "chat"):
        question = ["Hello"] if verb == "run" else []
        done = vlpack(capsys, verb, DIGITS, *question)
        assert done.code == 2
        assert f"vlpack build {DIGITS} -o PACKAGE" in flat(done.err).replace("- ", "-"), done.err
        done = vlpack(capsys, verb, "org/a-model", *question)
        assert done.code == 2
        assert "org/a-model is not, or not completely, in the Hugging Face cache" in flat(done.err)
    done = vlpack(capsys, "run", tmp_path / "nowhere", "Hello")
    assert "Hub" not in done.err


def test_load_says_how_a_hub_id_becomes_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PackageError, match="There is no folder 'org/name'") as caught:
        load("org/name")
    assert "vlpack.build('org/name').folder" in str(caught.value.hint)


def test_an_answer_that_is_cut_off_is_marked(package: Path, capsys: Capsys) -> None:
    image = ["--image", IMAGES / "02.png", "--temperature", "0"]
    done = vlpack(capsys, "run", package, *image, "--max-tokens", "1", READ)
    assert done.code == 0
    assert "(cut after 1 tokens; --max-tokens allows more)" in flat(done.err)
    assert "cut after" not in done.out
    assert "cut after" not in vlpack(capsys, "run", package, *image, READ).err


def test_help_lists_all_extra_options(capsys: Capsys) -> None:
    from vlpack.options import _PARSERS

    shown = flat(re.sub(r"[│╭╮╰╯─]", " ", vlpack(capsys, "build", "--help").out))
    for name in _PARSERS:
        assert name in shown


def test_the_install_hint_of_verify_matches_the_readme(
    package: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlpack.verification.reference.find_spec", lambda name: None)
    done = vlpack(capsys, "verify", package, "--reference", DIGITS)
    assert "pip install '.[verify]'" in flat(done.err)
    assert "pip install '.[verify]'" in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
