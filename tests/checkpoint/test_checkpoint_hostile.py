"""Damaged and malicious checkpoints: each is refused with a CheckpointError that says where the fault is."""

import copy
import itertools
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlpack.checkpoint import files as safefile
from vlpack.checkpoint import safetensors as tensorfile
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import CheckpointError

FUZZ_EXAMPLES = int(os.environ.get("VLPACK_FUZZ_EXAMPLES", "400"))
CONFIG = {"architectures": ["Qwen3VLForConditionalGeneration"]}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Header = dict[str, Any]

needs_links = pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")


def header() -> Header:
    """The header of three tensors with 24, 8 and 6 bytes of data."""
    return {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "U8", "shape": [1, 6], "data_offsets": [32, 38]},
    }


def pack(header: Header | bytes, data: bytes = bytes(38), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / SINGLE).write_bytes(pack(header()))
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for file, names in {"one.safetensors": "ab", "two.safetensors": "cd"}.items():
        part = {
            name: {"dtype": "F16", "shape": [2], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)
        }
        (tmp_path / file).write_bytes(pack(part, bytes(8)))
    set_map(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"})
    return tmp_path


def set_map(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, *parts: str) -> CheckpointError:
    """The error message of a refused folder, checked to contain all `parts` and to be printable."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder).close()
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    check_printable(caught.value)
    return caught.value


def check_printable(error: CheckpointError) -> None:
    """Checks that a message is short, can be encoded, and has no control characters from names in the file."""
    assert len(error.message) < 2000
    assert all(line.isprintable() for line in str(error).splitlines()), error


# --- the files are valid before they are damaged ------------------------------------------------------


def test_undamaged_checkpoints_open(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c"]


def test_the_undamaged_shards_open(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c", "d"]


# --- folder and config -----------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="name is empty"):
        Checkpoint.open("")
    refused(tmp_path / "absent", "There is no folder", "absent", "config.json")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file, not a folder", f"the folder it is in: {tmp_path}")
    refused(Path("x" * 5000), "xxx")
    refused(Path("a\0b"), r"a\x00b")
    refused(Path("~no-such-user-here/x"), "no-such-user-here")
    refused(tmp_path, f"{tmp_path} has no config.json")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must hold a JSON object, not a list"),
        (b"null", "must hold a JSON object, not a NoneType"),
        (b'{"a": "\xff"}', "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested more than 100 deep"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    ],
)
def test_bad_config(folder: Path, text: bytes, part: str) -> None:
    (folder / "config.json").write_bytes(text)
    refused(folder, str(folder / "config.json"), part)


def test_config_too_large(folder: Path) -> None:
    with open(folder / "config.json", "wb") as file:
        file.truncate(1 << 34)  # sparse: 16 GB that must not be read
    refused(folder, f"config.json has {1 << 34} bytes; more than 10000000 are not read")


def test_config_nested_as_deep_as_allowed(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"a":' * 99 + b"1" + b"}" * 99)
    Checkpoint.open(folder).close()


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": "x"}, {"architectures": [1]}])
def test_no_architecture(folder: Path, config: Header) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"config\.json does not say which"),
    ):
        _ = checkpoint.architecture


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/passwd", "a/b.json", "", "..", "C:x.json", "a\0.json", "a\\b.json"]
)
def test_json_names_stay_in_the_folder(folder: Path, name: str) -> None:
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match="not a plain file name"):
        checkpoint.json(name)


# --- no weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        (None, ["has no weights", SINGLE]),
        ("pytorch_model.bin", ["only as pickles ('pytorch_model.bin')", "save_pretrained"]),
        ("model.pt", ["only as pickles"]),
        ("adapter_config.json", ["is an adapter", "lora="]),
        ("model-q4.gguf", ["only as GGUF"]),
    ],
)
def test_no_weights(folder: Path, file: str | None, parts: list[str]) -> None:
    (folder / SINGLE).unlink()
    if file:
        (folder / file).write_bytes(b"\x80\x04.")
    refused(folder, str(folder), *parts)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("absent.safetensors", "lacks 'absent.safetensors'"),
        ("../model.safetensors", "not a plain file name"),
        ("", "not a plain file name"),
        (7, "must be a file name"),
        ("config.json", "not a safetensors file"),
        ("x.bin", "is a pickle"),
    ],
)
def test_weights_named_in_the_config(folder: Path, value: object, part: str) -> None:
    (folder / "x.bin").touch()
    (folder / "config.json").write_text(json.dumps({"transformers_weights": value}))
    refused(folder, part)


def test_no_tensors(folder: Path) -> None:
    (folder / SINGLE).write_bytes(pack({"__metadata__": {}}, b""))
    refused(folder, "not one tensor")


# --- the index -------------------------------------------------------------------------------------

OUTSIDE = ["../one.safetensors", "/one.safetensors", "sub/one.safetensors", "..\\one.safetensors", "C:one.safetensors"]


@pytest.mark.parametrize("file", [*OUTSIDE, "", ".", "..", "o\0ne.safetensors", "\ud800.safetensors", "x" * 999])
def test_index_with_paths_outside_the_folder(sharded: Path, file: str) -> None:
    set_map(sharded, {"a": file})
    refused(sharded, INDEX, "not a plain file name")


@pytest.mark.parametrize("weight_map", [None, {}, [], "one.safetensors", 3])
def test_index_without_map(sharded: Path, weight_map: object) -> None:
    set_map(sharded, weight_map)
    refused(sharded, INDEX, "no weight_map")


@pytest.mark.parametrize("file", [None, 1, True, ["one.safetensors"], {"a": [[]]}])
def test_index_with_an_entry_that_is_no_file_name(sharded: Path, file: object) -> None:
    set_map(sharded, {"a": file})
    refused(sharded, INDEX, "tensor 'a'")


def test_index_names_pickles(sharded: Path) -> None:
    set_map(sharded, {"a": "pytorch_model-1.bin"})
    (sharded / "pytorch_model-1.bin").touch()
    refused(sharded, "pytorch_model-1.bin is a pickle", "save_pretrained")


def test_index_repeats_a_tensor(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    refused(sharded, INDEX, "the key 'a' appears twice")


def test_missing_shards(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    refused(sharded, "lacks 1 of the 2 files", "two.safetensors", "download the missing files")
    set_map(sharded, {f"t{i}": f"{i:03}.safetensors" for i in range(500)})
    refused(sharded, "lacks 500 of the 500 files", "000.safetensors, 001.safetensors, 002.safetensors and 497 more")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"a": "two.safetensors"}, ["one.safetensors, tensor 'a' should be in two.safetensors"]),
        ({"d": None}, ["two.safetensors, tensor 'd' is not in the index"]),
        ({"e": "one.safetensors"}, ["one.safetensors lacks the tensor 'e'"]),
    ],
)
def test_index_and_shards_disagree(sharded: Path, change: Header, parts: list[str]) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"] | change
    set_map(sharded, {name: file for name, file in weight_map.items() if file is not None})
    refused(sharded, *parts, "download the checkpoint again")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    part = {n: {"dtype": "F16", "shape": [2], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate("bcd")}
    (sharded / "two.safetensors").write_bytes(pack(part, bytes(12)))
    refused(sharded, "two.safetensors, tensor 'b' is also in one.safetensors")


def test_tensors_of_all_shards_are_counted_together(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlpack.checkpoint import checkpoint

    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 4)
    Checkpoint.open(sharded).close()
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 3)
    refused(sharded, "more than 3 tensors")
    set_map(
        sharded, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    )  # three according to the index, four in the files
    refused(sharded, "has more than 3 tensors")


# --- the header ------------------------------------------------------------------------------------

NINES = 10**18
BAD_ENTRIES: dict[str, tuple[Any, str]] = {
    "not an object": ([1], "must be an object"),
    "no dtype": ({"shape": [4], "data_offsets": [24, 32]}, "must be an object with dtype"),
    "no shape": ({"dtype": "BF16", "data_offsets": [24, 32]}, "must be an object with dtype"),
    "no offsets": ({"dtype": "BF16", "shape": [4]}, "must be an object with dtype"),
    "unknown dtype": ({"dtype": "F4", "shape": [4], "data_offsets": [24, 32]}, "type 'F4' are not supported"),
    "dtype in lower case": ({"dtype": "bf16", "shape": [4], "data_offsets": [24, 32]}, "'bf16'"),
    "dtype a list": ({"dtype": ["BF16"], "shape": [4], "data_offsets": [24, 32]}, "are not supported"),
    "dtype a huge string": ({"dtype": "F" * 100000, "shape": [4], "data_offsets": [24, 32]}, "are not supported"),
    "dtype a huge list": ({"dtype": ["F32"] * 10000, "shape": [4], "data_offsets": [24, 32]}, "are not supported"),
    "shape a number": ({"dtype": "BF16", "shape": 4, "data_offsets": [24, 32]}, "shape must be a list"),
    "shape of floats": ({"dtype": "BF16", "shape": [4.0], "data_offsets": [24, 32]}, "shape must be a list"),
    "shape of bools": ({"dtype": "BF16", "shape": [4, True], "data_offsets": [24, 32]}, "shape must be a list"),
    "shape of strings": ({"dtype": "BF16", "shape": ["4"], "data_offsets": [24, 32]}, "shape must be a list"),
    "negative shape": ({"dtype": "BF16", "shape": [-2, -2], "data_offsets": [24, 32]}, "shape must be a list"),
    "rank 33": ({"dtype": "BF16", "shape": [1] * 32 + [4], "data_offsets": [24, 32]}, "at most 32"),
    "a shape of 10**54": ({"dtype": "BF16", "shape": [NINES] * 3, "data_offsets": [24, 32]}, "larger than any"),
    "a wrapped shape": ({"dtype": "BF16", "shape": [2**62, 4], "data_offsets": [24, 24]}, "larger than any"),
    "an empty giant": ({"dtype": "BF16", "shape": [0, 2**62], "data_offsets": [24, 24]}, "larger than any"),
    "a size past int64": ({"dtype": "BF16", "shape": [2**64], "data_offsets": [24, 32]}, "shape must be a list"),
    "one offset": ({"dtype": "BF16", "shape": [4], "data_offsets": [24]}, "two non-negative integers"),
    "three offsets": ({"dtype": "BF16", "shape": [4], "data_offsets": [24, 28, 32]}, "two non-negative integers"),
    "offsets of floats": ({"dtype": "BF16", "shape": [4], "data_offsets": [24.0, 32]}, "two non-negative integers"),
    "offsets of bools": ({"dtype": "BF16", "shape": [0], "data_offsets": [False, False]}, "two non-negative integers"),
    "negative offset": ({"dtype": "BF16", "shape": [4], "data_offsets": [-8, 0]}, "two non-negative integers"),
    "backwards": ({"dtype": "BF16", "shape": [4], "data_offsets": [32, 24]}, "before it begins"),
    "too many bytes": (
        {"dtype": "BF16", "shape": [3], "data_offsets": [24, 32]},
        "is 6 bytes, but data_offsets span 8",
    ),
    "too few bytes": ({"dtype": "F32", "shape": [4], "data_offsets": [24, 32]}, "is 16 bytes, but data_offsets span 8"),
    "overlap": ({"dtype": "BF16", "shape": [5], "data_offsets": [22, 32]}, "overlaps the tensor before it"),
    "overlap with the next": (
        {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
        "overlaps the tensor before it",
    ),
    "hole": ({"dtype": "BF16", "shape": [3], "data_offsets": [26, 32]}, "leaves a hole before it"),
    "empty within another": ({"dtype": "BF16", "shape": [0], "data_offsets": [8, 8]}, "overlaps"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entry(folder: Path, case: str) -> None:
    entry, part = BAD_ENTRIES[case]
    (folder / SINGLE).write_bytes(pack(header() | {"b": entry}))
    refused(folder, SINGLE, "tensor '", part)


@pytest.mark.parametrize("name", ["", "x" * 1025, "a\nb", "a\0b", "\x1b[2J", "\ud800", "\u202egnp"])
def test_bad_name(folder: Path, name: str) -> None:
    (folder / SINGLE).write_bytes(pack(header() | {name: {"dtype": "U8", "shape": [0], "data_offsets": [38, 38]}}))
    refused(folder, SINGLE, "the name is empty, too long or holds characters that cannot be printed")


@pytest.mark.parametrize("metadata", [[], None, "pt", {"a": 1}, {"a": {"b": "c"}}, {"a": None}])
def test_bad_metadata(folder: Path, metadata: object) -> None:
    (folder / SINGLE).write_bytes(pack(header() | {"__metadata__": metadata}))
    refused(folder, SINGLE, "__metadata__")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b" {}", "not a JSON object"),
        (b"{", "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a":{"dtype":"U8","shape":[38],"data_offsets":[0,38]}}{}', "not valid JSON"),
        (b'{"a":{"dtype":"U8","shape":[38],"data_offsets":[0,38]}}\0\0', "not valid JSON"),
        (b'{"a":{"dtype":"U8","shape":[38],"data_offsets":[0,38]},"a":1}', "the key 'a' appears twice"),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[38],"data_offsets":[0,38]}}', "the key 'dtype' appears twice"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b'{"a":' + b"[" * 150 + b"]" * 150 + b"}", "nested more than"),
    ],
)
def test_bad_header(folder: Path, text: bytes, part: str) -> None:
    (folder / SINGLE).write_bytes(pack(text))
    refused(folder, SINGLE, part)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001])
def test_header_length_past_the_limit(folder: Path, length: int) -> None:
    (folder / SINGLE).write_bytes(pack(header(), length=length))
    refused(folder, SINGLE, f"its header would be {length} bytes long")


def test_header_length_past_the_end(folder: Path) -> None:
    data = pack(header(), length=90_000_000)
    (folder / SINGLE).write_bytes(data)
    refused(folder, SINGLE, "is truncated", "ends at byte 90000008", f"has {len(data)} bytes")


def test_bytes_after_the_last_tensor(folder: Path) -> None:
    data = pack(header(), bytes(41))
    (folder / SINGLE).write_bytes(data)
    refused(folder, SINGLE, "3 bytes after its last tensor", f"should have {len(data) - 3} bytes and has {len(data)}")


def test_a_clone_without_git_lfs(folder: Path) -> None:
    (folder / SINGLE).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4967215360\n"
    )
    refused(folder, SINGLE, "git-lfs pointer", "git lfs pull")


def test_a_header_of_many_small_objects_is_not_parsed(folder: Path) -> None:
    """Two million empty strings, lists or dictionaries take a hundred times as much memory as their text does."""
    for piece in (b'"ab":1', b'"a%d":"b"', b"[]", b"{}", b"7"):
        body = b",".join([piece] * 2_000_000)
        text = b'{"a":{' + body + b"}}" if b":" in piece else b'{"a":[' + body + b"]}"
        (folder / SINGLE).write_bytes(pack(text))
        del body, text
        tracemalloc.start()
        try:
            refused(folder, SINGLE, "the header")
            assert tracemalloc.get_traced_memory()[1] < 3 * (folder / SINGLE).stat().st_size, piece
        finally:
            tracemalloc.stop()


# --- truncation ------------------------------------------------------------------------------------


def test_truncated_anywhere(folder: Path) -> None:
    """A file cut at any byte: the error gives both sizes and names the first tensor that lost bytes."""
    data = pack(header())
    data_start = len(data) - 38
    for size in range(len(data)):
        (folder / SINGLE).write_bytes(data[:size])
        error = refused(folder, str(folder / SINGLE), "download it again")
        assert f"has {size}" in error.message or f"has only {size} bytes" in error.message
        if size >= data_start:
            lost = "a" if size < data_start + 24 else "b" if size < data_start + 32 else "c"
            assert f"should have {len(data)} bytes" in error.message
            assert f"first tensor without its data is '{lost}'" in error.message


@pytest.mark.parametrize("keep", [0, 8, 100, "all but one"])
def test_truncated_after_opening(folder: Path, keep: int | str) -> None:
    with Checkpoint.open(folder) as checkpoint:
        size = (folder / SINGLE).stat().st_size
        os.truncate(folder / SINGLE, size - 1 if isinstance(keep, str) else keep)
        for read in (
            lambda: checkpoint.rows("c", 0, 1),
            lambda: checkpoint.read("a"),
            lambda: checkpoint.sha256(SINGLE),
        ):
            with pytest.raises(CheckpointError, match=rf"{SINGLE} changed while .* had {size} bytes"):
                read()


def test_truncated_during_a_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is cut after the check for changes: the short read itself must be noticed."""
    monkeypatch.setattr(safefile.OpenFile, "check_unchanged", lambda self: None)
    with Checkpoint.open(folder) as checkpoint:
        os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1)
        assert checkpoint.rows("a", 0, 2).shape == (2, 3)
        with pytest.raises(CheckpointError, match=rf"{SINGLE} ends at byte \d+, but bytes up to \d+ are needed"):
            checkpoint.rows("c", 0, 1)


def test_rewritten_after_opening(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewritten file is refused, also if it was closed meanwhile: the checked offsets are those of the old file."""
    monkeypatch.setattr(safefile.FilePool.__init__, "__defaults__", (1,))
    with Checkpoint.open(sharded) as checkpoint:
        checkpoint.read("c")  # closes one.safetensors
        data = (sharded / "one.safetensors").read_bytes()
        (sharded / "one.safetensors").unlink()
        (sharded / "one.safetensors").write_bytes(data)
        os.utime(sharded / "one.safetensors", (1, 1))
        with pytest.raises(CheckpointError, match=r"one\.safetensors changed"):
            checkpoint.read("a")


def test_a_failing_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with Checkpoint.open(folder) as checkpoint:
        monkeypatch.setattr(safefile.OpenFile, "_read_some", fail)
        with pytest.raises(CheckpointError, match=rf"{SINGLE} cannot be read: Input/output error"):
            checkpoint.read("a")


def test_too_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with Checkpoint.open(folder) as checkpoint:
        monkeypatch.setattr("vlpack.checkpoint.checkpoint.np.empty", fail)
        with pytest.raises(CheckpointError, match="tensor 'a': there is not enough memory for its 24 bytes"):
            checkpoint.read("a")


# --- links and other kinds of file -----------------------------------------------------------------


def hide(folder: Path, name: str, place: Path) -> None:
    """Moves a file elsewhere and leaves a relative link to it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    (folder / name).rename(place)
    (folder / name).symlink_to(os.path.relpath(place, folder))


def snapshot(root: Path, source: Path, name: str = "models--org--name") -> Path:
    """Copies a folder into the layout of the Hugging Face cache: a snapshot of links to blobs."""
    folder = root / name / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    for i, path in enumerate(sorted(source.iterdir())):
        (folder / path.name).write_bytes(path.read_bytes())
        hide(folder, path.name, root / name / "blobs" / f"{i:064}")
    return folder


@needs_links
def test_links_within_the_folder_and_the_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    cached = snapshot(tmp_path / "hub", folder)
    (tmp_path / "short").symlink_to(cached)
    hide(folder, SINGLE, folder / "data" / "w")
    for place in (folder, cached, tmp_path / "short"):
        with Checkpoint.open(place) as checkpoint:
            assert checkpoint.read("a").shape == (2, 3)
            assert checkpoint.tensors["a"].file == place / SINGLE
            assert checkpoint.sha256(SINGLE) == checkpoint.sha256(place / SINGLE)


@needs_links
@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    place = tmp_path_factory.mktemp("private") / "secret"
    hide(folder, name, place)
    refused(folder, str(folder / name), f"leads out of the folder, to {place.resolve()}", "copy the file")


@needs_links
@pytest.mark.parametrize(
    "target",
    [
        "../../../models--org--other/blobs/x",
        "../../refs/x",
        "../x",
        "../../blobs2/x",
        "../../blobs/../x",
        "../../blobs/out",
    ],
)
def test_links_out_of_the_cache_repository_are_refused(folder: Path, tmp_path: Path, target: str) -> None:
    cached = snapshot(tmp_path / "hub", folder)
    (cached / "../../blobs/out").symlink_to(tmp_path / "elsewhere")
    (cached / SINGLE).unlink()
    place = cached / target if not target.endswith("out") else tmp_path / "elsewhere"
    Path(os.path.normpath(place)).parent.mkdir(parents=True, exist_ok=True)
    Path(os.path.normpath(place)).write_bytes(pack(header()))
    (cached / SINGLE).symlink_to(target)
    refused(cached, SINGLE, "leads out of the folder")


@needs_links
def test_blobs_that_are_a_link_are_refused(folder: Path, tmp_path: Path) -> None:
    """An archive can imitate the cache's layout with `blobs` leading anywhere."""
    cached = snapshot(tmp_path / "hub", folder)
    blobs = cached.parent.parent / "blobs"
    blobs.rename(tmp_path / "home")
    blobs.symlink_to(tmp_path / "home")
    refused(cached, "leads out of the folder")


@needs_links
def test_a_folder_that_imitates_the_cache(folder: Path, tmp_path: Path) -> None:
    refused(snapshot(tmp_path / "hub", folder, name="datasets--org--name"), "leads out of the folder")


@needs_links
@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_links_to_nothing_and_in_circles(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("absent")
    refused(folder, str(folder / name), "a link to a file that does not exist")
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    refused(folder, str(folder / name), "cannot be opened")


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_folders_and_pipes_are_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, str(folder / name), "not a regular file")
    if hasattr(os, "mkfifo"):
        (folder / name).rmdir()
        os.mkfifo(folder / name)
        refused(folder, str(folder / name), "not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_file_swapped_for_a_pipe_or_link_after_the_check(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):  # opening the pipe must not wait for a writer
        safefile.OpenFile(tmp_path / "pipe", tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        safefile.OpenFile(tmp_path / "link", tmp_path / "link")


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root may read all")
def test_no_permission(folder: Path) -> None:
    (folder / SINGLE).chmod(0)
    refused(folder, SINGLE, "cannot be opened: Permission denied")


# --- fuzzing ---------------------------------------------------------------------------------------

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    37,
    38,
    39,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**400,
    1.5,
    "",
    "F32",
    "BF16",
    "\ud800",
    [],
    {},
]


def mutate(choose: random.Random, value: Any) -> Any:
    """The value with one or a few places changed, at any depth."""
    if isinstance(value, dict) and value and choose.random() < 0.9:
        key = choose.choice(list(value))
        what = choose.random()
        if what < 0.08:
            del value[key]
        elif what < 0.16:
            value[choose.choice(["a", "b", "new", "__metadata__", "shape", "", "\x00"])] = copy.deepcopy(value[key])
        else:
            value[key] = mutate(choose, value[key])
        return value
    if isinstance(value, list) and value and choose.random() < 0.8:
        i = choose.randrange(len(value))
        what = choose.random()
        if what < 0.1:
            value.append(copy.deepcopy(value[i]))
        elif what < 0.2:
            value.pop(i)
        else:
            value[i] = mutate(choose, value[i])
        return value
    if type(value) is int and choose.random() < 0.5:
        return value + choose.choice([-24, -8, -2, -1, 1, 2, 8, 24])
    return copy.deepcopy(choose.choice(ODD))


def opens_or_is_refused(folder: Path, data: bytes) -> bool:
    (folder / SINGLE).write_bytes(data)
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError as error:
        check_printable(error)
        return False
    with checkpoint:
        spans = []
        for name, tensor in checkpoint.tensors.items():
            assert checkpoint.read(name).nbytes == tensor.nbytes <= len(data)
            if tensor.shape:
                assert checkpoint.rows(name, 0, tensor.shape[0]).tobytes() == checkpoint.read(name).tobytes()
            spans.append((tensor.offset, tensor.offset + tensor.nbytes))
        spans.sort()
        length = struct.unpack("<Q", data[:8])[0]
        assert spans[0][0] == 8 + length
        assert spans[-1][1] == len(data)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    return True


def bounded(folder: Path, action: Callable[[], bool]) -> bool:
    tracemalloc.start()
    try:
        return action()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000 + 100 * (folder / SINGLE).stat().st_size


def safetensors_accepts(data: bytes) -> bool:
    import safetensors

    try:
        safetensors.deserialize(data)
    except Exception:  # safetensors raises various errors for bad files
        return False
    return True


fuzz = settings(
    max_examples=FUZZ_EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fuzz
@given(seed=st.integers(0, 2**32), count=st.integers(1, 4))
def test_fuzz_entries(folder: Path, seed: int, count: int) -> None:
    """Valid JSON with wrong entries: whatever vlpack accepts, the safetensors library accepts too."""
    choose, changed = random.Random(seed), header()
    for _ in range(count):
        changed = mutate(choose, changed)
    data = pack(json.dumps(changed).encode())
    if bounded(folder, lambda: opens_or_is_refused(folder, data)):
        # one known difference: vlpack ignores metadata, even with lone surrogates
        assert safetensors_accepts(data) or rb"\ud800" in data


@fuzz
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4), cut=st.floats(0.0, 2.0))
def test_fuzz_bytes(folder: Path, edits: list[tuple[float, int]], cut: float) -> None:
    data = bytearray(pack(header()))
    for place, value in edits:
        data[int(place * (len(data) - 1))] = value
    data = data[: int(len(data) * cut)]
    if bounded(folder, lambda: opens_or_is_refused(folder, bytes(data))):
        assert safetensors_accepts(bytes(data))


SIZES = st.lists(st.integers(0, 5), max_size=4)


@fuzz
@given(shapes=st.lists(st.tuples(st.sampled_from(list(tensorfile.DTYPES)), SIZES), min_size=1, max_size=6))
def test_fuzz_all_valid_files_are_accepted(folder: Path, shapes: list[tuple[str, list[int]]]) -> None:
    entries: Header = {}
    end = 0
    for i, (dtype, shape) in enumerate(shapes):
        size = tensorfile.DTYPES[dtype].itemsize
        for n in shape:
            size *= n
        entries[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    items = list(entries.items())
    random.Random(end).shuffle(items)  # the order of entries in a header is arbitrary
    assert opens_or_is_refused(folder, pack(json.dumps(dict(items)).encode() + b"  ", random.Random(0).randbytes(end)))


@fuzz
@given(seed=st.integers(0, 2**32))
def test_fuzz_index(sharded: Path, seed: int) -> None:
    choose = random.Random(seed)
    files = ["one.safetensors", "two.safetensors"]
    index = {"weight_map": {"a": files[0], "b": files[0], "c": files[1], "d": files[1]}}
    for _ in range(choose.randint(1, 3)):
        index = mutate(choose, index)
        if choose.random() < 0.3 and isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
            index["weight_map"][choose.choice("abcde")] = choose.choice([*files, *OUTSIDE])
    (sharded / INDEX).write_text(json.dumps(index))
    try:
        with Checkpoint.open(sharded) as checkpoint:
            names = set(checkpoint.tensors)
    except CheckpointError as error:
        check_printable(error)
    else:
        assert set(index["weight_map"]) == names
