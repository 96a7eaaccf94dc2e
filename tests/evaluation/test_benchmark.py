"""`vlpack bench`: its figures are consistent with each other. Their values depend on the machine and are not tested."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import vlpack
from samples import DIGITS
from samples import vlpack as run_vlpack
from vlpack.builder import build
from vlpack.errors import InputError, OptionError, PackageError, VlpackError
from vlpack.evaluation.benchmark import Benchmark, _measure, compare, parse_size

STAGES = ("vision", "prefill", "token")
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "package"
    build(DIGITS, folder, precision="int8")
    return folder


@pytest.fixture(scope="module")
def result(package: Path) -> Benchmark:
    return vlpack.bench(package, prompt_tokens=[20, 1500], images=["64x32"], new_tokens=6, repeat=2, threads=1)


def test_the_figures_are_consistent(result: Benchmark, package: Path) -> None:
    short, long, image = result.works
    assert [work.name for work in result.works] == ["20 tokens", "1500 tokens", "64x32"]
    assert (short.prompt_tokens, long.prompt_tokens) == (20, 1500)
    assert image.prompt_tokens > 2
    assert short.prefill.median < long.prefill.median
    for work in result.works:
        assert 0 < work.token.low <= work.token.median <= work.token.high < 1
        parts = (work.preprocess, work.vision, work.prefill)
        assert work.first_token.low >= sum(part.low for part in parts) - 1e-9
        assert work.first_token.high <= sum(part.high for part in parts) + 1e-9
        assert 10_000_000 < work.resident <= work.peak
        assert work.load > 0
    assert (long.vision.high, long.preprocess.high) == (0, 0)
    assert min(image.vision.low, image.preprocess.low) > 0
    assert result.bytes == sum(path.stat().st_size for path in package.iterdir() if path.name != "vlpack.json")
    assert result.load.low == min(work.load for work in result.works)
    assert result.read > 0
    assert result.machine["cores"] >= 1
    assert result.threads == 1


def test_an_end_token_does_not_end_the_measurement(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits model ends its answers after a few tokens, but the benchmark takes the requested number of steps."""
    from vlpack.evaluation import benchmark_worker as benchmark_work
    from vlpack.runtime import model as runtime

    steps = []
    make = runtime.make_generator

    def watched(*arguments: Any) -> Any:
        steps.append(make(*arguments))
        return steps[-1]

    monkeypatch.setattr(runtime, "make_generator", watched)
    asked = {"package": str(package), "threads": 1, "new": 40, "repeat": 1, "image": (64, 32)}
    found = benchmark_work.work(asked)
    assert steps[0].token_count() == found["prompt_tokens"] + 40


def test_the_process_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the user was run')\n")
    with pytest.raises(PackageError, match="There is no folder"):
        _measure({"package": str(tmp_path / "nothing"), "threads": 1, "tokens": 4})


def test_every_answer_looks_at_the_image(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model keeps an image's features for the next question, and a measurement must not use them."""
    from vlpack.evaluation import benchmark_worker as benchmark_work
    from vlpack.runtime.vision import VisionEncoder

    looked, run = [], VisionEncoder._run

    def watched(self: VisionEncoder, *arguments: Any) -> Any:
        looked.append(self)
        return run(self, *arguments)

    monkeypatch.setattr(VisionEncoder, "_run", watched)
    benchmark_work.work({"package": str(package), "threads": 1, "new": 2, "repeat": 3, "image": (64, 32)})
    assert len(looked) == 3


@pytest.mark.parametrize("asked", [{"tokens": 3}, {"tokens": 200}, {"image": (64, 32)}, {"image": (640, 480)}])
def test_no_prompt_or_image_is_repeated(package: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    """A cache that knows the beginning of a prompt, or an image, would make later answers too fast."""
    from vlpack.evaluation import benchmark_worker

    prompts: list[Any] = []

    def answer(model: Any, prompt: Any, count: int) -> dict[str, float]:
        prompts.append(prompt)
        return dict.fromkeys(STAGES, 0.1)

    monkeypatch.setattr(benchmark_worker, "_answer", answer)
    found = benchmark_worker.work({"package": str(package), "threads": 1, "new": 2, "repeat": 12, **asked})
    assert len(found["first_token"]) == len(prompts) == 12
    assert len({prompt.input_ids.shape for prompt in prompts}) == 1
    seen = {
        (prompt.input_ids.tobytes(), prompt.pixel_values is not None and prompt.pixel_values.tobytes())
        for prompt in prompts
    }
    assert len(seen) == 12
    if "tokens" in asked:
        assert len({prompt.input_ids[0, :3].tobytes() for prompt in prompts}) == 12


def test_the_command(package: Path, tmp_path: Path, capsys: Capsys) -> None:
    path = tmp_path / "result.json"
    options = ("--prompt-tokens", 20, "--new-tokens", 4, "--repeat", 1)
    done = run_vlpack(capsys, "bench", package, *options, "-o", path)
    assert done.code == 0
    assert "20 tokens" in done.out
    assert "times reading it" in done.out
    assert "64x32" not in done.out
    earlier = json.loads(path.read_text(encoding="utf-8"))
    earlier["works"][0]["first_token"]["median"] *= 1000
    earlier["threads"] = 77
    path.write_text(json.dumps(earlier), encoding="utf-8")
    done = run_vlpack(capsys, "bench", package, *options, "--compare", path, "--json")
    (now,), (work,) = json.loads(done.out)["works"], json.loads(done.out)["compared"]
    for figure in (
        "first_token",
        "token",
    ):  # only ratios are checked, because times depend on the load of the machine
        assert work[figure] == now[figure]["median"] / earlier["works"][0][figure]["median"]
    assert any("threads was 77" in sentence for sentence in json.loads(done.out)["differs"])
    done = run_vlpack(capsys, "bench", package, *options, "--compare", path)
    assert "now / then" in done.out
    assert "threads was 77" in done.err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "not a result"),
        ("[]", "must hold a JSON object"),
        ('{"works": [{"name": "x"}]}', "not a result"),
        ('{"works": []}', "not a result"),
        ('{"works": [{"name": "x", "first_token": {"median": 0}, "token": {"median": 1}}]}', "not a result"),
    ],
)
def test_files_that_are_no_results(text: str, problem: str, result: Benchmark, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text, encoding="utf-8")
    with pytest.raises(VlpackError, match=problem):
        compare(result, tmp_path / "other.json")


def test_results_without_common_prompts(result: Benchmark, tmp_path: Path) -> None:
    other = result.as_json()
    other["works"] = [{**other["works"][0], "name": "7 tokens"}]
    (tmp_path / "other.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(InputError, match="no prompt in common with this benchmark; its prompts are 7 tokens"):
        compare(result, tmp_path / "other.json")


def test_packages_and_options_that_cannot_be_measured(package: Path, tmp_path: Path, capsys: Capsys) -> None:
    with pytest.raises(InputError, match="do not fit into the model's context"):
        vlpack.bench(package, prompt_tokens=[10**6])
    for size in ("640", "0x10", "640x-1", "x", "99999x10"):
        with pytest.raises(OptionError, match="not the size of an image"):
            parse_size(size)
    with pytest.raises(OptionError, match="new_tokens is 1"):
        vlpack.bench(package, new_tokens=1)
    build(DIGITS, tmp_path / "text", part="text")
    with pytest.raises(InputError, match="no vision part"):
        vlpack.bench(tmp_path / "text", images=["64x32"])
    build(DIGITS, tmp_path / "embedding", task="embedding")
    with pytest.raises(VlpackError, match="for the task embedding"):
        vlpack.bench(tmp_path / "embedding")


def test_files_are_checked_before_anything_is_measured(
    package: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlpack.evaluation.benchmark.bench", lambda *arguments, **more: pytest.fail("it was measured"))
    (tmp_path / "other.json").write_text("{}")
    for options, problem in (
        (("--compare", tmp_path / "none.json"), "There is no file"),
        (("--compare", tmp_path / "other.json"), "not a result"),
        (("--output", tmp_path), "cannot be written"),
        (("--output", tmp_path / "none" / "result.json"), "cannot be written"),
    ):
        done = run_vlpack(capsys, "bench", package, *options)
        assert (done.code, problem in done.err, done.out) == (2, True, "")


def test_results_are_written_even_if_they_cannot_be_compared(
    package: Path, result: Benchmark, tmp_path: Path, capsys: Capsys
) -> None:
    path, output = tmp_path / "earlier.json", tmp_path / "now.json"
    path.write_text(json.dumps(result.as_json()), encoding="utf-8")
    options = ("--prompt-tokens", 21, "--new-tokens", 2, "--repeat", 1)
    done = run_vlpack(capsys, "bench", package, *options, "--compare", path, "-o", output)
    assert (done.code, "no prompt in common" in done.err) == (2, True)
    assert "21 tokens" in done.out
    assert json.loads(output.read_text(encoding="utf-8"))["works"][0]["name"] == "21 tokens"
