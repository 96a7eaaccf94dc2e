"""`vlpack verify` and `vlpack build --verify` as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samples import DIGITS, IMAGES, vlpack
from vlpack.builder import build
from vlpack.inspection import inspect
from vlpack.verification.cases import built_in

pytest.importorskip("torch")
pytest.importorskip("transformers")

Capsys = pytest.CaptureFixture[str]


def test_build_and_verify(tmp_path: Path, capsys: Capsys) -> None:
    package = tmp_path / "package"
    done = vlpack(capsys, "build", DIGITS, "-o", package, "-p", "int4", "--verify")
    assert done.code == 0
    assert f"package (int4 for cpu) is {DIGITS.name}" in " ".join(done.out.split())
    card = (package / "README.md").read_text(encoding="utf-8")
    assert "it is the model" in " ".join(card.split())
    assert "| two images |" in card
    assert inspect(package)["problems"] == []  # the manifest has the hash of the new model card

    again = vlpack(capsys, "build", DIGITS, "-o", package, "-p", "int8", "--force", "--verify")
    assert again.code == 0
    assert (package / "README.md").read_text(encoding="utf-8").count("## Verification") == 1


def test_the_card_and_the_manifest_change_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If writing is interrupted, the package stays as it was."""
    from vlpack.verification import card, verify

    package = tmp_path / "package"
    build(DIGITS, package)
    report = verify(package, DIGITS, cases=built_in(sees=False)[:1], tokens=2)
    before = (package / "README.md").read_bytes()

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(card, "refresh", die)
        with pytest.raises(KeyboardInterrupt):
            card.record(package, report)
    assert (package / "README.md").read_bytes() == before
    assert inspect(package)["problems"] == []
    card.record(package, report)
    assert (package / "README.md").read_bytes() != before
    assert inspect(package)["problems"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_the_verdict_is_the_exit_code(tmp_path: Path, capsys: Capsys) -> None:
    package = tmp_path / "package"
    build(DIGITS, package)
    image = str(IMAGES / "00.png")
    options = ("--reference", DIGITS, "--image", image, "--prompt", "Read the digits.", "--tokens", "4")
    done = vlpack(capsys, "verify", package, *options, "--json", "--report", tmp_path / "report.html")
    shown = json.loads(done.out)
    assert done.code == 0
    assert shown["ok"] is True
    assert len(shown["cases"]) == 1
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with open(package / "decoder.onnx.data", "r+b") as file:
        file.seek(5000)
        file.write(b"\x00\x01\x02")
    done = vlpack(capsys, "verify", package, *options)
    assert done.code == 1
    assert "decoder.onnx.data was altered" in done.out
    assert "0 of 0" not in done.out
    assert "is not" in done.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--reference", "nowhere/at/all"), "There is no folder"),
        (("--reference", str(DIGITS), "--image", "missing.png"), "missing.png"),
        (("--reference", str(DIGITS), "--cases", "missing.jsonl"), "missing.jsonl cannot be read"),
        (("--reference", str(DIGITS), "--cases", "a.jsonl", "--prompt", "b"), "its own prompts"),
        (("--reference", str(DIGITS), "--report", "no/such/folder/a.html"), "There is no folder"),
    ],
)
def test_wrong_arguments(options: tuple[str, ...], words: str, tmp_path: Path, capsys: Capsys) -> None:
    build(DIGITS, tmp_path / "package", part="text")
    done = vlpack(capsys, "verify", tmp_path / "package", *options)
    assert done.code == 2
    assert words in done.err


def test_without_the_libraries(tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    build(DIGITS, tmp_path / "package", part="text")
    monkeypatch.setattr("vlpack.verification.reference.find_spec", lambda name: None if name == "torch" else object())
    done = vlpack(capsys, "verify", tmp_path / "package", "--reference", DIGITS)
    assert done.code == 2
    assert "Verifying needs torch, which is not installed." in done.err
    done = vlpack(capsys, "build", DIGITS, "-o", tmp_path / "other", "--verify")
    assert done.code == 2
    assert not (tmp_path / "other").exists()


def test_build_and_verify_of_another_task(tmp_path: Path, capsys: Capsys) -> None:
    package, page = tmp_path / "package", tmp_path / "report.html"
    done = vlpack(capsys, "build", DIGITS, "-o", package, "--verify", "--task", "embedding")
    assert done.code == 0
    assert " | - | - | - |" in (package / "README.md").read_text(encoding="utf-8")
    options = ("--prompt", "A river.", "--report", page)
    done = vlpack(capsys, "verify", package, "--reference", DIGITS, *options, "--json")
    shown = json.loads(done.out)
    assert shown["cases"][0]["stages"][-1]["name"] == "vector"
    assert shown["cases"][0]["mean_kl"] is None
    assert "vector" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parts": {"../../vision.onnx": {"name": "vision"}}}, "graphs that are not among its files"),
        ({"parts": ["vision.onnx"]}, "does not list the parts"),
        ({"parts": {"model.onnx": 5}}, "does not list the parts"),
        ({"quantization": None}, "does not say how the weights are stored"),
        ({"quantization": {"mixed": 5}}, "does not say how the weights are stored"),
        ({"quantization": {"block_size": "x", "mixed": {}}}, "vlpack.json"),
        ({"quantization": {"mixed": {"last_matmul": "x"}}}, "does not say how the weights are stored"),
        ({"policy": None}, "policy in vlpack.json is not the one"),
    ],
)
def test_untrusted_manifests(change: dict[str, object], words: str, tmp_path: Path, capsys: Capsys) -> None:
    from vlpack.package.manifest import MANIFEST, sealed

    package = tmp_path / "package"
    build(DIGITS, package, part="text", precision="int4")
    manifest = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
    (package / MANIFEST).write_text(sealed({**manifest, **change}), encoding="utf-8")
    done = vlpack(capsys, "verify", package, "--reference", DIGITS)
    assert done.code == 2
    assert words in done.err
