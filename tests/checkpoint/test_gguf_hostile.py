"""Damaged and hostile GGUF files: one sentence each, before anything is written."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from family import Member, make_member
from gguf_files import matrices_as, write
from samples import vlpack
from vlpack.builder import build
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import CheckpointError

pytest.importorskip("torch")

SETTINGS = {"num_hidden_layers": 1, "hidden_size": 64, "head_dim": 32}
HUGE = 1 << 62


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "a.weight", shape: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(
    entries: list[bytes] | None = None, tensors: list[bytes] | None = None, counts: tuple[int, int] | None = None,
    version: int = 3, data: int = 64,
) -> bytes:  # fmt: skip
    entries, tensors = entries or [], tensors or []
    found, kinds = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, found, kinds) + b"".join(entries + tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


LLAMA = entry("general.architecture", 8, text("llama"))
HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with the letters GGUF"),
    "another format": (b"PK\x03\x04" + bytes(60), "does not begin with the letters GGUF"),
    "a pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
    "version 1": (file(version=1), "version 1 of GGUF"),
    "big-endian": (file(version=3 << 24), "big-endian"),
    "many tensors": (file(counts=(HUGE, 0)), f"names {HUGE} tensors"),
    "many entries": (file(counts=(0, HUGE)), f"names {HUGE} metadata entries"),
    "fewer entries than named": (file(counts=(0, 60_000), data=0), "the header is truncated"),
    "a long key": (file([text("a", HUGE)]), "a metadata key would have"),
    "a long string": (file([entry("a", 8, text("a", HUGE))]), "'a' would have"),
    "not UTF-8": (file([entry("a", 8, text(b"\xff\xfe"))]), "'a' is not UTF-8"),
    "a key twice": (file([entry("a", 4, bytes(4))] * 2), "'a' appears twice"),
    "an unknown type": (file([entry("a", 99, bytes(8))]), "of the type 99"),
    "a long array": (file([entry("a", 9, struct.pack("<IQ", 4, 1 << 20))]), "the header is truncated: 'a'"),
    "an array of many numbers": (file([entry("a", 9, struct.pack("<IQ", 0, HUGE))]), f"would have {HUGE} elements"),
    "an array of many strings": (file([entry("a", 9, struct.pack("<IQ", 8, HUGE))]), f"would have {HUGE} elements"),
    "an array of arrays": (file([entry("a", 9, struct.pack("<IQ", 9, 1))]), "elements of the type 9"),
    "no dimensions": (file([LLAMA], [tensor(shape=())]), "has 0 dimensions"),
    "many dimensions": (file([LLAMA], [tensor(shape=(1,) * 9)]), "has 9 dimensions"),
    "an empty tensor": (file([LLAMA], [tensor(shape=(0, 4))]), "which is empty"),
    "a huge tensor": (file([LLAMA], [tensor(shape=(HUGE, HUGE))]), "larger than any memory"),
    "a type that does not exist": (file([LLAMA], [tensor(kind=77)]), "of the type 77"),
    "a type that is not read": (file([LLAMA], [tensor(kind=23)]), "of the type IQ4_XS, which vlpack does not read"),
    "rows that blocks do not divide": (file([LLAMA], [tensor(kind=8)]), "blocks of 32 do not divide"),
    "an odd offset": (file([LLAMA], [tensor(offset=4)]), "not a multiple of 32"),
    "an offset outside": (file([LLAMA], [tensor(offset=1 << 40)]), "truncated: the tensor 'a.weight'"),
    "the largest offset": (file([LLAMA], [tensor(offset=(1 << 64) - 32)]), "truncated: the tensor 'a.weight'"),
    "overlapping tensors": (file([LLAMA], [tensor("a"), tensor("b")]), "'b' overlaps"),
    "a name twice": (file([LLAMA], [tensor(), tensor(offset=32)]), "'a.weight' appears twice"),
    "a name that cannot be printed": (file([LLAMA], [tensor("a\x1b")]), "cannot be printed"),
    "alignment 0": (file([LLAMA, entry("general.alignment", 4, bytes(4))]), "general.alignment is 0"),
    "alignment 48": (file([entry("general.alignment", 4, struct.pack("<I", 48))]), "general.alignment is 48"),
    "no architecture": (file(), "'general.architecture' is missing"),
    "another architecture": (file([entry("general.architecture", 8, text("gemma3"))]), "'gemma3' is not supported"),
    "a vision encoder": (file([entry("general.architecture", 8, text("clip"))]), "vision encoder alone"),
    "a part of a model": (file([LLAMA, entry("split.count", 2, b"\x03\0")]), "one of 3 parts"),
    "no embedding": (file([LLAMA]), "no token embedding"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, tmp_path: Path) -> None:
    data, match = HEADERS[name]
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        Checkpoint.open(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    member = Member("Qwen3", "Qwen3Config", "Qwen3ForCausalLM", text=SETTINGS, tied=True)
    return make_member(tmp_path_factory.mktemp("hostile") / "checkpoint", member)


def test_every_truncation(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "whole.gguf", matrices_as(Type.Q8_0))
    data = (tmp_path / "whole.gguf").read_bytes()
    for size in [*range(0, 400, 7), *range(400, len(data), len(data) // 40), len(data) - 1]:
        (tmp_path / "model.gguf").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"truncated|does not begin"):
            Checkpoint.open(tmp_path / "model.gguf")


Change = Callable[[gguf.GGUFWriter], object]
KEYS: dict[str, tuple[str, Any, str]] = {
    "heads as text": ("attention.head_count", "4", "'qwen3.attention.head_count' is '4'"),
    "no heads": ("attention.head_count", 0, "'qwen3.attention.head_count' is 0"),
    "heads per layer": ("attention.head_count_kv", [2, 2], r"'qwen3.attention.head_count_kv' is \[2, 2\]"),
    "negative width": ("embedding_length", -64, "'qwen3.embedding_length' is -64"),
    "NaN as epsilon": ("attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon' is nan"),
    "another number of layers": ("block_count", 3, "missing from the checkpoint"),
    "partial rotation": ("rope.dimension_count", 16, "'qwen3.rope.dimension_count' is 16; only 32"),
    "linear scaling": ("rope.scaling.type", "linear", "rope scaling 'linear' is not supported"),
    "a sliding window": ("attention.sliding_window", 128, "sliding-window attention"),
    "experts": ("expert_count", 8, "qwen3 with 8 experts"),
}
TOKENIZERS: dict[str, tuple[str, Any, str]] = {
    "another kind": ("model", "llama", "of the kind 'llama'"),
    "other rules": ("pre", "tekken", "'gpt2', 'tekken', which is not read"),
    "no merges": ("merges", "a b", "'tokenizer.ggml.merges' must be a list of strings"),
    "an impossible merge": ("merges", ["x yyyyyyyy"], "the merge 'x yyyyyyyy'"),
    "too many tokens": ("tokens", [str(n) for n in range(3000)], "3000 tokens, but the embedding has 2176 rows"),
    "equal tokens": ("tokens", ["same"] * 2176, "the tokens 0 and 1 are both 'same'"),
    "kinds of other tokens": ("token_type", [1], "must have the kind of each of 2176 tokens"),
    "an end outside": ("eos_token_id", 5000, "'tokenizer.ggml.eos_token_id' is 5000"),
    "a template of another type": ("chat_template", 7, "'tokenizer.chat_template' must be a string"),
}


def replaced(key: str, value: Any) -> Change:
    """A change of a writer's metadata: another value for a key."""

    def change(writer: gguf.GGUFWriter) -> None:
        kind = gguf.GGUFValueType.get_type(value)
        writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value=value, type=kind)

    return change


@pytest.mark.parametrize("name", [*KEYS, *TOKENIZERS])
def test_metadata(name: str, folder: Path, tmp_path: Path) -> None:
    key, value, match = KEYS.get(name) or TOKENIZERS[name]
    start = "qwen3." if name in KEYS else "tokenizer." if key == "chat_template" else "tokenizer.ggml."
    kinds = {"token_type": [1] * 2176} if name == "equal tokens" else {}
    changes = [replaced(start + key, value), *(replaced(start + one, other) for one, other in kinds.items())]
    write(folder, tmp_path / "model.gguf", matrices_as(Type.F16), lambda writer: [one(writer) for one in changes])
    with pytest.raises(CheckpointError, match=match):
        build(tmp_path / "model.gguf", tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_no_token_that_ends_an_answer(folder: Path, tmp_path: Path) -> None:
    def without_end(writer: gguf.GGUFWriter) -> None:
        values = writer.kv_data[0]
        del values["tokenizer.ggml.eos_token_id"]
        tokens, kinds = (values[f"tokenizer.ggml.{name}"].value for name in ("tokens", "token_type"))
        for name in ("<|im_end|>", "<|endoftext|>"):
            kinds[tokens.index(name)] = gguf.TokenType.USER_DEFINED

    write(folder, tmp_path / "model.gguf", matrices_as(Type.F16), without_end)
    with pytest.raises(CheckpointError, match=r"which token ends an answer: .*tokenizer\.ggml\.eos_token_id"):
        build(tmp_path / "model.gguf", tmp_path / "package")
    assert not (tmp_path / "package").exists()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2050}', encoding="utf-8")
    build(tmp_path, tmp_path / "package", threads=1)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scales_that_are_not_finite(kind: Type, bad: float, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(folder, path, matrices_as(kind))
    data, place = bytearray(path.read_bytes()), 0
    for one in gguf.GGUFReader(path).tensors:
        if one.name == "blk.0.ffn_down.weight":
            place = one.data_offset + 3 * gguf.GGML_QUANT_SIZES[kind][1]  # the first block of the second row
    data[place : place + 2] = np.float16(bad).tobytes()
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=f"the scale {bad} of model.layers.0.mlp.down_proj.weight.* row 1, group 0"
    ):
        build(path, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, tmp_path / "model.gguf", matrices_as(Type.Q4_0))
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:5000])
    for arguments in (["build", tmp_path / "cut.gguf", "-o", tmp_path / "package"], ["inspect", tmp_path / "cut.gguf"]):
        done = vlpack(capsys, *arguments)
        assert done.code == 2
        assert "truncated" in done.err.replace("\n", " ")
        assert "Traceback" not in done.err
    assert not (tmp_path / "package").exists()
    done = vlpack(capsys, "build", tmp_path / "model.gguf")
    assert done.code == 2
    assert "Where should the package go?" in done.err
    assert vlpack(capsys, "inspect", tmp_path / "model.gguf").code == 0
    done = vlpack(capsys, "run", tmp_path / "model.gguf", "Hello")
    assert done.code == 2
    assert "Build a package from it" in done.err
