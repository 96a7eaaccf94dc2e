"""Tables as inputs and outputs: Parquet with image bytes and paths, and data sets of Hugging Face."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bulk.conftest import right, rows_of, write_rows
from samples import ANSWERS, IMAGES, READ
from vlpack.bulk import BatchResult
from vlpack.errors import InputError, OptionError

pa = pytest.importorskip("pyarrow")
from pyarrow import ipc, parquet  # noqa: E402

Ask = Callable[..., BatchResult]
NAMES = sorted(ANSWERS)


def table(names: list[str], **columns: list[Any]) -> Any:
    images = [{"bytes": (IMAGES / name).read_bytes(), "path": name} for name in names]
    return pa.table({"image": images, "name": names, **columns})


def parts(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def test_parquet_to_parquet(ask: Ask, tmp_path: Path) -> None:
    """Images may be bytes; columns keep their values and types, even in shards where all values are null."""
    when = datetime.datetime(2026, 11, 28, 12, 30)
    given = table(NAMES, n=pa.array(range(24), pa.int16()), when=[when] * 24, empty=pa.array([None] * 24, pa.float32()))
    parquet.write_table(given, tmp_path / "in.parquet", row_group_size=5)
    result = ask(tmp_path / "in.parquet", prompt=READ, format="parquet", shard_rows=7)
    assert (result.rows, result.total, result.errors) == (24, 24, 0)
    rows = parts(tmp_path / "out")
    assert right(rows, "name")
    assert [row["image"] for row in rows] == given["image"].to_pylist()
    assert [row["n"] for row in rows] == list(range(24))
    assert {row["when"] for row in rows} == {"2026-11-28T12:30:00"}
    schemas = {str(parquet.read_schema(path)) for path in (tmp_path / "out").glob("*.parquet")}
    assert len(schemas) == 1
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 4
    assert parquet.read_schema(tmp_path / "out" / "part-00000.parquet").field("n").type == pa.int16()
    again = ask(tmp_path / "in.parquet", prompt=READ, format="parquet", shard_rows=7)
    assert (again.answered, again.before) == (0, 24)
    with pytest.raises(OptionError, match=r"format of .* is parquet, not jsonl"):
        ask(tmp_path / "in.parquet", prompt=READ)
    (tmp_path / "out" / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(Exception, match=r"part-00001.parquet is damaged"):
        ask(tmp_path / "in.parquet", prompt=READ, format="parquet")


def test_an_interrupted_run_keeps_bytes(ask: Ask, tmp_path: Path) -> None:
    """Rows that were in the journal have the bytes of their images in a shard."""
    parquet.write_table(table(NAMES[:6]), tmp_path / "in.parquet")

    class StoppedError(Exception):
        pass

    def stop(progress: Any) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        ask(tmp_path / "in.parquet", prompt=READ, format="parquet", progress=stop)
    assert (tmp_path / "out" / ".journal").stat().st_size > 0
    result = ask(tmp_path / "in.parquet", prompt=READ, format="parquet")
    assert result.before > 0
    assert result.answered == 6 - result.before
    rows = parts(tmp_path / "out")
    assert [row["image"]["bytes"] for row in rows] == [(IMAGES / name).read_bytes() for name in NAMES[:6]]


def test_parquet_to_json_lines(ask: Ask, tmp_path: Path) -> None:
    """In JSON lines, bytes are left out; paths of images are relative to the table; the image column may be chosen."""
    given = pa.table({"image": [None, None], "page": ["00.png", "missing.png"], "id": [5, 6]})
    for name in ("00.png",):
        (tmp_path / name).write_bytes((IMAGES / name).read_bytes())
    parquet.write_table(given, tmp_path / "in.parquet")
    ask(tmp_path / "in.parquet", prompt=READ, image_column="page")
    first, second = rows_of(tmp_path / "out")
    assert right([first], "page")
    assert (first["id"], first["input_id"]) == ("5", 5)
    assert "There is no file 'missing.png'" in second["error"]
    parquet.write_table(table(NAMES[:1]), tmp_path / "bytes.parquet")
    ask(tmp_path / "bytes.parquet", "bytes", prompt=READ)
    assert rows_of(tmp_path / "bytes")[0]["image"] == {"bytes": None, "path": "00.png"}
    ask(tmp_path / "bytes.parquet", "column", prompt=READ, image_column="picture")
    assert "has no column 'picture', which image_column names" in rows_of(tmp_path / "column")[0]["error"]


def test_json_lines_to_parquet(ask: Ask, tmp_path: Path) -> None:
    rows = [{"image": "00.png", "mixed": 1, "deep": {"a": [1]}}, {"image": "01.png", "mixed": "b", "deep": None}]
    ask(write_rows(tmp_path / "rows.jsonl", rows), prompt=READ, files=IMAGES, format="parquet")
    found = parts(tmp_path / "out")
    assert right(found, "image")
    assert [row["mixed"] for row in found] == ["1", "b"]
    assert [row["deep"] for row in found] == [{"a": [1]}, None]


def test_data_sets_of_hugging_face(ask: Ask, tmp_path: Path) -> None:
    """Data sets may be folders with Parquet files, from ``save_to_disk``, or with images and metadata.jsonl."""
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    for number in range(2):
        parquet.write_table(table(NAMES[number : number + 1]), data / f"train-0000{number}-of-00002.parquet")
    ask(tmp_path / "hub", "hub_out", prompt=READ)
    assert [row["name"] for row in rows_of(tmp_path / "hub_out")] == NAMES[:2]
    parquet.write_table(table(NAMES[:1]), data / "test-00000-of-00001.parquet")
    with pytest.raises(OptionError, match="several splits: test, train"):
        ask(tmp_path / "hub", "x", prompt=READ)
    ask(data / "train*.parquet", "hub_pattern", prompt=READ)
    assert right(rows_of(tmp_path / "hub_pattern"), "name")

    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text("{}")
    given = table(NAMES[:3])
    with ipc.new_stream(saved / "data-00000-of-00001.arrow", given.schema) as stream:
        stream.write_table(given)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    ask(saved, "saved_out", prompt=READ)
    assert [row["name"] for row in rows_of(tmp_path / "saved_out")] == NAMES[:3]
    assert right(rows_of(tmp_path / "saved_out"), "name")
    with pytest.raises(OptionError, match="several splits: train"):
        ask(tmp_path / "saved", "x", prompt=READ)

    folder = tmp_path / "imagefolder"
    folder.mkdir()
    (folder / "00.png").write_bytes((IMAGES / "00.png").read_bytes())
    write_rows(folder / "metadata.jsonl", [{"file_name": "00.png", "text": "a"}])
    ask(folder, "imagefolder_out", prompt=READ)
    assert right(rows_of(tmp_path / "imagefolder_out"), "file_name")


def test_a_damaged_table(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InputError, match=r"a.parquet cannot be read"):
        ask(tmp_path / "a.parquet", prompt=READ)


def test_without_pyarrow(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(table(NAMES[:1]), tmp_path / "in.parquet")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"in.parquet needs pyarrow.*\n.*pip install 'vlpack\[batch\]'"):
        ask(tmp_path / "in.parquet", prompt=READ)
    with pytest.raises(OptionError, match="format='parquet' needs pyarrow"):
        ask(IMAGES, prompt=READ, format="parquet")


def test_messages_in_parquet(ask: Ask, tmp_path: Path) -> None:
    """In Parquet, every part of a message has all keys, most of them null."""
    part = [{"type": "image", "image": "00.png"}, {"type": "text", "text": READ}]
    given = pa.table({"messages": [[{"role": "user", "content": part}]]})
    assert given.to_pylist()[0]["messages"][0]["content"][0].keys() == {"type", "image", "text"}
    parquet.write_table(given, tmp_path / "in.parquet")
    (tmp_path / "00.png").write_bytes((IMAGES / "00.png").read_bytes())
    ask(tmp_path / "in.parquet")
    (row,) = rows_of(tmp_path / "out")
    assert row["answer"].split() == ANSWERS["00.png"]["read"].split(), row
    json.dumps(row)


def test_shards_are_one_table(ask: Ask, tmp_path: Path) -> None:
    """Columns of the answer have one type, also in shards in which all of them are null, or no row failed."""
    rows = [{"prompt": "a", "id": "good"}, {"image": "missing.png", "prompt": "a", "id": "bad"}]
    ask(write_rows(tmp_path / "in.jsonl", rows), format="parquet", shard_rows=1)
    whole = parquet.read_table(sorted((tmp_path / "out").glob("*.parquet"))).to_pylist()
    assert [(row["id"], row["error"] is None, row["answer_tokens"] is None) for row in whole] == [
        ("good", True, False),
        ("bad", False, True),
    ]


def test_values_that_parquet_does_not_have(ask: Ask, tmp_path: Path) -> None:
    """Empty objects and halves of surrogate pairs end no run, and such rows are known again."""
    rows = [{"prompt": "a", "id": "x\ud800", "empty": {}, "list": [{}], "half\udfff": "b\ud801", "in": {"a": "\ud802"}}]
    ask(write_rows(tmp_path / "in.jsonl", rows), format="parquet")
    (row,) = parquet.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    assert row["error"] is None
    assert (row["id"], row["empty"], row["list"]) == ("x\\ud800", "{}", "[{}]")
    assert (row["half\\udfff"], json.loads(row["in"])) == ("b\\ud801", {"a": "\ud802"})
    assert ask(tmp_path / "in.jsonl", format="parquet").answered == 0


def test_an_output_in_the_folder_of_the_input_is_no_input(ask: Ask, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    parquet.write_table(pa.table({"id": ["a", "b"], "prompt": ["a", "b"]}), data / "in.parquet")
    ask(data, "data/out", format="parquet", limit=1)
    result = ask(data, "data/out", format="parquet")
    assert (result.rows, result.total, result.before) == (2, 2, 1)
    write_rows(data / "lines" / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    ask(f"{data}/**/*.jsonl", "data/lines/out", limit=1)
    result = ask(f"{data}/**/*.jsonl", "data/lines/out")
    assert (result.rows, result.total, result.before) == (2, 2, 1)
