"""Unusual texts, names and values either work or are refused with a clear error."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import vlpack
from samples import DIGITS, edit_json, seal
from samples import vlpack as run_vlpack
from vlpack.cli import console
from vlpack.errors import InputError, OptionError, PackageError
from vlpack.jsonl import read_jsonl
from vlpack.options import parse_extra_options
from vlpack.preprocess.chat_template import ChatTemplate

SEPARATORS = "a\u2028b\u2029c\u0085d\x1ee"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlpack.build(DIGITS, tmp_path_factory.mktemp("whole") / "package", precision="int4").folder


def test_separators_within_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes((json.dumps({"q": SEPARATORS[:-2]}, ensure_ascii=False) + "\r\n\n" + '{"q": "x"}').encode())
    assert read_jsonl(path, lambda value: value["q"], "…") == [(1, SEPARATORS[:-2]), (3, "x")]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{SEPARATORS}\nx\n"))
    assert console.lines_from_stdin() == [SEPARATORS, "x"]


def test_a_text_that_is_too_long_is_not_blamed_on_the_template(whole: Path) -> None:
    model = vlpack.Model(whole)
    with pytest.raises(InputError, match=r"have 20000004 characters; more than 12582912"):
        model.prompt("x" * 20_000_000)
    parts = [{"type": "text", "text": "x" * 7_000_000}] * 2
    with pytest.raises(InputError, match="14000012 characters"):
        ChatTemplate("").render([{"role": "user", "content": parts}])
    template = ChatTemplate("{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}")
    assert len(template.render([{"role": "user", "content": "x" * (12 * 2**20 - 4)}])) == 12 * 2**20 - 2


@pytest.mark.parametrize("eos", [[], True, -1, [1, "2"], 99999, [99999], None])
def test_packages_without_an_end_token(eos: Any, whole: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(whole, tmp_path / "package"))
    edit_json(package / "genai_config.json", "model", "eos_token_id", value=eos)
    seal(package)
    with pytest.raises(PackageError, match="eos_token_id of the wrong type"):
        vlpack.load(package)


@pytest.mark.skipif(os.name == "nt", reason="names there are Unicode")
@pytest.mark.parametrize("place", [b"caf\xe9", b"caf\xe9/package"])
def test_an_output_path_that_is_not_utf8(place: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = os.fsdecode(os.fsencode(tmp_path) + b"/" + place)
    with pytest.raises(OptionError, match="not valid UTF-8"):
        vlpack.build(DIGITS, output)
    done = run_vlpack(capsys, "build", DIGITS, "-o", output)
    assert (done.code, "not valid UTF-8" in done.err.replace("\n", " ")) == (2, True)
    assert list(tmp_path.iterdir()) == []
    vlpack.build(DIGITS, tmp_path / "café")
    assert vlpack.load(tmp_path / "café")


TOKENS = [("true", True), ("1", True), ("False", False), ("0", False), ("hf_x", "hf_x")]


@pytest.mark.parametrize(("text", "token"), TOKENS)
def test_forms_of_the_hub_token(text: str, token: str | bool) -> None:
    assert parse_extra_options([f"hf_token={text}"]).hf_token == token
