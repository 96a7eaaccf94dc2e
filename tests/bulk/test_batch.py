"""Batches over files and rows: answers, ids, templates, errors, and the limits on what rows may name."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bulk.conftest import right, rows_of, write_rows
from samples import ANSWERS, COUNT, IMAGES, READ
from vlpack import Sampling
from vlpack.bulk import BatchResult
from vlpack.bulk.progress import Progress
from vlpack.errors import InputError, OptionError
from vlpack.runtime.model import Model

Ask = Callable[..., BatchResult]


def test_a_folder_gives_the_answers_of_one_question_after_the_other(ask: Ask, digits: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = ask(IMAGES, prompt=READ, progress=lambda progress: seen.append(Progress(**vars_of(progress))))
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == [row["file"] for row in rows] == sorted(ANSWERS)
    model = Model(digits, threads=1)
    for row in rows:
        alone = model.generate(READ, [IMAGES / row["file"]], max_tokens=20, sampling=Sampling(temperature=0))
        assert (row["answer"], row["finish_reason"]) == (alone.text, alone.finish_reason)
        assert (row["prompt_tokens"], row["answer_tokens"]) == (alone.stats.prompt_tokens, len(alone.tokens))
        assert row["image_tokens"] == alone.stats.image_tokens > 0
        assert row["error"] is None
        assert row["decode_seconds"] > 0
    assert (result.rows, result.total, result.answered, result.errors, result.before) == (24, 24, 24, 0, 0)
    assert result.rows_per_minute > 0
    assert result.tokens_per_second > 0
    assert seen[-1].rows == 24
    assert seen[-1].seconds_left == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["package"]["sha256"] == json.loads((digits / "vlpack.json").read_text())["sha256"]
    assert manifest["question"] == {"prompt": READ, "max_tokens": 20, "temperature": 0, "special_tokens": "control"}
    again = ask(IMAGES, prompt=READ)
    assert (again.answered, again.before, again.load_seconds) == (0, 24, 0)
    assert rows_of(tmp_path / "out") == rows


def vars_of(progress: Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in Progress.__dataclass_fields__}


def test_rows_in_all_forms(ask: Ask, tmp_path: Path) -> None:
    """Rows may give paths, data: URIs, base64, several images, messages, or text alone; their columns are kept."""
    data = tmp_path / "data"
    shutil.copytree(IMAGES, data / "images")
    encoded = base64.b64encode((IMAGES / "03.png").read_bytes()).decode()
    part = {"type": "text", "text": READ}
    rows: list[dict[str, Any]] = [
        {"image": "images/00.png", "prompt": READ, "label": {"of": ["x", 1.5, None, True]}},
        {"image": str(data / "images" / "01.png"), "prompt": READ},  # an absolute path inside of the folder
        {"images": ["images/02.png"], "prompt": READ},
        {"image": f"data:image/png;base64,{encoded}", "prompt": READ},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "images/04.png"}, part]}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, part]}], "image": "images/05.png"},
        {"messages": [{"role": "user", "content": [{"type": "image", "base64": encoded}, part]}]},
        {"image": {"path": "images/07.png", "bytes": None}, "prompt": READ},
        {"image": base64.b64encode((IMAGES / "08.png").read_bytes() + bytes(2000)).decode(), "prompt": READ},
        {"prompt": "Hello"},
    ]
    result = ask(write_rows(data / "rows.jsonl", rows))
    found = rows_of(tmp_path / "out")
    assert result.errors == 0
    for number, name in enumerate(["00", "01", "02", "03", "04", "05", "03", "07", "08"]):
        assert found[number]["answer"].split() == ANSWERS[f"{name}.png"]["read"].split(), number
    for given, row in zip(rows, found, strict=True):
        assert {name: row[name] for name in given} == given
    assert found[9]["image_tokens"] == 0
    assert len({row["id"] for row in found}) == 10


def test_ids_are_keys_or_hashes(ask: Ask, tmp_path: Path) -> None:
    rows: list[Any] = [
        {"id": "a", "prompt": "x"},
        {"id": 7, "prompt": "x"},
        {"prompt": "x"},
        {"prompt": "x"},
        {"id": "a", "prompt": "y"},
        {"prompt": "z"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    ask(path, max_tokens=1)
    found = rows_of(tmp_path / "out")
    ids = [row["id"] for row in found]
    assert ids[:2] == ["a", "7"]
    assert ids[3] == f"{ids[2]}-2"
    assert (found[4]["id"], found[4]["error"]) == (
        "a-2",
        "An earlier row has the same id, 'a'. Give every row its own, or choose another column with id_column.",
    )
    assert len(set(ids)) == 6
    assert all(row["error"] is None for row in found if row["id"] != "a-2")
    # the hash includes the question, and new rows are added to the old ones
    ask(path, "other", max_tokens=2)
    assert [row["id"] for row in rows_of(tmp_path / "other")][2] != ids[2]
    write_rows(path, [{"prompt": "new"}, *rows])
    assert ask(path, max_tokens=1).answered == 1
    assert sorted(row["id"] for row in rows_of(tmp_path / "out") if row["id"] not in ids) != []
    ask(path, "named", max_tokens=1, id_column="prompt")
    assert [row["id"] for row in rows_of(tmp_path / "named")] == ["new", "x", "x-2", "x-3", "x-4", "y", "z"]


def test_templates(ask: Ask, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "00.png", "what": "digits", "n": 3},
        {"image": "01.png", "what": "digits"},
        {"image": "01.png", "n": 1},
        {"image": "01.png", "what": None, "n": 1},
        {"image": "01.png", "messages": [{"role": "user", "content": "x"}], "what": "y", "n": 1},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    ask(path, template="Read the {what}.{{}}{n}", files=IMAGES)
    found = rows_of(tmp_path / "out")
    assert [row["error"] is None for row in found] == [True, False, False, False, False]
    assert found[1]["error"] == "The row has no column 'n', which template names. It has image, what."
    assert "no text in the column 'what'" in found[3]["error"]
    assert "has messages, so template cannot be used" in found[4]["error"]
    ask(
        write_rows(tmp_path / "one.jsonl", [{"image": "00.png", "what": "digits"}]),
        "a",
        template="Read the {what}.",
        files=IMAGES,
    )
    assert right(rows_of(tmp_path / "a"), "image")
    for template, said in (
        ("Read {", "has '{' at character 6"),
        ("Read {}", "has '{}' at character 6"),
        ("Read }", "has '}' at character 6"),
        ("Read it.", "names no column"),
        (" ", "is empty"),
    ):
        with pytest.raises(OptionError, match=said):
            ask(path, "b", template=template)
    with pytest.raises(OptionError, match="both given"):
        ask(path, "b", template="{a}", prompt="b")
    assert not (tmp_path / "b").exists()


def test_an_own_prompt_comes_before_the_common_one(ask: Ask, tmp_path: Path) -> None:
    rows = [{"image": "00.png"}, {"image": "00.png", "prompt": COUNT}]
    ask(write_rows(tmp_path / "rows.jsonl", rows), prompt=READ, files=IMAGES)
    first, second = rows_of(tmp_path / "out")
    assert first["answer"].split() == ANSWERS["00.png"]["read"].split()
    assert second["answer"].split() == ANSWERS["00.png"]["count"].split()


@pytest.mark.filterwarnings("ignore:Image size")
def test_bad_rows_become_rows_with_an_error(ask: Ask, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "damaged.png").write_bytes((IMAGES / "00.png").read_bytes()[:60])
    (data / "text.png").write_text("no image")
    Image.new("1", (10_000, 10_000)).save(data / "large.png")
    (data / "folder.png").mkdir()
    rows: list[Any] = [
        {"image": "damaged.png"},
        {"image": "text.png"},
        {"image": "large.png"},
        {"image": "folder.png"},
        {"image": "missing.png"},
        {"image": "https://example.org/a.png"},
        {"image": "file:///etc/passwd"},
        {"image": 5},
        {"image": "a\x00b"},
        {"image": "x" * 600},
        {"prompt": ["a"]},
        {"prompt": "word " * 300},
        {"messages": []},
        {"messages": "["},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"prompt": "<|image_pad|>"},
        {"image": "missing.png", "images": ["missing.png"]},
        {"video": "missing.mp4"},
        '{"prompt": ',
        '{"prompt": NaN}',
        "[1]",
        "[" * 100_000,
        f'{{"prompt": "Hello", "deep": {"[" * 900}{"]" * 900}}}',
        '{"prompt": "Hello \\ud800"}',
        {"id": "good", "prompt": "Hello"},
    ]
    result = ask(write_rows(data / "rows.jsonl", rows), prompt=READ)
    found = rows_of(tmp_path / "out")
    said = {number: row["error"] for number, row in enumerate(found)}
    for number, part in enumerate(
        [
            "damaged or truncated",
            "not an image",
            "at most 64000000 are decoded",
            "not a regular file",
            "There is no file 'missing.png'",
            "https://example.org/a.png is not downloaded. allow_urls=True allows",
            "is not a file, an http(s) URL or a data: URI",
            "must be a path, a URL or a data: URI, not int",
            "cannot be read",
            "cannot be read",
            "must be a text that is not empty",
            "a slot of this engine has room for 200",
            "There are no messages",
            "a text that is not JSON",
            "have 1 image parts without a source",
            "placeholders",
            "has both 'image' and 'images'",
            "There is no file 'missing.mp4'",
            "line 19 is not JSON",
            "line 20 is not JSON: NaN is not a JSON number",
            "line 21 is no JSON object",
            "line 22 is nested too deeply",
            "line 23 is nested too deeply",
        ]
    ):
        assert part in (said[number] or ""), (number, said[number])
    assert said[24] is None
    assert all(row["answer"] is None for row in found[:23])
    assert result.errors == result.failed == sum(error is not None for error in said.values())
    assert len(found) == len(rows)


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="links")
def test_paths_never_lead_out_of_the_folder(ask: Ask, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copyfile(IMAGES / "00.png", tmp_path / "secret.png")
    shutil.copyfile(IMAGES / "00.png", data / "mine.png")
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "up").symlink_to(tmp_path)
    (data / "inside.png").symlink_to(data / "mine.png")
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "up/secret.png", "../absent.png", "inside.png"]
    ask(write_rows(data / "rows.jsonl", [{"image": name} for name in names]), prompt=READ)
    found = rows_of(tmp_path / "out")
    assert [row["error"] is None for row in found] == [False] * 5 + [True]
    assert all("is outside of the folder" in row["error"] for row in found[:5])
    ask(data, "folder", prompt=READ)  # links that lead out of a folder of images are errors, too
    by_name = {row["file"]: row for row in rows_of(tmp_path / "folder")}
    assert set(by_name) == {"inside.png", "link.png", "mine.png"}
    assert "is outside of the folder" in by_name["link.png"]["error"]
    # with the parent folder as the folder of files, they may be read
    ask(data / "rows.jsonl", "above", prompt=READ, files=tmp_path)
    assert rows_of(tmp_path / "above")[1]["error"] is None


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_a_snapshot_in_the_cache_of_hugging_face(ask: Ask, tmp_path: Path) -> None:
    """Files of the Hub's cache are links to blobs of the same repository; other links may not leave their folder."""
    for repository, good in (("datasets--org--name", True), ("data", False)):
        snapshot = tmp_path / repository / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (tmp_path / repository / "blobs").mkdir()
        shutil.copyfile(IMAGES / "00.png", tmp_path / repository / "blobs" / "abc")
        (snapshot / "00.png").symlink_to("../../blobs/abc")
        ask(snapshot, repository + "-out", prompt=READ)
        (row,) = rows_of(tmp_path / f"{repository}-out")
        assert (row["error"] is None) == good


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server on this machine with the shipped images."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(IMAGES))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_urls_are_downloaded_only_if_allowed(ask: Ask, server: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"image": f"{server}/00.png"}])
    for output, options, said in (
        ("never", {}, "is not downloaded"),
        ("public", {"allow_urls": True}, "which is not public"),
        ("private", {"allow_urls": True, "allow_private_urls": True}, None),
    ):
        ask(path, output, prompt=READ, **options)
        (row,) = rows_of(tmp_path / output)
        assert (row["error"] is None) if said is None else (said in row["error"])
    assert right([row], "image")
    with pytest.raises(OptionError, match="no effect without allow_urls"):
        ask(path, "x", prompt=READ, allow_private_urls=True)


def test_constrained_answers(ask: Ask, tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    path = write_rows(tmp_path / "rows.jsonl", [{"image": "00.png"}, {"image": "01.png"}])
    ask(path, prompt=COUNT, files=IMAGES, schema=schema, max_tokens=40)
    for row in rows_of(tmp_path / "out"):
        if row["error"] is None:
            assert type(json.loads(row["answer"])["n"]) is int
        else:
            assert row["finish_reason"] == "length"
    ask(path, "cut", prompt=COUNT, files=IMAGES, schema=schema, max_tokens=2)
    assert all("was cut off after 2 tokens" in row["error"] for row in rows_of(tmp_path / "cut"))
    ask(path, "choice", prompt=COUNT, files=IMAGES, choices=["7", "8"])
    assert {row["answer"] for row in rows_of(tmp_path / "choice")} <= {"7", "8"}
    assert all(row["error"] is None for row in rows_of(tmp_path / "choice"))
    ask(path, "short", prompt=COUNT, files=IMAGES, choices=["seven digits here", "eight digits here"], max_tokens=1)
    assert all(
        "cut off after 1 tokens, so it may be no whole choice" in row["error"] for row in rows_of(tmp_path / "short")
    )
    ask(path, "pattern", prompt=COUNT, files=IMAGES, regex="[a-z]{3,9}", max_tokens=1)
    assert all("so it may not match regex as a whole" in row["error"] for row in rows_of(tmp_path / "pattern"))
    ask(path, "whole", prompt=COUNT, files=IMAGES, regex="[0-9]", max_tokens=1)
    assert all(row["error"] is None for row in rows_of(tmp_path / "whole"))
    with pytest.raises(OptionError, match="schema and regex are both given"):
        ask(path, "x", prompt=COUNT, files=IMAGES, schema=schema, regex="a")
    assert not (tmp_path / "x").exists()


def test_it_stops_when_too_many_rows_fail(ask: Ask, tmp_path: Path) -> None:
    rows = [{"id": str(number), "image": "00.png" if number % 2 else "missing.png"} for number in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    result = ask(path, prompt=READ, files=IMAGES, max_errors=3, slots=2)
    assert result.stopped
    assert result.failed == 4
    assert len(rows_of(tmp_path / "out")) == result.rows < 60
    result = ask(path, prompt=READ, files=IMAGES, slots=2)
    assert not result.stopped
    assert sorted(int(row["id"]) for row in rows_of(tmp_path / "out")) == list(range(60))
    assert result.errors == 30


def test_limit_and_columns_with_our_names(ask: Ask, tmp_path: Path) -> None:
    rows = [{"key": str(n), "id": n, "answer": "truth", "error": 1, "prompt": "Hello"} for n in range(5)]
    result = ask(write_rows(tmp_path / "rows.jsonl", rows), limit=2, id_column="key")
    found = rows_of(tmp_path / "out")
    assert (result.rows, result.total) == (2, 2)
    assert [row["id"] for row in found] == ["0", "1"]
    assert [(row["input_id"], row["input_answer"], row["input_error"], row["key"]) for row in found] == [
        (0, "truth", 1, "0"),
        (1, "truth", 1, "1"),
    ]
    assert ask(tmp_path / "rows.jsonl", limit=4, id_column="key").answered == 2


def test_inputs_that_are_refused(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "a.csv").write_text("a,b")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}])
    shutil.copyfile(IMAGES / "00.png", tmp_path / "rows.png")
    refused: list[tuple[str, type[Exception], str]] = [
        ("missing", InputError, "There is no file or folder"),
        ("empty", InputError, "has no images, videos or PDFs"),
        ("empty.jsonl", InputError, "has no rows"),
        ("a.csv", InputError, "its ending is .csv"),
        ("no*.png", InputError, "No file matches"),
        ("rows*", OptionError, "files of different kinds"),
    ]
    for name, error, said in refused:
        with pytest.raises(error, match=said):
            ask(tmp_path / name, prompt=READ)
    with pytest.raises(InputError, match="is a URL"):
        ask("https://example.org/rows.jsonl", prompt=READ)
    with pytest.raises(OptionError, match="no question about the files"):
        ask(IMAGES)
    with pytest.raises(OptionError, match="files has no effect"):
        ask(IMAGES, prompt=READ, files=IMAGES)
    with pytest.raises(OptionError, match="allow_urls has no effect on a folder of files"):
        ask(IMAGES, prompt=READ, allow_urls=True)
    with pytest.raises(OptionError, match="which is not a folder"):
        ask(tmp_path / "rows.jsonl", files=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_patterns_and_folders_in_folders(ask: Ask, tmp_path: Path) -> None:
    for name in ("b/00.png", "b/c/01.png", "a/02.png", ".hidden/03.png", "a/.04.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(IMAGES / name[-6:], tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("x")
    ask(tmp_path / "in", prompt=READ)
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["a/02.png", "b/00.png", "b/c/01.png"]
    assert right(rows_of(tmp_path / "out"))
    ask(tmp_path / "in" / "b" / "**" / "*.png", "pattern", prompt=READ)
    assert [row["id"] for row in rows_of(tmp_path / "pattern")] == ["00.png", "c/01.png"]
    ask(tmp_path / "in" / "a" / "02.png", "one", prompt=READ)
    assert [row["id"] for row in rows_of(tmp_path / "one")] == ["02.png"]
