"""The output of a batch: every row exactly once and in order, no matter when a run is killed, for one question only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bulk.conftest import rows_of
from vlpack.bulk.output import Output
from vlpack.bulk.row import Ids, Item, short_hash
from vlpack.bulk.shards import JsonLines
from vlpack.bulk.written import ROWS
from vlpack.errors import OptionError, VlpackError

STEPPER = """
import json, os, shutil, signal, sys
from pathlib import Path
from vlpack.bulk.output import Output
from vlpack.bulk.written import ROWS
from vlpack.bulk.shards import JsonLines

os.fsync = lambda descriptor: None  # takes long, and matters only if the machine fails
place, half, retry = Path(sys.argv[1]), sys.argv[2] == "half", sys.argv[2] == "retry"
KEYS = [f"row {number}" for number in range(8)]
ADDED = place.parent / f"{place.name} added"  # ids of the rows that were added, of which no run may lose one
STEPS = ("write",) if half else ("open", "write", "fsync", "close", "replace", "unlink")

def run(failing=()):
    identity = {"package": {"name": "p", "sha256": "0" * 64}, "question": {"prompt": "?"}}
    options = {"shard_rows": 3, "retry_errors": retry and not failing}
    with Output(place, ROWS, JsonLines(), identity, {}, **options) as output:
        pending = []
        count = 0
        for key in KEYS:
            if not output.done(key):
                if not output.keep(count, key):
                    pending.append((count, key))
                count += 1
        assert not {key for _, key in pending} & set(ADDED.read_text().splitlines()), "a finished row is answered again"
        for start in range(0, len(pending), 4):  # rows are finished in another order than they are read
            for count, key in reversed(pending[start : start + 4]):
                if key in failing:
                    output.add(count, {"id": key, "answer": None, "error": "failed"})
                    continue
                output.add(count, {"id": key, "answer": key.upper(), "error": None})
                with ADDED.open("a") as file:
                    file.write(f"{key}\\n")
        if not failing:
            output.finish()

def killed(kill_at):
    count = 0
    def counted(name, call):
        def step(*arguments, **options):
            nonlocal count
            count += 1
            if count == kill_at:
                if half:
                    call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return step
    for name in STEPS:
        setattr(os, name, counted(name, getattr(os, name)))
    run()

def child(kill_at):
    pid = os.fork()
    if pid == 0:
        killed(kill_at)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)

def whole_shards():
    ids = []
    for path in place.glob("part-*"):
        for line in path.read_bytes().splitlines(keepends=True):
            ids.append(json.loads(line)["id"])
            assert line.endswith(b"\\n")
    assert len(ids) == len(set(ids))
    assert set(ids) >= set(KEYS[:6] if retry else ())  # failed rows stay until they are replaced

found = []
for kill_at in range(1, 1000):
    shutil.rmtree(place, ignore_errors=True)
    ADDED.write_text("")
    if retry:  # two shards, and a journal, with rows that failed
        run([KEYS[1], KEYS[2], KEYS[5], KEYS[7]])
    ended = not child(kill_at)
    if not ended:
        whole_shards()
        child(1 + kill_at % 7)  # the next run is killed soon, too
        whole_shards()
    run()
    rows = [json.loads(line) for path in sorted(place.glob("part-*")) for line in path.open()]
    names = sorted(path.name for path in place.iterdir() if not path.name.startswith("part-"))
    found.append([[row["id"] for row in rows], [row["answer"] for row in rows], names])
    if ended:
        break
print(json.dumps({"steps": len(found), "expected": KEYS, "found": found}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("write", ["whole", "half", "retry"])
def test_a_run_killed_before_each_of_its_steps(write: str, tmp_path: Path) -> None:
    """Two runs are killed, the first before each of its steps or within each write; the third completes the output.

    With ``retry``, they answer rows again that failed in a run before.
    """
    command = [sys.executable, "-c", STEPPER, str(tmp_path / "out"), write]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["steps"] > (10 if write == "half" else 40)
    for ids, answers, names in told["found"]:
        assert ids == told["expected"]
        assert answers == [key.upper() for key in told["expected"]]
        assert names == [".lock", "manifest.json"]


def identity(sha256: str = "0" * 64, **question: Any) -> dict[str, Any]:
    return {"package": {"name": "p", "sha256": sha256}, "question": question or {"prompt": "?"}}


@contextmanager
def opened(folder: Path, given: dict[str, Any] | None = None, **options: Any) -> Iterator[Output]:
    with Output(folder, ROWS, JsonLines(), given or identity(), {"by": "test"}, **options) as output:
        yield output


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """The rows of the shards of an output that is not complete."""
    return [json.loads(line) for path in sorted(folder.glob("part-*")) for line in path.read_text().splitlines()]


def row(key: str, error: str | None = None) -> dict[str, Any]:
    return {"id": key, "answer": None if error else "yes", "error": error}


def test_shards_have_the_rows_in_the_order_of_the_input(tmp_path: Path) -> None:
    with opened(tmp_path / "out", shard_rows=2) as output:
        for place in (1, 2, 4, 0, 3):
            output.add(place, row(f"{place}"))
            waits = {1: 0, 2: 0, 4: 0, 0: 1, 3: 2}[place]
            assert len(list((tmp_path / "out").glob("part-*"))) == waits
        output.finish()
    assert [one["id"] for one in rows_of(tmp_path / "out")] == ["0", "1", "2", "3", "4"]
    assert [path.name for path in sorted((tmp_path / "out").glob("part*"))] == [f"part-{n:05}.jsonl" for n in range(3)]


def test_rows_after_one_without_an_answer_are_in_order(tmp_path: Path) -> None:
    """A run that stops early, because too many rows failed, may have no answer to an early row."""
    with opened(tmp_path / "out") as output:
        for place in (3, 1, 2):
            output.add(place, row(f"{place}"))
        output.finish()
    assert [one["id"] for one in rows_of(tmp_path / "out")] == ["1", "2", "3"]


def test_rows_that_the_input_no_longer_has_are_not_lost(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as output:
        output.add(0, row("old"))
    with opened(tmp_path / "out") as output:
        assert not output.done("old")
        output.add(0, row("new"))
        output.finish()
    assert sorted(one["id"] for one in rows_of(tmp_path / "out")) == ["new", "old"]


def test_an_output_belongs_to_one_package_and_question(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as output:
        output.add(0, row("a"))
    for given, said in (
        (identity("1" * 64), "answers of another package"),
        (identity(prompt="!"), r"prompt was '\?', and is '!' now"),
        (identity(prompt="?", max_tokens=3), "max_tokens was not given, and is 3 now"),
    ):
        with pytest.raises(OptionError, match=said), opened(tmp_path / "out", given):
            pass
    with opened(tmp_path / "out") as output:
        assert output.rows == 1
    runs = json.loads((tmp_path / "out" / "manifest.json").read_text())["runs"]
    assert runs == [{"by": "test"}] * 2


def test_an_output_without_rows_takes_another_question(tmp_path: Path) -> None:
    """Options may change after a first run that failed because of one of them, before it answered a row."""
    with opened(tmp_path / "out"):
        pass
    with opened(tmp_path / "out", identity(prompt="!")) as output:
        output.add(0, row("a"))
        output.finish()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["question"] == {"prompt": "!"}


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "out"),
        pytest.raises(OptionError, match="Another run of vlpack batch writes"),
        opened(tmp_path / "out"),
    ):
        pass
    with opened(tmp_path / "out") as output:  # the lock was released
        output.add(0, row("a"))
    with pytest.raises(OptionError, match="answers to another question") as kept:
        opened(tmp_path / "out", identity(prompt="!")).__enter__()
    with opened(tmp_path / "out"):  # also while a notebook keeps the error
        assert kept.value is not None


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(OptionError, match=r"not an output of vlpack batch: it contains 'thesis\.txt'"):
        opened(tmp_path / "out").__enter__()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    with pytest.raises(OptionError, match="the output is a folder of files"):
        opened(tmp_path / "out.jsonl").__enter__()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match="is not a folder"):
        opened(tmp_path / "file").__enter__()


def test_rows_that_failed_are_answered_again_if_asked_for(tmp_path: Path) -> None:
    with opened(tmp_path / "out", shard_rows=2) as output:
        for place, key in enumerate("abcde"):
            output.add(place, row(key, "damaged" if key in "bcde" else None))
    with opened(tmp_path / "out", shard_rows=2) as output:  # without the option they stay
        assert (output.rows, output.errors) == (5, 4)
    with opened(tmp_path / "out", shard_rows=2, retry_errors=True) as output:
        assert (output.rows, output.errors) == (1, 0)
        assert output.done("a")
        for place, key in enumerate("bcde"):
            assert not output.done(key)
            assert not output.keep(place, key)
            output.add(place, row(key))
        output.finish()
    assert [one["id"] for one in rows_of(tmp_path / "out")] == list("abcde")
    assert all(one["error"] is None for one in rows_of(tmp_path / "out"))


def test_only_rows_that_come_are_retried(tmp_path: Path) -> None:
    """Failed rows that a limited or interrupted run does not answer again stay; others change places with answers."""
    with opened(tmp_path / "out", shard_rows=2) as output:
        for place, key in enumerate("abcdef"):
            output.add(place, row(key, "damaged" if key in "bcef" else None))
    assert [name.name for name in sorted((tmp_path / "out").glob("part-*"))] == [
        f"part-0000{n}.jsonl" for n in range(3)
    ]
    with opened(tmp_path / "out", retry_errors=True) as output:  # it is killed after it has answered one row
        assert (output.rows, output.errors) == (2, 0)
        assert output.done("a")
        assert not output.done("b")
        output.add(0, row("b"))
        assert not output.done("c")
    assert [one["error"] is None for one in rows_in(tmp_path / "out")] == [True, False, False, True, False, False]
    with opened(tmp_path / "out", retry_errors=True) as output:  # a limited run, of which one row fails again
        assert (output.rows, output.errors) == (3, 0)
        assert output.done("b")
        assert not output.done("c")
        output.add(0, row("c", "still damaged"))
        assert (output.rows, output.errors) == (4, 1)
        output.finish()
        assert (output.rows, output.errors) == (6, 3)
    found = rows_of(tmp_path / "out")
    assert [one["id"] for one in found] == list("abcdef")
    assert [one["error"] for one in found] == [None, None, "still damaged", None, "damaged", "damaged"]
    with opened(tmp_path / "out", retry_errors=True, shard_rows=1) as output:
        output.add(0, row("e"))
        output.add(1, row("new"))
    with opened(tmp_path / "out") as output:  # without the option, rows that were answered are still exchanged
        assert (output.rows, output.errors) == (7, 2)
        output.finish()
    found = rows_of(tmp_path / "out")
    assert [one["id"] for one in found] == [*"abcdef", "new"]
    assert [one["error"] is None for one in found] == [True, True, False, True, True, False, True]


def test_failed_rows_in_the_journal_are_kept_until_they_are_answered(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as output:
        output.add(0, row("a", "damaged"))
        output.add(1, row("b", "damaged"))
    with opened(tmp_path / "out", retry_errors=True) as output:
        assert not output.keep(0, "a")
        output.add(0, row("a"))
    with opened(tmp_path / "out", retry_errors=True) as output:
        assert output.keep(0, "a")
        assert not output.keep(1, "b")
        output.finish()
        assert (output.rows, output.errors) == (2, 1)
    assert [(one["id"], one["error"]) for one in rows_of(tmp_path / "out")] == [("a", None), ("b", "damaged")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\xff",
        "[" * 100_000,
        '{"format": 1, "kind": "vlpack batch"}',
        '{"format": 1, "kind": "vlpack batch", "package": [], "question": {}, "runs": []}',
        '{"format": 1, "kind": "vlpack batch", "package": {}, "question": 3, "runs": []}',
        '{"format": 1, "kind": "vlpack batch", "package": {}, "question": {}, "runs": 5}',
        '{"format": 2, "kind": "vlpack batch", "package": {}, "question": {}, "runs": []}',
    ],
    ids=["empty", "half", "list", "bytes", "deep", "bare", "package", "question", "runs", "version"],
)
def test_a_damaged_manifest_is_a_sentence(text: str, tmp_path: Path) -> None:
    with opened(tmp_path / "out") as output:
        output.add(0, row("a"))
        output.finish()
    (tmp_path / "out" / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(OptionError, match=r"manifest\.json is damaged, or not a manifest"), opened(tmp_path / "out"):
        pass


def test_a_damaged_shard_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as output:
        output.add(0, row("a"))
        output.finish()
    (tmp_path / "out" / "part-00000.jsonl").write_text('{"id": "a"}\n{"id"')
    with pytest.raises(VlpackError, match=r"part-00000.jsonl is damaged: line 2"), opened(tmp_path / "out"):
        pass


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "out") as output:
        output.add(0, row("a"))

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(VlpackError, match="cannot be written: No space left on device"):
            output.add(1, row("b"))
        monkeypatch.undo()
    with opened(tmp_path / "out") as output:
        assert output.keep(0, "a")
        output.finish()
    assert [one["id"] for one in rows_of(tmp_path / "out")] == ["a"]


def test_odd_texts_and_values(tmp_path: Path) -> None:
    """With half a surrogate pair, line separators, bytes and NaN, every line is valid JSON, and ids are found again."""
    odd = "\ud800 \u2028 \x00 ü"
    ours = [{"$vlpack.bytes": "eA=="}, {"$vlpack.bytes": 5}, {"$vlpack.object": {"$vlpack.bytes": "eA=="}}]
    with opened(tmp_path / "out") as output:
        given = {"bytes": b"\xff", "nan": float("nan"), "list": [1, {"a": b"x"}], "ours": ours}
        output.add(0, {**row(odd), **given})
    with opened(tmp_path / "out") as output:
        assert output.keep(0, odd)
        output.finish()
    (found,) = rows_of(tmp_path / "out")
    assert found == {**row(odd), "bytes": None, "nan": None, "list": [1, {"a": None}], "ours": ours}
    with opened(tmp_path / "out") as output:
        assert output.done(odd)
        output.finish()


def test_many_equal_rows_have_ids_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = 0

    def counted(key: str) -> bytes:
        nonlocal hashes
        hashes += 1
        return short_hash(key)

    monkeypatch.setattr("vlpack.bulk.row.short_hash", counted)
    ids = Ids("id", {})
    first, *others = [ids(Item({"prompt": "a"}, "a line"))[0] for _ in range(300)]
    assert others == [f"{first}-{number}" for number in range(2, 301)]
    assert hashes < 4 * 300
    named = [ids(Item({"id": key}, "a line")) for key in ("b", "b-2", "b", "b")]
    assert [key for key, _ in named] == ["b", "b-2", "b-3", "b-4"]
    assert [item.error is None for _, item in named] == [True, True, False, False]
