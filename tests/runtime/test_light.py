"""Using a package imports no module that only building needs, because such imports take longer than a short run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from samples import DIGITS, IMAGES, READ
from vlpack.builder import build
from vlpack.store.packages import Key, write_sidecar
from vlpack.store.place import packages_folder

SCRIPT = """
import json, sys
from vlpack.cli.app import main
code = 0
try:
    main(sys.argv[1:])
except SystemExit as leaving:
    code = leaving.code
heavy = ("onnx_ir", "onnxscript", "sympy", "torch", "transformers", "vlpack.export", "vlpack.architectures",
         "vlpack.layers", "vlpack.calibration", "vlpack.lora", "vlpack.verification")
print(json.dumps([code or 0, sorted(name for name in heavy if name in sys.modules)]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DIGITS, tmp_path_factory.mktemp("light") / "digits").folder


def loaded(*arguments: object, given: str = "") -> list[object]:
    """The exit code of a command, and the heavy modules that it imported."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    told: list[object] = json.loads(done.stderr.splitlines()[-1])
    return told


@pytest.mark.parametrize(
    "arguments", [["run", "--image", IMAGES / "02.png", READ], ["chat"], ["inspect"]], ids=lambda each: each[0]
)
def test_commands_do_not_import_modules_for_building(arguments: list[object], package: Path) -> None:
    verb, *rest = arguments
    assert loaded(verb, package, *rest, given=f"{READ}\n") == [0, []]


def test_packages_by_name_need_no_modules_for_building(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub id whose package is in the cache, and the commands for the cache."""
    monkeypatch.setenv("VLPACK_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    key = Key("org/name", "0" * 40, "int8")
    shutil.copytree(package, packages_folder() / key.name)
    write_sidecar(packages_folder() / key.name, key, {"main": 1.0})
    for command in (["run", "org/name", "--image", IMAGES / "02.png", READ], ["list"], ["rm", "org/name"]):
        assert loaded(*command) == [0, []], command


@pytest.mark.parametrize("verb", ["embed", "score"])
def test_a_wrong_task_is_reported_without_modules_for_building(verb: str, package: Path) -> None:
    assert loaded(verb, package, "words", *(["more"] if verb == "score" else [])) == [2, []]


def test_the_check_detects_imports(tmp_path: Path) -> None:
    """Building does import the heavy modules, and the check above finds them."""
    code, heavy = loaded("build", DIGITS, "-o", tmp_path / "package")
    assert code == 0
    assert {"onnx_ir", "onnxscript", "vlpack.export"} <= set(heavy)  # type: ignore[call-overload]


def test_a_missing_package_needs_no_runtime() -> None:
    """A missing package is reported at once, without loading a library that takes long."""
    script = SCRIPT.replace("heavy = (", 'heavy = ("onnx", "onnxruntime", "onnxruntime_genai", "numpy", "av", ')
    done = subprocess.run(
        [sys.executable, "-c", script, "run", "/nowhere/at/all", "Hello"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stderr.splitlines()[-1]) == [2, []]
    assert "There is no folder" in done.stderr
