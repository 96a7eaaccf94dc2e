"""The images that ``--image`` names, the help of options, and the shell's completion."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from samples import ANSWERS, DIGITS, IMAGES, READ, vlpack
from vlpack.builder import build
from vlpack.cli.image_arguments import image_files, named_images
from vlpack.errors import InputError, OptionError

Capsys = pytest.CaptureFixture[str]
GREEDY = ("--temperature", "0")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DIGITS, tmp_path_factory.mktemp("package") / "digits", precision="int8").folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two images, and with files and folders that are no images."""
    made = tmp_path / "pictures"
    (made / "below.png").mkdir(parents=True)
    for name, copy in (("02.png", "a.PNG"), ("01.png", "b.png"), ("03.png", "below.png/c.png")):
        shutil.copyfile(IMAGES / name, made / copy)
    (made / "notes.txt").write_text("no image")
    return made


class Input:
    """Standard input that is not a terminal."""

    def __init__(self, data: bytes, terminal: bool = False) -> None:
        self.buffer, self.isatty = io.BytesIO(data), lambda: terminal


def flat(text: str) -> str:
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def test_files_of_folders_and_patterns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [str(folder / "a.PNG"), str(folder / "b.png")]
    assert image_files(str(folder)) == both
    assert image_files(f"{folder}/*.png") == both[1:]
    assert image_files(f"{folder}/[ab].*") == both
    assert image_files(f"{folder}/**/*.png") == [both[1], str(folder / "below.png" / "c.png")]
    (folder / "[x].png").write_bytes(b"")
    assert image_files(f"{folder}/[x].png") == [f"{folder}/[x].png"]  # an existing file, not a pattern
    for name in ("http://127.0.0.1/a?b=[1]*", "data:image/png;base64,AA", "missing.png", both[0]):
        assert image_files(name) == [name]
    monkeypatch.setenv("HOME", str(folder.parent))
    assert image_files("~/pictures/b.*") == both[1:]
    with pytest.raises(InputError, match="No file matches the pattern"):
        image_files(f"{folder}/*.gif")
    (folder.parent / "empty").mkdir()
    with pytest.raises(InputError, match="has no images"):
        image_files(str(folder.parent / "empty"))


def test_a_folder_and_standard_input(
    package: Path, folder: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.PNG").unlink()
    done = vlpack(capsys, "run", package, "--image", folder, *GREEDY, READ)
    assert done.out.strip() == ANSWERS["01.png"]["read"]
    monkeypatch.setattr(sys, "stdin", Input((IMAGES / "02.png").read_bytes()))
    done = vlpack(capsys, "run", package, "--image", "-", *GREEDY, READ)
    assert done.out.strip() == ANSWERS["02.png"]["read"]


@pytest.mark.parametrize(
    ("data", "terminal", "problem"),
    [
        (b"", False, "Standard input is empty"),
        (b"x", True, "no image on standard input"),
        (b"x", False, "not an image"),
    ],
)
def test_arguments_without_images(
    package: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch, data: bytes, terminal: bool, problem: str
) -> None:
    monkeypatch.setattr(sys, "stdin", Input(data, terminal))
    done = vlpack(capsys, "run", package, "--image", "-", READ)
    assert (done.code, problem in flat(done.err)) == (2, True), done.err


def test_standard_input_can_be_used_only_once(package: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Input(b"x"))
    with pytest.raises(OptionError, match="given twice"):
        named_images(["-", "-"])
    done = vlpack(capsys, "run", package, "--image", "-")
    assert (done.code, "Give the question as an argument" in done.err) == (2, True)
    done = vlpack(capsys, "chat", package, "--image", "-")
    assert (done.code, "chat reads questions from standard input" in done.err) == (2, True)
    monkeypatch.setattr("vlpack.cli.image_arguments.MAX_ENCODED_BYTES", 5)
    monkeypatch.setattr(sys, "stdin", Input(b"123456"))
    with pytest.raises(InputError, match="more than 5 bytes"):
        named_images(["-"])


def test_embedding_a_folder(tmp_path: Path, folder: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)  # long names would be cut in the output
    made = build(DIGITS, tmp_path / "package", precision="int8", task="embedding").folder
    shown = vlpack(capsys, "embed", made, "a text", "--image", "pictures").out
    assert "3 embeddings" in shown
    assert os.path.join("pictures", "b.png") in shown
    done = vlpack(capsys, "embed", made, "--image", folder / "a.PNG", folder / "b.png")
    assert (done.code, "Write --image before" in flat(done.err)) == (2, True)


def test_several_images_after_one_option(package: Path, capsys: Capsys) -> None:
    two = (IMAGES / "01.png", IMAGES / "02.png")
    for arguments in ((*two, READ), (*two, IMAGES / "03.png", READ), two):
        done = vlpack(capsys, "run", package, "--image", *arguments)
        assert (done.code, "Write --image before each image" in flat(done.err)) == (2, True), done.err
    done = vlpack(capsys, "run", package, "Read", "the digits.")
    assert (done.code, "--image" in done.err) == (2, False)  # no image is involved


VERBS = ("build", "run", "chat", "embed", "score", "inspect", "verify", "eval", "bench", "architectures", "demo")


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_names_values_instead_of_types(verb: str, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = vlpack(capsys, *([verb] if verb else []), "--help").out
    assert "list[" not in shown
    assert "bool" not in shown.lower()


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("vlpack arch", "architectures"),
        ("vlpack run --max-pi", "--max-pixels"),
        ("vlpack run package --lit", "--literal"),
    ],
)
def test_shell_completion(typed: str, completed: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_VLPACK_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-m", "vlpack.cli"], env={**os.environ, **words}, capture_output=True, text=True, check=False
    )
    assert completed in done.stdout.split(), done.stderr


def test_completion_can_be_installed(capsys: Capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "--install-completion" in vlpack(capsys, "--help").out
    # the shell is named, because it cannot be detected in a background process
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    environment: dict[str, Any] = {**os.environ, "HOME": str(tmp_path), "SHELL": "/bin/bash", **named}
    done = subprocess.run(
        [sys.executable, "-m", "vlpack.cli", "--show-completion", "bash"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "_VLPACK_COMPLETE=complete_bash" in done.stdout
