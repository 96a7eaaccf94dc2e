"""Units, the shards that any process of a cluster may make: planning them, answering them, and what may go wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from bulk.conftest import right, rows_of, write_rows
from samples import ANSWERS, IMAGES, READ
from vlpack import Sampling
from vlpack.bulk.answering import EngineOptions, alike
from vlpack.bulk.identity import manifest_bytes
from vlpack.bulk.media import Place
from vlpack.bulk.node_package import KEPT_SECONDS, PackageFiles, copied, node_package
from vlpack.bulk.plan import Unit, index_of, plan
from vlpack.bulk.question import Question
from vlpack.bulk.row import Ids, Item, Task
from vlpack.bulk.shards import JsonLines
from vlpack.bulk.source import open_source
from vlpack.bulk.storage import Local
from vlpack.bulk.units import Attempts, Job, Station
from vlpack.bulk.workers import Setting
from vlpack.bulk.written import ROWS, Written
from vlpack.errors import InputError, OptionError, PackageError, VlpackError, in_python
from vlpack.package.manifest import refresh

NAMES = sorted(ANSWERS)
QUESTION = Question(prompt=READ, max_tokens=20, sampling=Sampling(temperature=0))
IDENTITY = {"package": {"name": "p", "sha256": "0" * 64}, "question": {"prompt": READ}}


def ids() -> Ids:
    return Ids("id", QUESTION.record())


def written(folder: Path, *, retry_errors: bool = False) -> Written:
    made = Written(Local(folder), ROWS, JsonLines(), IDENTITY, retry_errors=retry_errors)
    made.lock()
    made.read()
    made.begin({"run": "r"})
    made.unlock()
    return made


def planned(
    source: Path, output: Path, shard_rows: int = 3, limit: int | None = None, **options: Any
) -> tuple[list[Unit], int]:
    portions = list(open_source(str(source)).portions())
    numbering = ids()
    return plan(
        [(one, index_of(one, ids())) for one in portions], numbering, written(output, **options), shard_rows, limit
    )


def keys(units: list[Unit]) -> list[list[str]]:
    return [[task.key for task in pickle.loads(pickle.dumps(unit)).tasks(ids())] for unit in units]


def test_units_have_the_ids_of_a_run_in_one_process(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": text} for text in "abacaa"] + [{"id": "k"}, "[", {"id": 5}, {"id": "k"}, {"id": ""}]
    path = write_rows(tmp_path / "data" / "rows.jsonl", rows)
    write_rows(tmp_path / "data" / "second.jsonl", [{"prompt": "b"}, {"id": "k-2"}, {"prompt": "z"}])
    number = ids()
    expected = [number(item) for item in open_source(str(tmp_path / "data" / "*.jsonl")).items()]
    units, total = planned(tmp_path / "data" / "*.jsonl", tmp_path / "out")
    assert [key for unit in keys(units) for key in unit] == [key for key, _ in expected]
    found = [task.item for unit in units for task in unit.tasks(ids())]
    assert [str(item.error) for item in found] == [str(item.error) for _, item in expected]
    assert "An earlier row has the same id, 'k'" in str(found[9].error)
    assert [unit.shard for unit in units] == [f"part-0000{n}.jsonl" for n in range(5)]
    assert [len(unit) for unit in keys(units)] == [3, 3, 3, 3, 2]
    assert total == 14
    limited, total = planned(path, tmp_path / "out", limit=4)
    assert ([len(unit) for unit in keys(limited)], total) == ([3, 1], 4)


def test_rows_that_are_written_are_not_planned_again(tmp_path: Path) -> None:
    """Numbers of shards that a killed run has left out are used again, so that rows are in the order of the input."""
    path = write_rows(tmp_path / "rows.jsonl", [{"id": key} for key in "abcdefghij"])
    (tmp_path / "out").mkdir()
    write_rows(tmp_path / "out" / "part-00001.jsonl", [{"id": key, "error": None} for key in "def"])
    (tmp_path / "out" / "manifest.json").write_bytes(
        manifest_bytes({"layout": "rows", "shards": "jsonl", **IDENTITY}, [])
    )
    units, _ = planned(path, tmp_path / "out")
    assert keys(units) == [["a", "b", "c"], ["g", "h", "i"], ["j"]]
    assert [unit.shard[5:10] for unit in units] == ["00000", "00002", "00003"]
    shard = [{"id": key, "error": None if key in "dfhj" else "damaged"} for key in "defghij"]
    write_rows(tmp_path / "out" / "part-00001.jsonl", shard)
    units, _ = planned(path, tmp_path / "out")
    assert keys(units) == [["a", "b", "c"]]
    units, _ = planned(path, tmp_path / "out", retry_errors=True, limit=7)
    assert keys(units) == [["e", "g"], ["a", "b", "c"]]
    assert [(unit.shard[5:10], unit.repairs) for unit in units] == [("00001", True), ("00000", False)]


def test_large_rows_make_small_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlpack.bulk.plan.SHARD_BYTES", 1000)
    rows = [{"id": str(n), "prompt": "x" * size} for n, size in enumerate([10, 10, 900, 2000, 10, 10, 10, 10])]
    units, _ = planned(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert keys(units) == [["0", "1", "2"], ["3"], ["4", "5", "6"], ["7"]]


def test_a_table_with_keys_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"id": [3, 1, 2], "image": [b"x" * 100] * 3})
    parquet.write_table(table, tmp_path / "a.parquet")
    whole, _ = planned(tmp_path / "a.parquet", tmp_path / "out")
    assert keys(whole) == [["3", "1", "2"]]
    (portion,) = open_source(str(tmp_path / "a.parquet")).portions()
    monkeypatch.setattr(type(portion), "read", None)
    assert index_of(portion, ids()).names == ["3", "1", "2"]
    monkeypatch.undo()
    for column in ([3, None, 2], ["3", "", "2"]):  # rows without a key get a hash of all columns
        parquet.write_table(table.set_column(0, "id", pa.array(column)), tmp_path / "b.parquet")
        (portion,) = open_source(str(tmp_path / "b.parquet")).portions()
        names = index_of(portion, ids()).names
        assert (names[0], len(names[1]), names[2]) == ("3", 32, "2")


def test_rows_with_images_of_like_size_follow_each_other() -> None:
    """Rows are ordered among the next few only, and those with the same image follow each other."""
    sizes = [("a", 9), ("b", 1), ("a", 9), ("c", 9), ("a", 9), ("d", 1), ("e", 0)]
    tasks = [Task(n, name, Item({"image": name, "area": area}, name)) for n, (name, area) in enumerate(sizes)]
    found = [task.key for task in alike(tasks, lambda item: int(item.columns["area"]), 6)]
    assert sorted(found[:2]) == ["b", "d"]
    assert "".join(found[2:6]) in ("aaac", "caaa")
    assert found[6] == "e"


def test_an_input_that_changes_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    (unit,), _ = planned(path, tmp_path / "out")
    write_rows(path, [{"prompt": "a"}, {"prompt": "c"}])
    with pytest.raises(InputError, match="has changed since the run began"):
        unit.tasks(ids())
    write_rows(path, [{"prompt": "a"}])
    with pytest.raises(InputError, match="has changed since the run began"):
        unit.tasks(ids())


def test_attempts() -> None:
    """After two ended processes, rows are answered alone; one that ends the third is not tried again."""
    attempts = Attempts()
    assert [attempts.begin("a") for _ in range(3)] == [(False, set()), (False, set()), (True, set())]
    attempts.alone("a", "first")
    attempts.alone("a", None)
    attempts.alone("a", "second")
    assert attempts.begin("a") == (True, {"second"})
    assert attempts.begin("a") == (True, {"second"})
    attempts.alone("a", "third")
    assert attempts.begin("a") == (True, {"second", "third"})
    assert attempts.begin("b") == (False, set())
    for _ in range(5):
        attempts.begin("a")
    with pytest.raises(VlpackError, match="answered the rows of a ended 9 times"):
        attempts.begin("a")


@pytest.fixture
def job(digits: Path, tmp_path: Path) -> Job:
    question, place = QUESTION, Place(str(IMAGES))
    options = EngineOptions(slots=2, context=200, threads=1)
    setting = Setting(str(digits), "jsonl", "digits", question, place, in_python, options)
    package_hash = json.loads((digits / "vlpack.json").read_text())["sha256"]
    return Job(setting, package_hash, Local(tmp_path / "out"), "jsonl", {}, "r")


def test_a_station_writes_whole_shards(job: Job, digits: Path, tmp_path: Path) -> None:
    rows = [{"id": name, "image": name} for name in [*NAMES[:4], "missing.png"]]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    (unit,), _ = planned(path, tmp_path / "out", shard_rows=10)
    attempts = Attempts()
    station = Station(job, digits, attempts)
    done = station.answer(unit, unit.tasks(ids()))
    assert (done.rows, done.failed, done.tokens > 8, done.repaired) == (5, 1, True, [])
    first = rows_of(tmp_path / "out")
    assert [row["id"] for row in first] == [row["id"] for row in rows]
    assert right(first[:4], "image")
    (repair,), _ = planned(path, tmp_path / "out", retry_errors=True)
    assert station.answer(repair, repair.tasks(ids())).repaired == ["missing.png"]
    again = rows_of(tmp_path / "out")
    assert [row["id"] for row in again] == [row["id"] for row in rows]
    assert again[:4] == first[:4]
    # in the third attempt, rows are answered one by one, and one that ended its process before gets an error
    attempts.begin(unit.shard)
    attempts.alone(unit.shard, NAMES[1])
    station.answer(unit, unit.tasks(ids()))
    found = rows_of(tmp_path / "out")
    assert right([found[0], *found[2:4]], "image")
    assert found[1]["error"] == "The process that answered the row ended 3 times."
    # another run has begun, so nothing is written
    (tmp_path / "out" / "part-00000.jsonl").unlink()
    written(tmp_path / "out").begin({"run": "other"})
    with pytest.raises(OptionError, match="Another run of vlpack batch writes"):
        station.answer(unit, unit.tasks(ids()))
    assert rows_of(tmp_path / "out") == []
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(VlpackError, match=r"(?s)cannot be written on .*a folder that all machines share"):
        station.answer(unit, unit.tasks(ids()))


def test_machines_with_another_package(job: Job, digits: Path) -> None:
    with pytest.raises(PackageError, match="is another one than where the run began"):
        Station(job._replace(package_hash="1" * 64), digits, Attempts())


def test_a_package_that_is_sent(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the package receives it in pieces, and again only if it has changed."""
    monkeypatch.setenv("VLPACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vlpack.bulk.node_package.CHUNK", 1 << 20)
    files = PackageFiles(str(digits))
    reads: list[str] = []

    def chunks(name: str) -> Any:
        start = 0
        while part := files.read(name, start):
            reads.append(name)
            yield part
            start += len(part)

    place = copied("source", chunks)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {
        name: (digits / name).read_bytes() for name in files._names
    }
    assert max(map(reads.count, reads)) > 1
    reads.clear()
    assert copied("source", chunks) == place
    assert set(reads) == {"vlpack.json"}
    for name in ("../vlpack.json", "other"):
        with pytest.raises(FileNotFoundError):
            files.read(name, 0)


def test_a_package_that_has_changed_is_copied_again(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("VLPACK_CACHE", str(tmp_path / "cache"))
    shutil.copytree(digits, tmp_path / "package")
    first = node_package((tmp_path / "package").as_uri())
    (tmp_path / "package" / "README.md").write_text("new")
    refresh(tmp_path / "package", "README.md")
    second = node_package((tmp_path / "package").as_uri())
    assert (second / "README.md").read_text() == "new"
    assert first.exists()  # a process may have just asked for it
    os.utime(first, (time.time() - 2 * KEPT_SECONDS,) * 2)
    assert node_package((tmp_path / "package").as_uri()) == second
    assert not first.exists()
    (tmp_path / "package" / "README.md").write_text("damaged")
    shutil.rmtree(second)
    with pytest.raises(PackageError, match=r"is damaged: README\.md has 7 bytes"):
        node_package((tmp_path / "package").as_uri())
    with pytest.raises(PackageError, match="cannot be copied"):
        node_package((tmp_path / "nothing").as_uri())
