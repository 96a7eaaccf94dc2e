"""A package that is replaced while it is loaded never answers with parts of another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import vlpack
from samples import ANSWERS, DIGITS, IMAGES, READ
from vlpack.errors import PackageError
from vlpack.package.loaded_files import LoadedFiles
from vlpack.runtime import model as runtime
from vlpack.runtime import retrieval as encoder

GREEDY = vlpack.Sampling(temperature=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlpack.build(DIGITS, tmp_path_factory.mktemp("whole") / "package", precision="int4").folder


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "package"))


def ask(model: Any) -> str:
    return str(model.generate(READ, [IMAGES / "02.png"], sampling=GREEDY).text)


def test_a_package_built_over_a_loaded_one(package: Path) -> None:
    model = vlpack.load(package)
    vlpack.build(DIGITS, package, precision="int8", force=True)
    with pytest.raises(PackageError, match=r"vision\.onnx was replaced or altered since the package was loaded"):
        ask(model)
    assert ask(vlpack.load(package)) == ANSWERS["02.png"]["read"]


def test_a_loaded_encoder_is_kept(package: Path) -> None:
    model: Any = vlpack.load(package)
    before = ask(model)
    vlpack.build(DIGITS, package, precision="int8", force=True)
    model.vision.forget()
    assert ask(model) == before


def test_a_package_that_is_gone(package: Path) -> None:
    model = vlpack.load(package)
    package.rename(package.with_name("elsewhere"))
    with pytest.raises(PackageError, match="is gone since the package was loaded"):
        ask(model)


def test_only_the_weights_of_the_encoder_are_replaced(package: Path, whole: Path) -> None:
    model = vlpack.load(package)
    shutil.copyfile(package / "README.md", package / "copy.md")
    (package / "copy.md").replace(package / "README.md")  # no part of the package opens the README
    (package / "vision.onnx.data").unlink()
    shutil.copyfile(whole / "vision.onnx.data", package / "vision.onnx.data")
    with pytest.raises(PackageError, match=r"vision\.onnx\.data was replaced"):
        ask(model)


def test_replaced_between_check_and_opening(package: Path, whole: Path) -> None:
    model: Any = vlpack.load(package)
    opened = model.vision._open

    def swap_and_open(graph: Path, threads: int) -> Any:
        shutil.copyfile(graph, graph.with_suffix(".copy"))
        graph.with_suffix(".copy").replace(graph)
        return opened(graph, threads)

    model.vision._open = swap_and_open
    for _ in range(2):  # the session of the wrong graph is not kept
        with pytest.raises(PackageError, match="was replaced"):
            ask(model)


@pytest.mark.parametrize("task", ["generate", "embedding"])
def test_replaced_while_it_is_loaded(task: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if task == "embedding":
        package = vlpack.build(DIGITS, tmp_path / "embedding", precision="int4", task=task).folder
    other = Path(shutil.copytree(package, tmp_path / "other"))

    def swap(manifest: object) -> None:
        package.rename(tmp_path / "old")
        other.rename(package)

    monkeypatch.setattr(runtime if task == "generate" else encoder, "warn_of_saturation", swap)
    with pytest.raises(PackageError, match="since the package was loaded"):
        vlpack.load(package)


def test_a_manifest_that_changes_while_it_is_read(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlpack.package import loaded_files

    whole_package = loaded_files.whole_package

    def read_and_swap(folder: Path) -> dict[str, Any]:
        manifest: dict[str, Any] = whole_package(folder)
        shutil.copyfile(folder / "vlpack.json", folder / "copy.json")
        (folder / "copy.json").replace(folder / "vlpack.json")
        return manifest

    monkeypatch.setattr(loaded_files, "whole_package", read_and_swap)
    with pytest.raises(PackageError, match=r"vlpack\.json was replaced"):
        LoadedFiles(package)
