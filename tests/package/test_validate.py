"""Packages whose files refer to files outside of them are refused, even if their manifests are forged to match."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import vlpack
from samples import ANSWERS, DIGITS, IMAGES, READ, edit_json, seal
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


def of_initializer(location: str) -> Callable[[onnx.GraphProto], Any]:
    return lambda graph: elsewhere(graph.initializer[-1], location) and None


def outer(kind: str) -> Callable[[onnx.GraphProto], None]:
    """Adds a constant with external data, as a node's attribute or within a subgraph."""
    tensor = elsewhere(helper.make_tensor("t", onnx.TensorProto.FLOAT, [2], [0.0, 0.0]), "../secret")
    node = helper.make_node("Constant", [], ["unused"], value=tensor)
    if kind == "subgraph":
        inner = helper.make_graph([node], "inner", [], [helper.make_tensor_value_info("unused", 1, [2])])
        node = helper.make_node("If", ["unknown"], ["other"], then_branch=inner, else_branch=inner)
    return lambda graph: graph.node.append(node)


def twice(graph: onnx.GraphProto) -> None:
    """Adds a second location before the right one, because programs differ in which of several they read."""
    tensor = next(tensor for tensor in reversed(graph.initializer) if tensor.external_data)
    entries = [(entry.key, entry.value) for entry in tensor.external_data]
    elsewhere(tensor, "../secret")
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)


PLANTS: dict[str, Callable[[onnx.GraphProto], None]] = {
    "above": of_initializer("../secret"),
    "absolute": of_initializer("/etc/passwd"),
    "unknown": of_initializer("other.data"),
    "none": of_initializer(""),
    "twice": twice,
    "attribute": outer("attribute"),
    "subgraph": outer("subgraph"),
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("graph", ["decoder.onnx", "vision.onnx"])
def test_weights_outside_of_the_package(plant: str, graph: str, package: Path, capsys: Capsys) -> None:
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


def test_a_link_to_a_file_outside(package: Path) -> None:
    for name in ("decoder.onnx.data", "tokenizer.json"):
        (package / name).unlink()
        (package / name).symlink_to(package.parent / "secret")
        seal(package)
        with pytest.raises(PackageError, match="a link that leads out of the folder"):
            vlpack.load(package)
        assert "leads out" in inspect(package)["problems"][0]


def test_a_graph_outside_of_the_package(package: Path) -> None:
    shutil.copy(package / "embedding.onnx", package.parent / "secret.onnx")
    path = package / "genai_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["embedding"]["filename"] = "../secret.onnx"
    path.write_text(json.dumps(config), encoding="utf-8")
    seal(package)
    with pytest.raises(PackageError, match=r"names the file '\.\./secret\.onnx'"):
        vlpack.load(package)
    assert "secret.onnx" in inspect(package)["problems"][0]


def test_external_data_in_the_default_of_a_function(package: Path) -> None:
    tensor = elsewhere(helper.make_tensor("t", onnx.TensorProto.FLOAT, [2], [0.0, 0.0]), "../secret")
    default = helper.make_attribute("value", tensor)
    function = helper.make_function("own", "F", [], ["y"], [], [helper.make_opsetid("", 21)], [], [default])
    model = onnx.load(package / "vision.onnx", load_external_data=False)
    model.functions.append(function)
    onnx.save(model, package / "vision.onnx")
    seal(package)
    with pytest.raises(PackageError, match="not a file of the package"):
        vlpack.load(package)


def edit_config(package: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = package / "genai_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    edit(config["model"])
    path.write_text(json.dumps(config), encoding="utf-8")
    seal(package)


def test_a_graph_that_no_part_has(package: Path) -> None:
    """A configuration that names a file of the package that is not a checked graph is refused."""
    model = onnx.load(package / "vision.onnx", load_external_data=False)
    PLANTS["above"](model.graph)
    onnx.save(model, package / "other.onnx")
    edit_json(package / "vlpack.json", "files", "other.onnx", value={})
    edit_config(package, lambda model: model["vision"].update(filename="other.onnx"))
    with pytest.raises(PackageError, match=r"names the file 'other\.onnx'"):
        vlpack.load(package)
    assert "other.onnx" in inspect(package)["problems"][0]


WISHES: dict[str, tuple[str, dict[str, Any]]] = {
    "a profile": ("session_options", {"enable_profiling": "../profile"}),
    "a graph written": ("session_options", {"ep.context_enable": "1", "ep.context_file_path": "../graph.onnx"}),
    "statistics": ("session_options", {"session.collect_node_memory_stats_to_file": "../statistics"}),
    "a library": ("session_options", {"custom_ops_library": "x.so"}),
    "a provider's library": ("session_options", {"provider_options": [{"QNN": {"backend_path": "x.so"}}]}),
    "an address": ("session_options", {"provider_options": [{"webgpu": {"dawnProcTable": "4096"}}]}),
    "no options": ("session_options", {"provider_options": ["cpu"]}),
    "options of a run": ("run_options", {"anything": "1"}),
}


@pytest.mark.parametrize("wish", WISHES)
def test_settings_that_no_package_has(wish: str, package: Path) -> None:
    key, value = WISHES[wish]
    edit_config(package, lambda model: model["decoder"].setdefault(key, {}).update(value))
    with pytest.raises(PackageError, match=r"asks (the runtime for|to load a library)"):
        vlpack.load(package)
    (problem,) = inspect(package)["problems"]
    assert " asks " in problem
    assert sorted(path.name for path in package.parent.iterdir()) == ["package", "secret"]


@pytest.mark.parametrize("section", [{"filename": "decoder.onnx"}, [{"stage": {}}]])
def test_sections_that_packages_do_not_have(section: Any, package: Path) -> None:
    edit_config(package, lambda model: model.update(speech=section))
    with pytest.raises(PackageError, match="'speech'"):
        vlpack.load(package)


def test_settings_that_users_change(package: Path) -> None:
    wanted = {"intra_op_num_threads": 1, "log_severity_level": 3, "provider_options": [{"cpu": {}}]}
    edit_config(package, lambda model: model["decoder"]["session_options"].update(wanted))
    assert inspect(package)["problems"] == []


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_key_value_heads", "head_size"])
@pytest.mark.parametrize("value", [0, -1, True, 1 << 31, "4"])
def test_sizes_of_a_wrong_type_or_range(name: str, value: Any, package: Path) -> None:
    edit_config(package, lambda model: model["decoder"].update({name: value}))
    with pytest.raises(PackageError, match=f"{name}.* of the wrong type or size"):
        vlpack.load(package)
    edit_config(package, lambda model: model["decoder"].pop(name))
    with pytest.raises(PackageError, match=f"cannot be read: KeyError.*{name}"):
        vlpack.load(package)


@pytest.mark.parametrize("verb", ["run", "eval", "bench", "verify"])
def test_every_command_refuses(verb: str, package: Path, capsys: Capsys) -> None:
    if verb == "verify":
        pytest.importorskip("transformers")
    model = onnx.load(package / "decoder.onnx", load_external_data=False)
    PLANTS["above"](model.graph)
    onnx.save(model, package / "decoder.onnx")
    seal(package)
    questions = package.parent / "questions.jsonl"
    questions.write_text('{"question": "a", "answer": "b"}')
    arguments: dict[str, list[Any]] = {
        "run": ["Hello"],
        "eval": [questions],
        "bench": [],
        "verify": ["--reference", DIGITS],
    }
    more = arguments[verb]
    done = run_vlpack(capsys, verb, package, *more)
    assert done.code == 2
    assert "is not a file of the package" in done.err


# files of a package must be regular files of limited size


@pytest.mark.parametrize("name", ["vlpack.json", "genai_config.json", "tokenizer.json", "vision.onnx"])
def test_files_that_are_too_large(name: str, package: Path, capsys: Capsys) -> None:
    size = 1 << 34  # sparse: 16 GB that must not be read
    with open(package / name, "wb") as file:
        file.truncate(size)
    if name != "vlpack.json":
        edit_json(package / "vlpack.json", "files", name, "bytes", value=size)
    done = run_vlpack(capsys, "run", package, "Hello")
    assert (done.code, done.out) == (2, "")
    assert f"{name} has {size} bytes" in done.err
    assert "are not read" in done.err


def test_a_manifest_that_is_no_file(package: Path) -> None:
    path = package / "vlpack.json"
    text = path.read_text(encoding="utf-8")
    path.unlink()
    path.symlink_to(package.parent / "secret")
    with pytest.raises(PackageError, match="a link that leads out of the folder"):
        vlpack.load(package)
    path.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        with pytest.raises(PackageError, match="not a regular file"):  # opening the pipe must not wait for a writer
            vlpack.load(package)
        path.unlink()
    # of two "format" keys, another reader might take the other one
    for wrong in (text.replace("{", '{"format": 1,', 1), text.replace('"bytes": ', '"bytes": Infinity, "was": ', 1)):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(PackageError, match="not valid JSON"):
            inspect(package)
    before, key, after = text.rpartition('"bytes": ')  # the last "bytes", which is that of a file
    path.write_text(f'{before}{key}1e999, "was": {after}', encoding="utf-8")
    with pytest.raises(PackageError, match="damaged"):
        inspect(package)


def test_a_policy_of_a_wrong_type(package: Path) -> None:
    policies: list[Any] = [[{"storage": []}], [{"storage": {}}, 5], {}, None]
    for policy in policies:
        edit_json(package / "vlpack.json", "policy", value=policy)
        assert vlpack.load(package)


def test_names_that_control_a_terminal(package: Path, capsys: Capsys) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\u202e"
    manifest = json.loads((package / "vlpack.json").read_text(encoding="utf-8"))
    manifest["files"][evil] = {"bytes": 1, "sha256": ""}
    manifest |= {"precision": evil, "policy": [{"role": evil, "modules": evil, "storage": evil}], "vlpack": evil}
    manifest["source"] |= {"name": evil, "architecture": evil}
    part = next(iter(manifest["parts"].values()))
    part["inputs"] = {evil: [evil, [evil]]}
    part["weights"] = {evil: {"storage": evil, "bytes": 1}}
    (package / "vlpack.json").write_text(json.dumps(manifest), encoding="utf-8")
    for arguments in (["inspect", package], ["run", package, "Hello"]):
        done = run_vlpack(capsys, *arguments)
        assert done.code in (1, 2)
        assert all(line.isprintable() for line in (done.out + done.err).splitlines()), done
        assert "x1b" in done.out + done.err


def test_a_package_in_the_hub_s_cache(whole: Path, tmp_path: Path) -> None:
    """In the Hub's cache every file is a link into the repository's ``blobs``, which is allowed."""
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    shutil.copytree(whole, home / "blobs")
    for path in (home / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert inspect(snapshot)["problems"] == []
    answer = vlpack.load(snapshot).generate(READ, [IMAGES / "02.png"])
    assert answer.text == ANSWERS["02.png"]["read"]


def test_an_embedding_model_s_weights(tmp_path: Path) -> None:
    build(DIGITS, tmp_path / "package", task=EMBEDDING)
    path = tmp_path / "package" / "vision.onnx"
    model = onnx.load(path, load_external_data=False)
    PLANTS["above"](model.graph)
    onnx.save(model, path)
    seal(path.parent)
    with pytest.raises(PackageError, match="not a file of the package"):
        vlpack.load(path.parent)


def test_a_graph_that_is_no_onnx_file(package: Path) -> None:
    (package / "vision.onnx").write_bytes(b"\xff" * 200)
    seal(package)
    with pytest.raises(PackageError, match=r"vision\.onnx cannot be read"):
        vlpack.load(package)
    assert "cannot be read" in inspect(package)["problems"][0]


def test_a_valid_package_is_accepted(whole: Path) -> None:
    assert inspect(whole)["problems"] == []
