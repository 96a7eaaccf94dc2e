"""`vlpack.build` without an output folder: the package is found in the cache, or built there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

import quantized
from export.test_preflight import COMMIT, FakeHub
from samples import DIGITS, vlpack
from tiny import Tiny
from vlpack.architectures import read_settings
from vlpack.build_name import Wanted, costs
from vlpack.build_plan import BuildOptions
from vlpack.builder import build
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import CheckpointError, OptionError, PackageError
from vlpack.export.preflight import planned_size
from vlpack.options import ExtraOptions
from vlpack.store.packages import packages, sidecar

NAME = f"org--name@{COMMIT[:12]}-int8"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.setenv("VLPACK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return fake


def test_it_is_built_once(hub: FakeHub, tmp_path: Path) -> None:
    first = build("org/name", threads=1)
    assert first.folder == tmp_path / "cache" / "packages" / NAME
    assert {call["revision"] for call in hub.calls} == {None, COMMIT}
    calls, before = len(hub.calls), sidecar(first.folder).read_text()
    again = build("org/name", threads=2, cache_dir=tmp_path / "hub")  # neither changes the package
    assert len(hub.calls) == calls
    assert (again.folder, again.total_bytes, again.source_bytes) == (
        first.folder,
        first.total_bytes,
        first.source_bytes,
    )
    assert {part: figures[:2] for part, figures in again.parts.items()} == {
        part: figures[:2] for part, figures in first.parts.items()
    }
    assert "force=True builds the newest commit" in again.notes[0]
    assert sidecar(first.folder).read_text() == before
    build("org/name", force=True)
    assert len(hub.calls) > calls
    (package,) = packages()
    assert package.created > json.loads(before)["created"]


def test_options_that_change_the_package_have_packages_of_their_own(hub: FakeHub) -> None:
    folders = {
        build("org/name", part="vision").folder.name,
        build("org/name", part="text", precision="int4").folder.name,
        build("org/name", part="text", precision="int4", extra_options=ExtraOptions(block_size=64)).folder.name,
        build("org/name", part="vision", precision="fp16", execution_provider="cuda").folder.name,
    }
    assert len(folders) == 4
    assert len(packages()) == 4
    assert any("-fp16-cuda-" in name for name in folders)
    hub.calls.clear()
    assert build("org/name", part="vision", extra_options=ExtraOptions(hf_token="hf_x")).folder.name in folders
    assert not hub.calls


def test_a_commit_is_asked_for_once_per_revision(hub: FakeHub) -> None:
    build("org/name", part="vision")
    build("org/name@v1", part="vision")
    (package,) = packages()
    assert sorted(package.revisions) == ["main", "v1"]
    hub.calls.clear()
    build("org/name", revision="v1", part="vision")
    assert not hub.calls


def test_what_has_no_place_of_its_own(hub: FakeHub, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("text")
    with pytest.raises(OptionError, match="Where should the package go"):
        build(DIGITS)
    with pytest.raises(CheckpointError, match="There is no folder"):
        build("./nothing")
    with pytest.raises(OptionError, match="A package with lora has no place"):
        build("org/name", lora="org/adapter")
    with pytest.raises(OptionError, match="A package with calibrate has no place"):
        build("org/name", precision="int4", calibrate=texts)
    assert not hub.calls


def test_a_failed_build_leaves_nothing(hub: FakeHub, tmp_path: Path) -> None:
    (hub.repository / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        build("org/name")
    assert [path.name for path in (tmp_path / "cache" / "packages").iterdir()] == [".locks"]


def test_a_package_without_a_sidecar_is_built_again(hub: FakeHub) -> None:
    folder = build("org/name", part="vision").folder
    sidecar(folder).write_text("{}")
    assert packages() == []
    assert build("org/name", part="vision").folder == folder
    assert [package.folder for package in packages()] == [folder]
    sidecar(folder).unlink()
    (folder / "mine.txt").touch()
    with pytest.raises(OptionError, match=r"it contains 'mine\.txt'"):
        build("org/name", part="vision")


def test_a_damaged_package_is_reported(hub: FakeHub) -> None:
    folder = build("org/name", part="vision").folder
    (folder / "vision.onnx").unlink()
    with pytest.raises(PackageError, match="is damaged"):
        build("org/name", part="vision")
    assert build("org/name", part="vision", force=True).folder == folder


def test_the_command(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    done = vlpack(capsys, "build", "org/name", "--part", "vision", "--json")
    assert done.code == 0
    assert Path(json.loads(done.out)["folder"]).name.startswith(NAME)
    again = vlpack(capsys, "build", "org/name", "--part", "vision")
    assert again.code == 0
    assert "--force builds the newest commit" in again.out
    assert "Give its folder with --output" in vlpack(capsys, "build", DIGITS).err


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_size_that_is_told_is_that_of_the_weights(precision: str, tmp_path: Path) -> None:
    folder = build(DIGITS, tmp_path / "package", precision=precision).folder
    written = sum(path.stat().st_size for path in folder.glob("*.data"))
    options = BuildOptions(precision=precision)
    architecture = read_settings(Checkpoint.open_settings(DIGITS))
    planned = planned_size(architecture, "all", options.policy(architecture.precision_facts))
    assert planned == pytest.approx(written, rel=0.02)


def test_the_costs_of_a_checkpoint_that_is_there(hub: FakeHub) -> None:
    build("org/name", part="vision")  # downloads the checkpoint
    wanted = Wanted.read("org/name", BuildOptions())
    key, folder = wanted.resolve()
    assert key.name == NAME
    cost = costs(wanted, key, folder)
    assert (cost.download, cost.cache) == (0, str(folder.parents[2]))
    assert cost.seconds > 0


def test_the_default_of_a_quantized_checkpoint(hub: FakeHub, checkpoint: Callable[[Tiny], Path]) -> None:
    repository = hub.repository.with_name("quantized")
    quantized.quantize(checkpoint(Tiny(layers=1, depth=1, deepstack=(0,))), repository, quantized.awq())
    hub.repository = repository
    eight = build("org/name", precision="int8", part="text")
    assert eight.folder.name.startswith(f"org--name@{COMMIT[:12]}-int8")
    own = build("org/name", part="text")  # not the package above, whose precision was given
    assert own.folder.name.startswith(f"org--name@{COMMIT[:12]}-int4-own-")
    hub.calls.clear()
    assert build("org/name", part="text").folder == own.folder
    assert not hub.calls
    four = build("org/name", precision="int4", part="text")
    assert four.folder not in (own.folder, eight.folder)
    assert len(packages()) == 3
    wanted = Wanted.read("org/name", BuildOptions(part="text"))
    key, folder = wanted.resolve()
    assert key.name == own.folder.name
    assert costs(wanted, key, folder).package < eight.total_bytes
