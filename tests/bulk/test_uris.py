"""Inputs and outputs at URIs: the same rows as from folders, files that appear whole, and paths that stay inside."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bulk.conftest import write_rows
from samples import ANSWERS, IMAGES
from vlpack import batch
from vlpack.bulk.folder import folder_of
from vlpack.bulk.source import open_source
from vlpack.bulk.storage import Local, Remote, without_secrets
from vlpack.errors import InputError, OptionError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
ipc = pytest.importorskip("pyarrow.ipc")

NAMES = sorted(ANSWERS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with inputs of all kinds."""
    made = tmp_path / "data"
    (made / "images" / "more" / ".hidden").mkdir(parents=True)
    for name in ("images/b.png", "images/more/a.png", "images/more/.hidden/c.png", "images/.d.png"):
        shutil.copyfile(IMAGES / "00.png", made / name)
    (made / "images" / "clip.mp4").write_bytes(b"")
    write_rows(made / "rows.jsonl", [{"id": "a", "image": "images/b.png"}, "[1", {"prompt": "x" * 3000}, "", {"n": 1}])
    table = pa.table({"id": [str(n) for n in range(100)], "n": range(100)})
    (made / "tables" / "more").mkdir(parents=True)
    parquet.write_table(table, made / "tables" / "a.parquet", row_group_size=33)
    parquet.write_table(table.slice(0, 5), made / "tables" / "more" / "b.parquet")
    (made / "saved").mkdir()
    (made / "saved" / "state.json").write_text("{}")
    with ipc.new_stream(made / "saved" / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=40)
    (made / "described").mkdir()
    write_rows(made / "described" / "metadata.jsonl", [{"file_name": "00.png"}])
    return made


@pytest.mark.parametrize("name", ["images", "rows.jsonl", "tables", "tables/a.parquet", "saved", "described"])
def test_the_same_rows_as_from_a_folder(name: str, data: Path) -> None:
    here, there = open_source(str(data / name)), open_source((data / name).as_uri())
    rows = list(here.items())
    assert [plain(item) for item in there.items()] == [plain(item) for item in rows]
    assert len(rows) == {"images": 3, "rows.jsonl": 4, "tables": 105, "described": 1}.get(name, 100)
    assert (there.name, there.types) == (here.name, here.types)
    assert there.folder == Path(here.folder).as_uri()
    for portion in there.portions():  # reading can begin at every row
        found = [(mark, plain(item)) for mark, item in portion.read()]
        for place in {0, 1, 2, 32, 33, 34, 65, 66, 67, 99} & set(range(len(found))):
            assert [(mark, plain(item)) for mark, item in portion.read(found[place][0])] == found[place:]


def plain(item: Any) -> Any:
    return item.columns, item.where, item.key, item.images, item.videos, item.error and str(item.error)


def test_pages_of_a_pdf(data: Path) -> None:
    pytest.importorskip("pypdfium2")
    from PIL import Image

    pages = [Image.new("RGB", (40, 40), color) for color in ("red", "green", "blue")]
    pages[0].save(data / "images" / "a.pdf", save_all=True, append_images=pages[1:])
    (portion,) = open_source((data / "images").as_uri()).portions()
    found = [(mark, plain(item)) for mark, item in portion.read()]
    assert [row[2] for _, row in found][:4] == ["a.pdf#page=1", "a.pdf#page=2", "a.pdf#page=3", "b.png"]
    for place, (mark, _) in enumerate(found):
        assert [(mark, plain(item)) for mark, item in portion.read(mark)] == found[place:]


def test_an_output_in_the_folder_of_the_input_is_no_input(data: Path) -> None:
    (data / "tables" / "out").mkdir()
    shutil.copyfile(data / "tables" / "a.parquet", data / "tables" / "out" / "part-00000.parquet")
    source = open_source((data / "tables").as_uri(), None, (data / "tables" / "out").as_uri() + "/")
    assert len(list(source.items())) == source.total == 105


def test_uris_that_are_refused(data: Path, digits: Path) -> None:
    for given, said in (
        ((data / "nothing").as_uri(), "There is no file or folder"),
        ((data / "*.jsonl").as_uri(), "A URI may not be a pattern"),
        ("nonsense://bucket/a", "nonsense://bucket/a cannot be opened"),
        ("https://example.org/rows.jsonl", "is a URL, which is not read"),
    ):
        with pytest.raises(InputError) as caught:
            open_source(given)
        assert said in str(caught.value)
    with pytest.raises(OptionError, match=r"is a URI, which only Ray reads and writes.\nGive ray='local'"):
        batch(digits, data, (data / "out").as_uri(), prompt="x")


def test_files_of_rows_stay_in_their_folder(data: Path) -> None:
    folder = folder_of((data / "images").as_uri())
    assert folder.read("b.png", 10**6) == folder.read("more/../b.png", 10**6) == (IMAGES / "00.png").read_bytes()
    for name, said in (
        ("../rows.jsonl", "is outside of the folder"),
        (str(data / "rows.jsonl"), "is outside of the folder"),
        ("more/../../rows.jsonl", "is outside of the folder"),
        ("a\0b", "is outside of the folder"),
        ("more", "There is no file 'more'"),
        ("nothing.png", "There is no file 'nothing.png'"),
    ):
        with pytest.raises(InputError, match=said):
            folder.read(name, 10**6)
    with pytest.raises(InputError, match="bytes; at most 10 are read"):
        folder.read("b.png", 10)


@pytest.mark.parametrize("kind", ["local", "uri"])
def test_files_appear_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is written under another name first, and a write that fails leaves the old file."""
    place = Local(tmp_path) if kind == "local" else Remote(tmp_path.as_uri())
    place.write("a.txt", b"old")
    seen: list[list[str]] = []
    if isinstance(place, Remote):
        move = place._fs.move

        class Watched:
            def __getattr__(self, name: str) -> Any:
                return getattr(fs, name)

            def move(self, *names: str) -> None:
                seen.append(sorted(path.name for path in tmp_path.iterdir()))
                assert (tmp_path / "a.txt").read_bytes() == b"old"
                move(*names)

        fs = place._fs
        monkeypatch.setattr(place, "_fs", Watched())
        place.write("a.txt", b"new")
        assert len(seen[0]) == 2
    else:
        place.write("a.txt", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    with place.open("a.txt") as file:
        assert file.read() == b"new"
    place.remove("a.txt")
    place.remove("a.txt")
    assert list(place.names()) == []


def test_passwords_are_not_shown() -> None:
    assert without_secrets("s3://key:se/cret@bucket/a?b=c@d") == "s3://key:se/cret@bucket/a?b=c@d"
    assert without_secrets("s3://key:secret@bucket/a@b?c=d@e") == "s3://bucket/a@b?c=d@e"
    assert without_secrets("folder/a:b@c") == "folder/a:b@c"
    with pytest.raises(InputError) as caught:
        open_source("nonsense://key:secret@bucket/a")
    assert "secret" not in str(caught.value)
