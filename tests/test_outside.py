"""Packages whose own files name files elsewhere, their manifests forged to match."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import vlpack
from samples import DIGITS, seal
from samples import vlpack as run_vlpack
from vlpack.builder import build
from vlpack.errors import PackageError
from vlpack.inspection import inspect
from vlpack.tasks import EMBEDDING

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "package"
    build(DIGITS, folder, precision="int4")
    return folder


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(b"x" * 100_000)
    return Path(shutil.copytree(whole, tmp_path / "package"))


def elsewhere(tensor: onnx.TensorProto, location: str) -> onnx.TensorProto:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=location)
    tensor.ClearField("raw_data")
    return tensor


def of_initializer(location: str) -> Callable[[onnx.GraphProto], None]:
    return lambda graph: elsewhere(graph.initializer[-1], location) and None


def outer(kind: str) -> Callable[[onnx.GraphProto], None]:
    """A constant that lies elsewhere, as a node's attribute, or within a subgraph."""
    tensor = elsewhere(helper.make_tensor("t", onnx.TensorProto.FLOAT, [2], [0.0, 0.0]), "../secret")
    node = helper.make_node("Constant", [], ["unused"], value=tensor)
    if kind == "subgraph":
        inner = helper.make_graph([node], "inner", [], [helper.make_tensor_value_info("unused", 1, [2])])
        node = helper.make_node("If", ["unknown"], ["other"], then_branch=inner, else_branch=inner)
    return lambda graph: graph.node.append(node)


PLANTS: dict[str, Callable[[onnx.GraphProto], None]] = {
    "above": of_initializer("../secret"),
    "absolute": of_initializer("/etc/passwd"),
    "unknown": of_initializer("other.data"),
    "none": of_initializer(""),
    "attribute": outer("attribute"),
    "subgraph": outer("subgraph"),
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("graph", ["decoder.onnx", "vision.onnx"])
def test_weights_elsewhere(plant: str, graph: str, package: Path, capsys: Capsys) -> None:
    model = onnx.load(package / graph, load_external_data=False)
    PLANTS[plant](model.graph)
    onnx.save(model, package / graph)
    seal(package)
    (problem,) = inspect(package)["problems"]
    assert f"{graph} takes the weight" in problem
    with pytest.raises(PackageError, match="not a file of the package"):
        vlpack.load(package)
    done = run_vlpack(capsys, "run", package, "Hello")
    assert (done.code, done.out) == (2, "")
    assert "do not use this one" in done.err


def test_a_link_to_elsewhere(package: Path) -> None:
    for name in ("decoder.onnx.data", "tokenizer.json"):
        (package / name).unlink()
        (package / name).symlink_to(package.parent / "secret")
        seal(package)
        with pytest.raises(PackageError, match="a link that leads out of the folder"):
            vlpack.load(package)
        assert "leads out" in inspect(package)["problems"][0]


def test_a_graph_elsewhere(package: Path) -> None:
    shutil.copy(package / "embedding.onnx", package.parent / "secret.onnx")
    path = package / "genai_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["embedding"]["filename"] = "../secret.onnx"
    path.write_text(json.dumps(config), encoding="utf-8")
    seal(package)
    with pytest.raises(PackageError, match=r"names the file '\.\./secret\.onnx'"):
        vlpack.load(package)
    assert "secret.onnx" in inspect(package)["problems"][0]


def test_an_embedding_model_s_weights(tmp_path: Path) -> None:
    build(DIGITS, tmp_path / "package", task=EMBEDDING)
    path = tmp_path / "package" / "vision.onnx"
    model = onnx.load(path, load_external_data=False)
    PLANTS["above"](model.graph)
    onnx.save(model, path)
    seal(path.parent)
    with pytest.raises(PackageError, match="not a file of the package"):
        vlpack.load(path.parent)


def test_a_graph_that_is_none(package: Path) -> None:
    (package / "vision.onnx").write_bytes(b"\xff" * 200)
    seal(package)
    with pytest.raises(PackageError, match=r"vision\.onnx cannot be read"):
        vlpack.load(package)
    assert "cannot be read" in inspect(package)["problems"][0]


def test_a_whole_one(whole: Path) -> None:
    assert inspect(whole)["problems"] == []
