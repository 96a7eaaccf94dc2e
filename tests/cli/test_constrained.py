"""``vlpack run`` with --schema, --regex and --choice."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from samples import DIGITS, IMAGES, READ, vlpack
from vlpack.builder import build

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "digits": {"type": "array", "items": {"enum": [1, 2, 3]}, "maxItems": 3},
        "sure": {"type": "boolean"},
    },
    "required": ["digits", "sure"],
    "additionalProperties": False,
}
Capsys = pytest.CaptureFixture[str]
ASKED = ("--image", IMAGES / "01.png", "--temperature", 0, READ)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DIGITS, tmp_path_factory.mktemp("package") / "digits").folder


@pytest.mark.parametrize("in_file", [False, True])
def test_a_schema(in_file: bool, package: Path, tmp_path: Path, capsys: Capsys) -> None:
    given = json.dumps(SCHEMA)
    if in_file:
        (tmp_path / "schema.json").write_text(given, encoding="utf-8")
        given = str(tmp_path / "schema.json")
    shown = vlpack(capsys, "run", package, "--schema", given, *ASKED, "--stats")
    assert shown.code == 0
    assert set(json.loads(shown.out)) == {"digits", "sure"}
    assert " " not in shown.out
    assert "first token" in shown.err


def test_regex_and_choices(package: Path, capsys: Capsys) -> None:
    assert re.fullmatch(r"[xyz]{4}\n", vlpack(capsys, "run", package, "--regex", "[xyz]{4}", *ASKED).out)
    told = vlpack(capsys, "run", package, "--choice", "a cat", "--choice", "a dog", *ASKED, "--json")
    shown = json.loads(told.out)
    assert shown["text"] in ("a cat", "a dog")
    assert shown["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--schema", "{"], "--schema is not"),
        (["--schema", '{"type": "strange"}'], "--schema is not usable"),
        (["--schema", "nowhere.json"], "nowhere.json"),
        (["--regex", "(("], "--regex is not usable"),
        (["--regex", "a", "--choice", "b"], "both given"),
        (["--regex", "a", "--vision-provider", "runtime"], "--vision-provider has no effect"),
    ],
    ids=str,
)
def test_unusable_constraints(arguments: list[str], said: str, package: Path, capsys: Capsys) -> None:
    shown = vlpack(capsys, "run", package, *arguments, *ASKED)
    assert shown.code == 2
    assert said in " ".join(shown.err.split())


def test_without_llguidance(package: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    shown = vlpack(capsys, "run", package, "--regex", "a", *ASKED)
    assert shown.code == 2
    assert "vlpack[engine]" in shown.err
