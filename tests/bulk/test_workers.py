"""Batches with several processes give the same rows, even if processes are killed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bulk.conftest import right, rows_of, write_rows
from bulk.test_command import GREEDY, written
from samples import ANSWERS, IMAGES, READ
from vlpack import Sampling
from vlpack.bulk import BatchResult
from vlpack.bulk.answering import EngineOptions
from vlpack.bulk.cluster import Cluster
from vlpack.bulk.form import Rows
from vlpack.bulk.media import Place
from vlpack.bulk.question import Question
from vlpack.bulk.row import Item, Task
from vlpack.bulk.workers import Setting, Workers
from vlpack.errors import OptionError, VlpackError, in_python

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL")

NAMES = sorted(ANSWERS)


def deadly(text: str) -> str:
    """Writes the options of an error in the parent; in a process that answers rows, ends the process."""
    if os.environ["VLPACK_TEST_PARENT"] != str(os.getpid()):
        os.kill(os.getpid(), signal.SIGKILL)
    return in_python(text)


os.environ.setdefault("VLPACK_TEST_PARENT", str(os.getpid()))  # processes that answer rows inherit it


def workers(digits: Path, words: Callable[[str], str] = in_python) -> Workers:
    question = Question(prompt=READ, max_tokens=20, sampling=Sampling(temperature=0))
    place = Place(str(IMAGES))
    options = EngineOptions(slots=2, context=200, threads=2)
    return Workers(
        Setting(str(digits), "files", "digits", question, place, words, options), 2, Rows(question, place, words)
    )


def tasks(names: list[str]) -> Any:
    items = (Item({"file": name}, name, name, images=[name]) for name in names)
    return (Task(place, item.where, item) for place, item in enumerate(items))


def test_a_batch_with_two_processes(ask: Callable[..., BatchResult], tmp_path: Path) -> None:
    rows = [{"image": name} for name in ["missing.png", *NAMES]]
    result = ask(write_rows(tmp_path / "rows.jsonl", rows), prompt=READ, files=IMAGES, workers=2, threads=2)
    assert (result.rows, result.errors) == (25, 1)
    found = rows_of(tmp_path / "out")
    assert right(found[1:], "image")
    assert "There is no file 'missing.png'" in found[0]["error"]
    with pytest.raises(OptionError, match="context is 1000000000"):
        ask(tmp_path / "rows.jsonl", "x", prompt=READ, workers=2, context=10**9)


def test_a_killed_process_costs_no_row(digits: Path) -> None:
    names = [name for _, name in zip(range(60), itertools.cycle(NAMES), strict=False)]
    with workers(digits) as running:
        found = {}
        for count, (task, row) in enumerate(running(tasks(names))):
            assert task.place not in found
            found[task.place] = row
            if count in (5, 20):
                running._workers[count % 2]._process.kill()  # type: ignore[union-attr]
    assert sorted(found) == list(range(60))
    assert right(found.values())


def test_a_row_that_ends_every_process_becomes_a_row_with_an_error(digits: Path) -> None:
    """A row that ends its process gets an error that says how; rows answered at the same time get their answers."""
    with workers(digits, deadly) as running:
        found = {task.key: row for task, row in running(tasks([*NAMES[:6], "missing.png", *NAMES[6:9]]))}
    assert len(found) == 10
    assert "A process that answers rows ended by signal 9" in found["missing.png"]["error"]
    assert right(row for key, row in found.items() if key != "missing.png")


def test_messages_stay_in_order_while_a_process_loads(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process answers a row and is killed while another one loads: the row is not answered a second time."""
    several = workers(digits)
    first, second = several._workers
    (task,) = tasks(NAMES[:1])
    sent: list[Any] = []
    monkeypatch.setattr(first, "start", lambda: several._told.put((first, "ready")))
    monkeypatch.setattr(second, "start", lambda: several._told.put((second, "ready")))
    for worker in (first, second):
        monkeypatch.setattr(worker, "_write", sent.append)
    for message in ((second, (0, {"id": "answered"})), (first, "ready"), (second, None)):
        several._told.put(message)
    second.running[0] = task
    several._ready(first)
    assert list(several(iter(()))) == [(task, {"id": "answered"})]
    assert sent == []


def test_a_cluster_that_is_too_small_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that was started for the run does not outlive its error."""
    ended: list[bool] = []
    ray = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **_: None,
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 1}}],
        shutdown=lambda: ended.append(True),
    )
    monkeypatch.setattr("vlpack.bulk.cluster.require_ray", lambda: ray)
    with pytest.raises(OptionError, match="2 actors with 1 threads do not fit"), Cluster("local") as cluster:
        cluster.threads(None, 2)
    assert ended == [True]


def test_processes_import_nothing_from_the_current_folder(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "queue.py").write_text("raise SystemExit('a file of the data set was run')\n")
    with workers(digits) as several:
        ((_, row),) = several(tasks(NAMES[:1]))
    assert row["error"] is None


def test_a_package_that_processes_cannot_load(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(VlpackError, match="no folder"), workers(tmp_path / "nothing"):
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_processes_end_with_a_killed_parent(digits: Path, tmp_path: Path) -> None:
    rows = [{"id": str(n), "image": NAMES[n % 24]} for n in range(400)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    command: list[Any] = [sys.executable, "-m", "vlpack", "batch", digits, path, "-o", tmp_path / "out"]
    command += ["--files", IMAGES, "--prompt", READ, "--workers", "2", *GREEDY]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
        end = time.monotonic() + 60
        while written(tmp_path / "out") < 5:
            assert running.poll() is None, running.stderr
            assert time.monotonic() < end
            time.sleep(0.01)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        assert len(children) == 2
        running.kill()
    while any(state(pid) not in ("Z", None) for pid in children):
        assert time.monotonic() < end
        time.sleep(0.05)


def state(pid: str) -> str | None:
    """The state of a process, such as R or Z; None if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return None
