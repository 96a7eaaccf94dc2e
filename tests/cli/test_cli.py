"""The command line: help, JSON, progress, answers, and errors without tracebacks."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import vlpack as package_of_vlpack
from samples import ANSWERS, COUNT, DIGITS, IMAGES, READ, copy_digits, edit_json, vlpack
from vlpack.builder import build
from vlpack.cli import app as cli
from vlpack.cli import console

Capsys = pytest.CaptureFixture[str]
VERBS = sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback)
ZERO, ONE = str(IMAGES / "00.png"), str(IMAGES / "01.png")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "digits"
    build(DIGITS, folder)
    return folder


@pytest.fixture(scope="module")
def text_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "text"
    build(DIGITS, folder, part="text")
    return folder


@pytest.fixture
def ask(package: Path, capsys: Capsys) -> Callable[..., Any]:
    return lambda *arguments: vlpack(capsys, "run", package, "--temperature", "0", *arguments)


def words(text: str) -> str:
    return " ".join(text.split())


# help and versions


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(capsys: Capsys, verb: str) -> None:
    for flag in ("--help", "-h"):
        done = vlpack(capsys, verb, flag)
        assert (done.code, done.err) == (0, "")
        assert f"vlpack {verb}" in done.out


def test_help_names_the_verbs_and_the_builders_flags(capsys: Capsys) -> None:
    assert set(VERBS) >= {"build", "run", "inspect", "demo"}
    shown = vlpack(capsys, "--help").out
    for verb in VERBS:
        assert verb in shown
    shown = vlpack(capsys, "build", "--help").out
    for flag in ("--model_name", "--input", "--output", "--precision", "--execution_provider", "--extra_options"):
        assert flag in shown
    for short in ("-m", "-i", "-o", "-p", "-e", "-c"):
        assert re.search(rf"{short}\b", shown)


def test_help_explains_defaults_that_depend_on_other_options(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert "otherwise int8 on cpu, else fp16" in vlpack(capsys, "build", "--help").out
    assert "default: the model's" in vlpack(capsys, "run", "--help").out


def test_without_arguments_the_help_is_shown(capsys: Capsys) -> None:
    done = vlpack(capsys)
    assert "build" in done.out + done.err


def test_version(capsys: Capsys) -> None:
    assert vlpack(capsys, "--version").out == f"vlpack {package_of_vlpack.__version__}\n"


@pytest.mark.parametrize("arguments", [["bild"], ["build", "--preci", "int4"], ["run"]])
def test_mistyped_commands(capsys: Capsys, arguments: list[str]) -> None:
    done = vlpack(capsys, *arguments)
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "vlpack", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("vlpack ")


# build


def test_the_summary_of_a_build(tmp_path: Path, capsys: Capsys) -> None:
    done = vlpack(capsys, "build", DIGITS, "-o", tmp_path / "package", "-c", tmp_path / "cache")
    assert (done.code, done.err) == (0, "")  # no progress is shown if standard error is not a terminal
    for part in ("decoder.onnx", "vision.onnx", "embedding.onnx", "int8", "from 24.1 MB", "peak memory"):
        assert part in done.out
    assert "note: The checkpoint is a folder, so --cache-dir had no effect." in done.out
    assert "\x1b" not in done.out


def test_a_build_as_json(tmp_path: Path, capsys: Capsys) -> None:
    done = vlpack(capsys, "build", DIGITS, "-o", tmp_path / "package", "--json")
    shown = json.loads(done.out)
    assert (shown["folder"], shown["notes"], done.err) == (str(tmp_path / "package"), [], "")
    assert shown["total_bytes"] == sum(path.stat().st_size for path in (tmp_path / "package").iterdir())
    assert list(shown["parts"]) == ["decoder", "vision", "embedding"]


def in_a_terminal(*arguments: object) -> str:
    """Runs a command in a pseudo-terminal and returns its output."""
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "vlpack", *map(str, arguments)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        shown = b""
        try:
            while data := os.read(leader, 65536):
                shown += data
        except OSError:  # on Linux, the end of a pseudo-terminal's output is an error
            pass
        assert process.wait() == 0, shown
    os.close(leader)
    return shown.decode()


@pytest.mark.skipif(os.name == "nt", reason="terminals of POSIX")
def test_progress_in_a_terminal(tmp_path: Path) -> None:
    shown = in_a_terminal("build", DIGITS, "-o", tmp_path / "package", "--threads", "1")
    assert "━" in shown
    size = sum(path.stat().st_size for path in (tmp_path / "package").glob("*.data")) / 1e6
    total = re.search(r"\d/(\d+\.\d) MB", shown)
    assert total
    assert abs(float(total[1]) - size) < 0.2
    assert "decoder.onnx" in shown


# run


def test_an_answer(ask: Callable[..., Any]) -> None:
    done = ask("--image", ZERO, READ)
    assert (done.code, done.out, done.err) == (0, ANSWERS["00.png"]["read"] + "\n", "")


def test_a_question_from_standard_input(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"  {COUNT}\n"))
    assert ask("--image", ZERO).out.strip() == ANSWERS["00.png"]["count"]


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_question(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    done = ask("--image", ZERO)
    assert (done.code, done.out, "question is empty" in done.err) == (2, "", True)
    done = ask("--image", ZERO, text)
    assert (done.code, done.out) == (2, "")


def test_a_question_that_is_not_text(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\xff"), encoding="utf-8"))
    done = ask("--image", ZERO)
    assert (done.code, "not text" in done.err) == (2, True)


@pytest.mark.skipif(os.name == "nt", reason="terminals of POSIX")
def test_no_question_in_a_terminal(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    done = ask()
    assert (done.code, "What is the question?" in done.err) == (2, True)


def test_several_images(ask: Callable[..., Any]) -> None:
    one, two, three = (
        json.loads(ask("--json", *(part for image in images for part in ("--image", image)), READ).out)
        for images in ([ZERO], [ZERO, ONE], [ONE, ZERO, ONE])
    )
    counts = [shown["stats"]["image_tokens"] for shown in (one, two, three)]
    assert counts[0] < counts[1] < counts[2]
    assert counts[2] == counts[1] + (counts[1] - counts[0])


def test_text_only(ask: Callable[..., Any], text_package: Path, capsys: Capsys) -> None:
    done = ask("--max-tokens", "4", "Hello")
    assert (done.code, done.err) == (0, "")
    assert vlpack(capsys, "run", text_package, "--temperature", "0", "--max-tokens", "4", "Hello").out == done.out


def test_a_system_prompt_counts(ask: Callable[..., Any]) -> None:
    plain, system = (json.loads(ask("--json", *more, "Hello").out) for more in ([], ["--system", "Be brief."]))
    assert system["stats"]["prompt_tokens"] > plain["stats"]["prompt_tokens"]


def test_an_answer_as_json(ask: Callable[..., Any]) -> None:
    shown = json.loads(ask("--image", ZERO, "--json", READ).out)
    assert (shown["text"], shown["finish_reason"]) == (ANSWERS["00.png"]["read"], "stop")
    assert shown["stats"]["new_tokens"] == len(shown["tokens"])
    assert shown["stats"]["load_seconds"] > 0
    short = json.loads(ask("--image", ZERO, "--json", "--max-tokens", "2", READ).out)
    assert (short["finish_reason"], short["tokens"]) == ("length", shown["tokens"][:2])


def test_the_line_with_timings(ask: Callable[..., Any]) -> None:
    done = ask("--image", ZERO, "--stats", READ)
    assert done.out == ANSWERS["00.png"]["read"] + "\n"
    assert len(done.err.splitlines()) == 1
    for part in ("load ", "first token ", "preprocessing ", "vision ", "prefill ", " prompt tokens (", "tokens/s"):
        assert part in done.err
    assert "vision" not in ask("--stats", "--max-tokens", "2", "Hello").err


def test_smaller_images_are_fewer_tokens(ask: Callable[..., Any]) -> None:
    large, small = (
        json.loads(ask("--json", "--image", ZERO, *limit, READ).out)["stats"]["image_tokens"]
        for limit in ([], ["--max-pixels", "2048"])
    )
    assert small < large


def test_a_bad_image(ask: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for image in (tmp_path / "bad.png", tmp_path / "nowhere.png", tmp_path):
        done = ask("--image", image, READ)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: ")
        assert str(image) in done.err


def test_an_image_for_a_text_package(text_package: Path, capsys: Capsys) -> None:
    done = vlpack(capsys, "run", text_package, "--image", ZERO, READ)
    assert (done.code, "no vision part" in done.err) == (2, True)
    done = vlpack(capsys, "run", text_package, "--max-pixels", "4096", READ)
    assert (done.code, "no vision encoder" in done.err) == (2, True)


@pytest.mark.parametrize("part", ["vision", "embedding"])
def test_a_package_of_one_part(tmp_path: Path, capsys: Capsys, part: str) -> None:
    build(DIGITS, tmp_path / "package", part=part)
    done = vlpack(capsys, "run", tmp_path / "package", "Hello")
    assert (done.code, done.out) == (2, "")
    assert f"holds only {part}" in done.err
    assert "--part all" in done.err


def test_a_package_without_tokenizer(tmp_path: Path, capsys: Capsys) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    (source / "tokenizer.json").unlink()
    build(source, tmp_path / "package")
    done = vlpack(capsys, "run", tmp_path / "package", "Hello")
    assert (done.code, "tokenizer.json" in done.err) == (2, True)


def test_a_folder_that_is_no_package(tmp_path: Path, capsys: Capsys) -> None:
    for place, part in (
        (tmp_path / "nowhere", "no folder"),
        (tmp_path, "not a vlpack package"),
        (DIGITS, "not a vlpack"),
    ):
        done = vlpack(capsys, "run", place, "Hello")
        assert (done.code, done.out) == (2, "")
        assert part in done.err


def cut_data(folder: Path) -> None:
    path = folder / "decoder.onnx.data"
    path.write_bytes(path.read_bytes()[:-5000])


def same_size(name: str) -> Callable[[Path], None]:
    """Damages a file without changing its size, so that only its hash reveals it."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(b"{" * path.stat().st_size)

    return damage


DAMAGES = [cut_data, *map(same_size, ["decoder.onnx", "genai_config.json", "tokenizer.json", "vlpack.json"])]
DAMAGES += map(same_size, ["vision.onnx", "chat_template.jinja", "preprocessor_config.json"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_packages(package: Path, tmp_path: Path, capsys: Capsys, damage: Callable[[Path], None]) -> None:
    shutil.copytree(package, tmp_path / "package")
    damage(tmp_path / "package")
    done = vlpack(capsys, "run", tmp_path / "package", "Hello")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--top-k", "0"],
        ["--top-k", "-3"],
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--temperature", "0", "--top-k", "5"],
        ["--repetition-penalty", "0"],
        ["--repetition-penalty", "inf"],
        ["--seed", "-1"],
        ["--max-tokens", "0"],
        ["--threads", "0"],
        ["--min-pixels", "0"],
        ["--max-pixels", "-1"],
        ["--min-pixels", "100000", "--max-pixels", "1000"],
    ],
)
def test_options_out_of_range(package: Path, capsys: Capsys, arguments: list[str]) -> None:
    done = vlpack(capsys, "run", package, *arguments, "Hello")
    assert (done.code, done.out) == (2, "")
    assert arguments[0].strip("-").replace("-", "_") in done.err or arguments[0].strip("-") in done.err


def test_wrong_options_are_reported_before_the_package_is_loaded(
    package: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlpack.runtime.model.load_model", lambda *arguments: pytest.fail("was loaded"))
    for wrong in (["--top-k", "0"], ["--max-tokens", "0"]):
        assert vlpack(capsys, "run", package, *wrong, "Hello").code == 2


# inspect and demo


def test_inspect(package: Path, capsys: Capsys) -> None:
    done = vlpack(capsys, "inspect", package)
    assert (done.code, done.err) == (0, "")
    for part in (
        "digits-qwen3-vl",
        "model.language_model.layers.*.mlp.down_proj",
        "hashes checked",
        "past_key_values.*",
    ):
        assert part in done.out
    assert "[batch_size, sequence_length" in done.out
    assert json.loads(vlpack(capsys, "inspect", package, "--json").out)["problems"] == []


def test_inspect_a_checkpoint(capsys: Capsys) -> None:
    done = vlpack(capsys, "inspect", DIGITS)
    assert (done.code, done.err) == (0, "")
    for part in ("checkpoint, Qwen3VLForConditionalGeneration", "bfloat16", "head tied, 3 DeepStack levels"):
        assert part in done.out
    assert json.loads(vlpack(capsys, "inspect", DIGITS, "--json").out)["kind"] == "checkpoint"


def test_inspect_a_folder_that_is_neither(tmp_path: Path, capsys: Capsys) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        done = vlpack(capsys, "inspect", place)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: ")


@pytest.mark.parametrize("verb", ["inspect", "run"])
def test_arguments_that_are_no_folders(verb: str, tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "file").touch()
    more = ["Hello"] if verb == "run" else []
    for place, message in (
        (tmp_path / "file", f"file is a file, not a folder.\nGive the folder it is in: {tmp_path}."),
        (tmp_path / ("x" * 300), "name too long"),
        (tmp_path / "nowhere", "There is no folder"),
        ("~nobody-here/x", "cannot be opened"),
    ):
        done = vlpack(capsys, verb, place, *more)
        assert (done.code, done.out) == (2, "")
        assert message.lower() in done.err.lower()
        assert len(done.err) < 400


def test_precisions_and_providers_in_capitals(tmp_path: Path, capsys: Capsys) -> None:
    done = vlpack(capsys, "build", DIGITS, "-o", tmp_path / "package", "-p", "INT4", "-e", "CPU")
    assert (done.code, done.err) == (0, "")
    described = json.loads(vlpack(capsys, "inspect", tmp_path / "package", "--json").out)
    assert (described["precision"], described["execution_provider"]) == ("int4", "cpu")


def test_demo(tmp_path: Path, capsys: Capsys) -> None:
    done = vlpack(capsys, "demo", "-o", tmp_path / "package")
    assert (done.code, done.err) == (0, "")
    assert len(re.findall("✓|✗", done.out)) == 48
    assert "48 of 48 right." in done.out
    assert vlpack(capsys, "inspect", tmp_path / "package").code == 0
    again = vlpack(capsys, "demo", "-o", tmp_path / "package")
    assert (again.code, "exists" in again.err) == (2, True)


def test_demo_as_json(capsys: Capsys) -> None:
    shown = json.loads(vlpack(capsys, "demo", "--json", "-p", "int4").out)
    assert (shown["asked"], len(shown["rows"])) == (48, 48)
    assert shown["right"] >= 46


def test_a_demo_with_wrong_answers_fails(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlpack.demo.QUESTIONS", {"read": "How many digits are there?"})
    assert vlpack(capsys, "demo").code == 1


# pipes and terminals


def run_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "vlpack", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, check=False)


def test_a_terminal_with_a_limited_encoding(package: Path) -> None:
    done = run_process("inspect", package, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"first match wins" in done.stdout
    assert b"-> int8" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_the_demo_in_a_terminal_with_a_limited_encoding(encoding: str) -> None:
    done = run_process("demo", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"ok ") == 48
    assert b"?" not in done.stdout.replace(b"there?", b"")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["run", "Hello"]])
def test_a_closed_pipe_ends_the_command(package: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "vlpack", arguments[0], str(package), *arguments[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr  # noqa: PT018
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141  # the exit code of SIGPIPE; 1 would stand for a damaged package


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_answer(number: signal.Signals, tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    edit_json(
        source / "generation_config.json", "eos_token_id", value=2175
    )  # an end token that the model never chooses
    build(source, tmp_path / "package")
    words = ["-m", "vlpack.cli", "run", str(tmp_path / "package"), READ, "--image", str(IMAGES / "01.png")]
    command = [sys.executable, *words]
    with subprocess.Popen(
        [*command, "--max-tokens", "4000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr  # noqa: PT018
        began = process.stdout.read(1)
        process.send_signal(number)
        rest, said = process.communicate(timeout=20)
    assert (process.returncode, said.decode().strip()) == (128 + number, "error: Interrupted.")
    assert began
    assert len(rest) < 10_000  # the part of the answer that was generated before the interruption


def test_errors_of_a_process_have_no_traceback(tmp_path: Path) -> None:
    done = run_process("build", tmp_path / "nowhere", "-o", tmp_path / "package")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().splitlines()[0] == f"error: There is no folder '{tmp_path / 'nowhere'}'."


def test_an_empty_argument_is_named(capsys: Capsys) -> None:
    done = vlpack(capsys, "run", "package", "")
    assert done.code == 2
    assert "Argument 3 is empty" in done.err


@pytest.mark.parametrize("verb", ["run", "inspect"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written(verb: str, package: Path) -> None:
    arguments = [sys.executable, "-m", "vlpack", verb, str(package), *(["Hello"] if verb == "run" else [])]
    with open("/dev/full", "w") as full:
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Cannot write the output")
    assert "Traceback" not in done.stderr


def test_closed_streams(package: Path) -> None:
    command = f'"{sys.executable}" -m vlpack.cli.app'
    done = subprocess.run(f'{command} run "{package}" Hello >&-', shell=True, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    done = subprocess.run(f'{command} run "{package}" <&-', shell=True, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert b"What is the question?" in done.stderr


def test_inspect_reports_what_does_not_fit(capsys: Capsys, tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    assert "image_grid_thw" in vlpack(capsys, "inspect", source).out
    edit_json(source / "config.json", "vision_config", "depth", value=7)
    done = vlpack(capsys, "inspect", source)
    assert done.code == 2
    assert "blocks.6" in done.err


def test_architectures(capsys: Capsys) -> None:
    from vlpack.architectures import ARCHITECTURES

    shown = json.loads(vlpack(capsys, "architectures", "--json").out)
    assert [row["architecture"] for row in shown] == list(ARCHITECTURES)
    by_name = {row["architecture"]: row for row in shown}
    assert by_name["Qwen3MoeForCausalLM"]["providers"] == "cpu, cuda"
    assert "vision" in by_name["Qwen3VLMoeForConditionalGeneration"]["parts"]
    table = vlpack(capsys, "architectures").out
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for row in shown:
        assert row["architecture"] in table
        assert row["models"] in table
        assert f"`{row['architecture']}` | {row['models']}" in readme


@pytest.mark.parametrize(("area", "terminal", "told"), [(900, True, True), (900, False, False), (9000, True, False)])
def test_a_large_image_is_announced(
    area: int, terminal: bool, told: bool, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = package_of_vlpack.Model(package)
    prompt = model.prompt(READ, [IMAGES / "01.png"])  # the limits of the digits model are 3072 and 10240 pixels
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, force_terminal=terminal))
    monkeypatch.setattr(console, "LARGE_IMAGE", area)
    console.note_large_images(model, prompt)
    assert ("--max-pixels" in shown.getvalue()) == told
    shown.truncate(0)
    console.note_large_images(model, model.prompt("Hello"))
    assert "--max-pixels" not in shown.getvalue()


def test_a_build_leaves_the_cores_to_its_own_threads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number of BLAS threads that the user has set stays."""
    for given, wanted in (("", "1"), ("3", "3")):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", given)
        if not given:
            monkeypatch.delenv("OPENBLAS_NUM_THREADS")
        assert vlpack(capsys, "build").code
        assert os.environ["OPENBLAS_NUM_THREADS"] == wanted
