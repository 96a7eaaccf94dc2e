"""Packages run with onnxruntime-genai alone, from Python and from C, as the examples and every package's README say."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import onnxruntime_genai as og
import pytest

import vlpack
from samples import ANSWERS, DIGITS, EXAMPLES, IMAGES, READ

PROGRAM = EXAMPLES / "stock_runtime.py"
COMPILER = shutil.which("cc") if sys.platform == "linux" else None


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlpack.build(DIGITS, tmp_path_factory.mktemp("digits") / "package", precision="int8").folder


def ask(program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", [str(program), *map(str, arguments)])
    runpy.run_path(str(program), run_name="__main__")
    return capsys.readouterr().out


def test_the_python_example_reads_all_images(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {name: ask(PROGRAM, monkeypatch, capsys, digits, READ, IMAGES / name) for name in ANSWERS}
    right = [name for name, answer in answers.items() if answer.split() == ANSWERS[name]["read"].split()]
    assert len(right) == len(ANSWERS) == 24, answers


def test_the_python_example_with_two_images_and_without_images(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers have the same tokens as with vlpack's own prompt."""
    names = [IMAGES / "06.png", IMAGES / "07.png"]
    for images in (names, []):
        expected = vlpack.load(digits).generate(READ, list(images), sampling=vlpack.Sampling(temperature=0)).text
        assert ask(PROGRAM, monkeypatch, capsys, digits, READ, *images) == expected + "\n"


def test_the_python_example_runs_a_decoder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = vlpack.build(DIGITS, tmp_path / "text", precision="int8", part="text").folder
    expected = vlpack.load(package).generate(READ, sampling=vlpack.Sampling(temperature=0)).text
    assert ask(PROGRAM, monkeypatch, capsys, package, READ) == expected + "\n"


def test_every_package_has_the_example_in_its_readme(digits: Path, tmp_path: Path) -> None:
    text = vlpack.build(DIGITS, tmp_path / "text", precision="int8", part="text").folder
    vision = vlpack.build(DIGITS, tmp_path / "vision", precision="int8", part="vision").folder
    block = f"```python\n{PROGRAM.read_text(encoding='utf-8')}```\n"
    for package in (digits, text):
        assert block in (package / "README.md").read_text(encoding="utf-8")
    assert "onnxruntime_genai" not in (vision / "README.md").read_text(
        encoding="utf-8"
    )  # a package of the vision part does not run by itself


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("there is no C compiler, or this is not Linux")
    program = tmp_path_factory.mktemp("c") / "stock_runtime"
    folder = Path(og.__file__).parent
    library = folder / "libonnxruntime-genai.so"
    strict = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
    source = EXAMPLES / "stock_runtime.c"
    subprocess.run([COMPILER, *strict, source, "-o", program, library, f"-Wl,-rpath,{folder}"], check=True)
    return program


def run_compiled(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*")
    environment = os.environ | {"ORT_LIB_PATH": str(library)}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_the_c_example_reads_all_images(compiled: Path, digits: Path) -> None:
    answers = {name: run_compiled(compiled, digits, READ, IMAGES / name).stdout for name in ANSWERS}
    right = [name for name, answer in answers.items() if answer.split() == ANSWERS[name]["read"].split()]
    assert len(right) == len(ANSWERS) == 24, answers


def test_the_c_example_escapes_the_question(compiled: Path, digits: Path) -> None:
    question = 'Read the "digits".\n\\ déjà vu'
    model = vlpack.load(digits, vision_provider="runtime")
    image = IMAGES / "09.png"
    expected = model.generate(question, [image], sampling=vlpack.Sampling(temperature=0)).text
    assert run_compiled(compiled, digits, question, image).stdout == expected + "\n"


def test_the_c_example_reports_errors(compiled: Path, digits: Path) -> None:
    for arguments, code, words in (
        ((), 2, "usage:"),
        ((digits, READ), 2, "usage:"),
        ((digits, READ, "nowhere.png"), 1, "error: "),
        ((digits.parent / "nothing", READ, IMAGES / "00.png"), 1, "error: "),
    ):
        result = run_compiled(compiled, *arguments)
        assert (result.returncode, result.stdout) == (code, "")
        assert result.stderr.startswith(words)


def test_python_m_vlpack_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "vlpack", "--version"], check=True, capture_output=True, text=True)
    assert result.stdout == f"vlpack {vlpack.__version__}\n"
