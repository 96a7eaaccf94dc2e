"""The command ``vlpack batch``: its output, exit codes and messages, and runs that are killed while answering."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bulk.conftest import right, rows_of, write_rows
from samples import ANSWERS, IMAGES, READ, edit_json, vlpack
from vlpack.bulk.progress import Progress
from vlpack.cli.batch import duration, line

GREEDY = ["--max-tokens", "20", "--temperature", "0", "--threads", "1"]


def test_a_folder_of_images(capsys: pytest.CaptureFixture[str], digits: Path, tmp_path: Path) -> None:
    done = vlpack(capsys, "batch", digits, IMAGES, "-o", tmp_path / "out", "--prompt", READ, *GREEDY)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"24 rows in {tmp_path / 'out'}; ")
    assert right(rows_of(tmp_path / "out"))
    done = vlpack(capsys, "batch", digits, IMAGES, "-o", tmp_path / "out", "--prompt", READ, *GREEDY)
    assert (done.code, done.out) == (0, f"24 rows (24 of them before) in {tmp_path / 'out'}.\n")


def test_json_for_scripts(capsys: pytest.CaptureFixture[str], digits: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"image": "00.png"}, {"image": "missing.png"}, {"image": "01.png"}])
    asked = ["batch", digits, path, "-o", tmp_path / "out", "--files", IMAGES, "--prompt", READ, *GREEDY]
    done = vlpack(capsys, *asked, "--json")
    assert done.code == 1
    told = json.loads(done.out)
    assert (told["rows"], told["total"], told["errors"], told["failed"], told["stopped"]) == (3, 3, 1, 1, False)
    progress = [json.loads(text) for text in done.err.splitlines()]
    assert progress
    assert progress[-1]["total"] == 3
    plain = vlpack(capsys, *asked)
    assert plain.code == 1
    assert "1 row failed: the column error says why. --retry-errors" in plain.out
    stopped = vlpack(capsys, *asked, "--retry-errors", "--max-errors", "0")
    assert stopped.code == 1
    assert "Stopped: more rows failed than --max-errors allows." in stopped.out
    assert len(rows_of(tmp_path / "out")) == 3


def test_messages_in_the_words_of_the_command_line(
    capsys: pytest.CaptureFixture[str], digits: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"image": "https://example.org/a.png"}, {"n": 1}])
    vlpack(capsys, "batch", digits, path, "-o", tmp_path / "out", *GREEDY, "--template", "{n}")
    first, _ = rows_of(tmp_path / "out")
    assert first["error"] == "The row has no column 'n', which --template names. It has image."
    for arguments, said in (
        ([IMAGES], "There is no question about the files.\nGive one with --prompt"),
        ([path, "--prompt", "a"], "has answers to another question: --prompt was not given, and is 'a' now"),
        ([path, "--template", "{n}", "--format", "csv"], "--format is 'csv'; it must be jsonl or parquet"),
        ([path, "--template", "{n}", "--slots", "0"], "--slots is 0"),
        ([path, "--template", "{n}", "--workers", "0"], "--workers is 0"),
        ([path, "--template", "{n}", "--shard-rows", "0"], "--shard-rows is 0"),
        ([path, "--template", "{n}", "--schema", "{"], "--schema"),
        ([path, "--template", "{n}", "--top-k", "3"], "--top-k"),
        ([path, "--template", "{n", *GREEDY], "--template has '{' at character 1"),
    ):
        done = vlpack(capsys, "batch", digits, *arguments, "-o", tmp_path / "out", *GREEDY)
        assert done.code == 2, arguments
        assert said in done.err, arguments
    done = vlpack(capsys, "batch", tmp_path / "nothing", path, "-o", tmp_path / "out", "--prompt", "a")
    assert (done.code, "There is no folder" in done.err) == (2, True)


def test_a_package_that_generates_no_text(capsys: pytest.CaptureFixture[str], digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "embedding")
    edit_json(tmp_path / "embedding" / "vlpack.json", "task", value="embedding")
    done = vlpack(capsys, "batch", tmp_path / "embedding", IMAGES, "-o", tmp_path / "out", "--prompt", READ)
    assert done.code == 2
    assert "is for the task embedding and generates no text" in done.err
    assert not (tmp_path / "out").exists()


def test_progress_on_one_line() -> None:
    progress = Progress(10, 100, 8, 2, 60.0, 8.04, 20.06, 5400.0)
    assert line(progress) == "10 of 100 rows, 8.0 a minute, 20.1 tokens/s, 1 h 30 min left, 2 errors"
    assert line(Progress(1, None, 1, 1)) == "1 rows, 0.0 a minute, 0.0 tokens/s, 1 error"
    assert [duration(seconds) for seconds in (4, 61, 3600)] == ["4 s", "1 min 01 s", "1 h 00 min"]


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_run_that_is_killed_twice_and_interrupted_once(digits: Path, tmp_path: Path) -> None:
    """A run is ended by kill -9 after some rows, the next one by Control-C; the third run completes the output."""
    names = sorted(ANSWERS)
    rows = [{"id": f"r{number}", "image": names[number % 24]} for number in range(60)]
    write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    command: list[Any] = [sys.executable, "-m", "vlpack", "batch", digits, tmp_path / "rows.jsonl", "-o", out]
    command += ["--files", IMAGES, "--prompt", READ, "--shard-rows", "7", "--slots", "2", *GREEDY]
    for number, least in ((signal.SIGKILL, 5), (signal.SIGKILL, 20), (signal.SIGINT, 35)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            end = time.monotonic() + 60
            while written(out) < least:
                assert running.poll() is None, running.stderr
                assert time.monotonic() < end
                time.sleep(0.002)
            os.kill(running.pid, number)
            _, said = running.communicate(timeout=60)
        assert running.returncode == (-9 if number == signal.SIGKILL else 130)
        assert said == ("" if number == signal.SIGKILL else "error: Interrupted.\n")
        kept = written(out)
        assert least <= kept < 60
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=120)
    told = json.loads(done.stdout)
    assert told["before"] >= kept
    assert told["answered"] == 60 - told["before"] > 0
    found = rows_of(out)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert right(found, "image")


def written(out: Path) -> int:
    """The number of rows in the shards and the journal of an output, each counted once."""
    ids = set()
    for path in [*out.glob("part-*"), *out.glob(".journal")]:
        for text in path.read_text().split("\n")[:-1]:
            ids.add(json.loads(text)["id"])
    return len(ids)
