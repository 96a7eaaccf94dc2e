"""Tokenizers with rules that could expand a text without bound are refused before the rules run."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from samples import DIGITS, copy_digits
from vlpack.builder import build
from vlpack.errors import CheckpointError, InputError
from vlpack.preprocess import Tokenizer
from vlpack.preprocess.tokenizer_bounds import MAX_GROWTH, _normalizes_tokens

ORIGINAL: dict[str, Any] = json.loads((DIGITS / "tokenizer.json").read_text(encoding="utf-8"))
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
SPACES = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def chain(kind: str, *rules: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(rules)}


def write(folder: Path, changes: dict[str, Any], *, escaped: bool = False) -> Path:
    text = json.dumps({**ORIGINAL, **changes}, ensure_ascii=False)
    if escaped:
        text = text.replace('"Replace"', '"Repl\\u0061ce"').replace('"ByteLevel"', '"Byte\\u004cevel"')
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


TABLE = (8).to_bytes(4, "little") + bytes(8) + b"x" * 500 + b"\0"
DOUBLE = replace({"String": "a"}, "aa")
BOMBS: dict[str, dict[str, Any]] = {
    "forty rules": {"normalizer": chain("normalizers", *[DOUBLE] * 40)},
    "nested": {"normalizer": chain("normalizers", *[chain("normalizers", *[DOUBLE] * 4)] * 4)},
    "one long rule": {"normalizer": replace({"String": "a"}, "a" * 100)},
    "a pattern of nothing": {"normalizer": replace({"Regex": "x*"}, "a" * 64)},
    "prepended": {"normalizer": chain("normalizers", *[{"type": "Prepend", "prepend": "aaa"}] * 4)},
    "a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(TABLE).decode()}},
    "bytes of bytes": {"normalizer": chain("normalizers", *[{"type": "ByteLevel"}] * 40)},
    "pieces of bytes": {"pre_tokenizer": chain("pretokenizers", *[BYTES] * 40)},
    "spaces": {"pre_tokenizer": chain("pretokenizers", *[SPACES] * 40)},
    "both": {"normalizer": chain("normalizers", *[DOUBLE] * 5), "pre_tokenizer": chain("pretokenizers", BYTES)},
    "the decoder": {"decoder": chain("decoders", ORIGINAL["decoder"], *[DOUBLE] * 40)},
}


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name: str, escaped: bool, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"more than {MAX_GROWTH} characters of one"):
        Tokenizer.from_folder(write(tmp_path, BOMBS[name], escaped=escaped))


def test_a_bomb_in_added_tokens_does_not_hang_a_build(tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    tokens = [{**token, "normalized": True, "content": "a"} for token in ORIGINAL["added_tokens"][:1]]
    write(source, {**BOMBS["forty rules"], "added_tokens": [*tokens, *ORIGINAL["added_tokens"][1:]]})
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="characters of one"):
        build(source, tmp_path / "package")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("token", [{"normalized": True}, {"normalized": False}])
def test_rules_as_lists(token: dict[str, Any], tmp_path: Path) -> None:
    """The library also accepts an object that is written as a list of its values, so the check must too."""
    rules = {"type": "Sequence", "normalizers": [["Replace", {"String": "a"}, "aa"]] * 40}
    tokens = [{**ORIGINAL["added_tokens"][0], **token, "content": "a"}]
    with pytest.raises(CheckpointError, match=r"characters of one|not a usable"):
        Tokenizer.from_folder(write(tmp_path, {"normalizer": rules, "added_tokens": tokens}))
    folder = write(tmp_path, {"normalizer": {"type": "NFC"}, "added_tokens": tokens})
    twice = (folder / "tokenizer.json").read_text(encoding="utf-8")
    first = json.dumps(BOMBS["forty rules"]["normalizer"])
    twice = twice.replace('"normalizer": {', f'"normalizer": {first}, "normalizer": {{', 1)
    (folder / "tokenizer.json").write_text(twice, encoding="utf-8")
    if token["normalized"]:
        with pytest.raises(CheckpointError, match="appears twice"):
            Tokenizer.from_folder(folder)
    else:
        assert Tokenizer.from_folder(folder).encode("a" * 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Explode"}},
        {"normalizer": chain("normalizers", {"type": "Explode"})},
        {"normalizer": replace({}, 5)},  # type: ignore[arg-type]
        {"decoder": {"type": "Sequence"}},
        {"model": ["BPE"]},
    ],
)
def test_rules_of_wrong_types(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Tokenizer.from_folder(write(tmp_path, changes))


def test_a_long_suffix_after_every_word(tmp_path: Path) -> None:
    model = {"type": "WordPiece", "unk_token": "a", "max_input_chars_per_word": 100, "vocab": {"a": 0}}
    with pytest.raises(CheckpointError, match="characters of one"):
        Tokenizer.from_folder(write(tmp_path, {"model": {**model, "continuing_subword_prefix": "x" * 1000}}))
    Tokenizer.from_folder(write(tmp_path, {"model": {**model, "continuing_subword_prefix": "##"}}))


LLAMA = chain("normalizers", {"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁"))
LLAMA_DECODER = chain(
    "decoders", replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
)  # fmt: skip
SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
REAL: dict[str, dict[str, Any]] = {
    "qwen": {},
    "llama 2": {"normalizer": LLAMA, "decoder": LLAMA_DECODER, "pre_tokenizer": None, "post_processor": None},
    "llama 3": {"normalizer": None, "pre_tokenizer": chain("pretokenizers", SPLIT, BYTES)},
    "smollm": {"pre_tokenizer": chain("pretokenizers", {"type": "Digits", "individual_digits": True}, BYTES)},
    "unigram": {"normalizer": chain("normalizers", {"type": "NFKC"}, replace({"Regex": " {2,}"}, " ")),
                "pre_tokenizer": SPACES},
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_rules_of_real_tokenizers_are_accepted(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, REAL[name]))
    text = "Zahlen: 12, é und 李. " * 20
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_only_unusual_tokenizer_files_are_parsed() -> None:
    text = json.dumps(ORIGINAL)
    assert not _normalizes_tokens(text.encode())
    assert not _normalizes_tokens((DIGITS / "tokenizer.json").read_bytes())
    words = '"vocab": {"istrue": 1, "true": 2, "true,": 3, '
    assert not _normalizes_tokens(text.replace('"vocab": {', words).encode())
    before, key, after = text.partition('"normalized": ')
    assert after.startswith("false")
    after = after.removeprefix("false")
    for odd in (f"{key}true", f"{key}false, {key}true", '"normali\\u007aed": true', f"{key}\n\ttrue"):
        assert _normalizes_tokens(f"{before}{odd}{after}".encode()), odd
    assert _normalizes_tokens(text.replace('"added_tokens": [', '"added_tokens": [[1, "a", false, true],').encode())


def test_texts_that_could_exhaust_memory(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, {"normalizer": chain("normalizers", *[DOUBLE] * 4)}))
    assert len(tokenizer.encode("a" * 1000)) > 0
    with pytest.raises(InputError, match=r"4194305 characters; with this tokenizer no more than 4194304"):
        tokenizer.encode("b" * (2**22 + 1))
