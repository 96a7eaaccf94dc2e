"""Weights are downloaded only if the build is possible; other errors of a checkpoint are reported before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest

from samples import DIGITS, copy_digits, edit_json
from samples import vlpack as run_vlpack
from vlpack.builder import build
from vlpack.errors import CheckpointError, VlpackError
from vlpack.inspection import inspect

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


class FakeHub:
    """A stand-in for `snapshot_download` that copies the requested files of its repository into a snapshot."""

    def __init__(self, folder: Path) -> None:
        self.repository = copy_digits(folder / "repository")
        self.snapshot = folder / "models--org--name" / "snapshots" / COMMIT
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for path in self.repository.iterdir():
            if path.suffix != ".safetensors" or "*.safetensors" in options["allow_patterns"]:
                shutil.copyfile(path, self.snapshot / path.name)
        return str(self.snapshot)

    @property
    def fetched_weights(self) -> bool:
        return any("*.safetensors" in call["allow_patterns"] for call in self.calls)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return fake


def test_settings_come_first_and_weights_of_the_same_commit(hub: FakeHub, tmp_path: Path) -> None:
    build("org/name", tmp_path / "package", revision="main", cache_dir=tmp_path / "cache")
    assert [call["revision"] for call in hub.calls] == ["main", COMMIT]
    assert ["*.safetensors" in call["allow_patterns"] for call in hub.calls] == [False, True]
    assert {call["cache_dir"] for call in hub.calls} == {str(tmp_path / "cache")}
    build("org/name", tmp_path / "again")  # everything is in the cache now
    assert len(hub.calls) == 3


WRONG: dict[str, tuple[tuple[str, ...], Any, dict[str, Any], str]] = {
    "architecture": (("architectures",), ["MambaForCausalLM"], {}, "MambaForCausalLM is not supported"),
    "quantized": (("quantization_config",), {"quant_method": "hqq"}, {}, "already quantized"),
    "rotary": (("text_config", "rope_parameters", "rope_type"), "linear", {}, "rope_type 'linear'"),
    "size": (("text_config", "hidden_size"), -1, {}, "hidden_size"),
    "task": (("architectures",), ["Qwen3VLModel"], {"task": "generate"}, "not offered for the task generate"),
    "sliding": (("text_config", "use_sliding_window"), True, {}, "sliding"),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_weights_are_downloaded_if_the_build_is_impossible(name: str, hub: FakeHub, tmp_path: Path) -> None:
    keys, value, options, match = WRONG[name]
    edit_json(hub.repository / "config.json", *keys, value=value)
    with pytest.raises(VlpackError, match=match):
        build("org/name", tmp_path / "package", **options)
    assert len(hub.calls) == 1
    assert not hub.fetched_weights
    assert not (tmp_path / "package").exists()


def test_no_weights_are_downloaded_if_the_disk_is_too_small(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(VlpackError, match=r"Not enough space in .*: the package takes 0\.0"):
        build("org/name", tmp_path / "folder" / "package")
    assert not hub.fetched_weights


@pytest.mark.parametrize("name", WRONG)
def test_other_errors_are_reported_even_if_weights_are_missing(name: str, tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    (source / "model.safetensors").unlink()
    keys, value, options, match = WRONG[name]
    edit_json(source / "config.json", *keys, value=value)
    with pytest.raises(VlpackError, match=match):
        build(source, tmp_path / "package", **options)
    if name != "task":
        with pytest.raises(CheckpointError, match=match):
            inspect(source)
    edit_json(source / "config.json", *keys, value=...)
    shutil.copyfile(DIGITS / "config.json", source / "config.json")
    with pytest.raises(CheckpointError, match="has no weights"):
        build(source, tmp_path / "package")


def same(described: dict[str, Any], whole: dict[str, Any]) -> None:
    for name in ("architecture", "task", "tied", "text", "vision", "deepstack_levels", "parts", "graphs"):
        assert described[name] == whole[name], name
    assert described["bytes"] is None
    assert "weights were not read" in described["notes"][-1]


def test_inspect_accepts_a_config_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint").mkdir()
    shutil.copyfile(DIGITS / "config.json", tmp_path / "checkpoint" / "config.json")
    same(inspect(tmp_path / "checkpoint"), inspect(DIGITS))
    done = run_vlpack(capsys, "inspect", tmp_path / "checkpoint")
    assert (done.code, "weights were not read" in done.out.replace("\n", " ")) == (0, True)


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "pytorch_model.bin", "model.gguf"])
def test_inspect_does_not_overlook_damaged_weights(file: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    shutil.copyfile(DIGITS / "config.json", tmp_path / "checkpoint" / "config.json")
    (tmp_path / "checkpoint" / file).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"lacks|pickles|GGUF"):
        inspect(tmp_path / "checkpoint")


def test_inspect_accepts_a_hub_id_and_downloads_no_weights(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    same(inspect("org/name"), inspect(DIGITS))
    done = run_vlpack(capsys, "inspect", "org/name@v1")
    assert done.code == 0
    assert [call["revision"] for call in hub.calls] == [None, "v1"]
    assert not hub.fetched_weights
    os.makedirs("org/name")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):  # an existing folder takes precedence
        inspect("org/name")
