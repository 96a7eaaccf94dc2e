"""Batches on a real Ray cluster of two nodes on this machine give the same rows, even if actors are killed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bulk.conftest import right, rows_of, write_rows
from samples import ANSWERS, IMAGES, READ, vlpack
from vlpack import Sampling
from vlpack.bulk import BatchResult
from vlpack.errors import OptionError, VlpackError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or not sys.platform.startswith("linux"), reason="pip install 'ray[data]'"
)

Ask = Callable[..., BatchResult]
NAMES = sorted(ANSWERS)
SAME = (
    "id",
    "image",
    "name",
    "n",
    "answer",
    "finish_reason",
    "prompt_tokens",
    "image_tokens",
    "answer_tokens",
    "error",
)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module ray, connected to a cluster of two nodes with one CPU each, which only this machine can reach."""
    place = f"/tmp/vlpack-ray-{secrets.token_hex(4)}"  # short, because paths of sockets have at most 107 characters
    os.makedirs(f"{place}/ray")
    wanted = {
        "RAY_TMPDIR": place,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # otherwise 127.0.0.1 is replaced by another address of this machine
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "VLPACK_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False}, connect=False)
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    assert len([one for one in ray.nodes() if one["Alive"]]) == 2
    yield ray
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(place, ignore_errors=True)
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


def test_a_run_is_killed_and_an_actor_of_the_next_one(ray: Any, ask: Ask, digits: Path, tmp_path: Path) -> None:
    """Rows of Parquet at a URI get the answers that they get without Ray, and each exactly once, in order.

    The first run is killed after some shards, while both nodes answer. In the second run an actor is killed, and Ray
    restarts it. One row names an image that exists only in the second run, which answers it again.
    """
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = tmp_path / "data"
    data.mkdir()
    names = [NAMES[number % 24] for number in range(48)]
    images: list[Any] = [{"bytes": (IMAGES / name).read_bytes(), "path": name} for name in names]
    images[3] = {"bytes": None, "path": "late.png"}
    table = pa.table({"image": images, "name": names, "n": pa.array(range(48), pa.int16())})
    parquet.write_table(table, data / "a.parquet", row_group_size=10)
    out = tmp_path / "out"
    options: dict[str, Any] = {"workers": 2, "threads": 2, "slots": 2, "shard_rows": 4}
    options |= {"format": "parquet", "ray": "auto"}
    command: list[Any] = [sys.executable, "-m", "vlpack", "batch", digits.as_uri(), data.as_uri(), "-o", out.as_uri()]
    command += ["--prompt", READ, "--max-tokens", "20", "--temperature", "0", "--context", "200"]
    for name, value in {**options, "ray": ray.get_runtime_context().gcs_address}.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
        end = time.monotonic() + 100
        while len(list(out.glob("part-*"))) < 2:
            assert running.poll() is None, running.stderr
            assert time.monotonic() < end
            time.sleep(0.005)
        running.kill()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 2 <= len(kept) < 12

    shutil.copyfile(IMAGES / names[3], data / "late.png")
    killed: list[int] = []

    def kill(progress: Any) -> None:
        if not killed and progress.answered:
            killed.append(kill_actor())

    arguments = {"prompt": READ, "package": digits.as_uri(), "retry_errors": True, "progress": kill, **options}
    again = ask(data.as_uri(), out.as_uri(), **arguments)
    assert killed
    assert (again.rows, again.total, again.errors) == (48, 48, 0)
    assert again.before + again.answered == 48
    assert again.before >= 4 * len(kept) - 1
    assert sum(path.stat().st_mtime_ns == changed for path, changed in kept.items()) >= len(kept) - 1
    found = parquet.read_table(sorted(out.glob("part-*"))).to_pylist()
    assert [row["n"] for row in found] == list(range(48))
    ask(data / "a.parquet", "plain", prompt=READ, format="parquet")
    plain = parquet.read_table(tmp_path / "plain" / "part-00000.parquet").to_pylist()
    assert [{name: row[name] for name in SAME} for row in found] == [
        {name: row[name] for name in SAME} for row in plain
    ]
    assert right(found, "name")
    assert parquet.read_schema(out / "part-00000.parquet").field("n").type == pa.int16()
    assert {path.name for path in out.iterdir()} == {"manifest.json", *(f"part-{n:05}.parquet" for n in range(12))}


def kill_actor() -> int:
    """Kills a process of the cluster that answers rows, and returns its id."""
    for place in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if not place.name.isdigit() or b"MapWorker(MapBatches(Actor))" not in (place / "cmdline").read_bytes():
                continue
            if os.environ["RAY_TMPDIR"].encode() in (place / "environ").read_bytes():  # not one of another cluster
                os.kill(int(place.name), signal.SIGKILL)
                return int(place.name)
    raise AssertionError("no process answers rows")


def test_clusters_that_are_too_small(ray: Any, ask: Ask, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}])
    with pytest.raises(OptionError, match=r"3 actors with 1 threads do not fit .* machines have \[1, 1\] cores"):
        ask(path, ray="auto", workers=3, threads=None)
    with pytest.raises(OptionError, match="context is 1000000000"):
        ask(path, ray="auto", threads=1, context=10**9)


def test_a_run_without_ray_is_continued(ray: Any, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlpack.bulk.progress.PROGRESS_SECONDS", 0)
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in "abca"])

    class StoppedError(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.answered == 4:
            raise StoppedError

    with pytest.raises(StoppedError):
        ask(path, max_tokens=1, progress=stop)
    assert (tmp_path / "out" / ".journal").exists()
    result = ask(path, max_tokens=1, ray="auto")
    assert (result.before, result.answered, result.total) == (4, 0, 4)
    assert len(rows_of(tmp_path / "out")) == 4


def test_predictor_in_ray_data(ray: Any, digits: Path, tmp_path: Path) -> None:
    """Rows may have messages, pixels or bytes; results have the column generated_text, as in ray.data.llm."""
    pytest.importorskip("pyarrow")
    from ray import data

    from vlpack.ray import Predictor

    data.DataContext.get_current().enable_progress_bars = False
    data.DataContext.get_current().execution_options.preserve_order = True
    images = [{"image": (IMAGES / name).read_bytes(), "name": name} for name in NAMES[:10]]
    asked = {"prompt": READ, "max_tokens": 20, "sampling": Sampling(temperature=0), "context": 200, "slots": 2}
    rows = (
        data.from_items([*images, {"image": b"damaged", "name": "damaged"}])
        .map_batches(
            Predictor,
            fn_constructor_args=(digits.as_uri(),),  # copied once to this machine
            fn_constructor_kwargs=asked,
            compute=data.ActorPoolStrategy(size=2),
            num_cpus=1,
            batch_size=4,
        )
        .take_all()
    )
    by_name = {row["name"]: row for row in rows}
    assert len(rows) == len(by_name) == 11
    assert "not an image" in by_name.pop("damaged")["error"]
    for name, row in by_name.items():
        assert row["generated_text"].split() == ANSWERS[name]["read"].split()
        assert (row["finish_reason"], row["error"]) == ("stop", None)
        assert row["image"] == (IMAGES / name).read_bytes()
    copies = list(Path(os.environ["VLPACK_CACHE"], "copied").iterdir())
    assert sorted(path.suffix for path in copies) == ["", ".lock"]


@pytest.fixture
def predictor(digits: Path) -> Callable[..., Any]:
    """Returns a function that makes a predictor in this process."""
    pytest.importorskip("ray")
    from vlpack.ray import Predictor

    common = {"max_tokens": 20, "sampling": Sampling(temperature=0), "context": 200, "threads": 1}
    return lambda **options: Predictor(digits, **{**common, **options})


def test_functions_before_and_after(predictor: Callable[..., Any]) -> None:
    def before(row: dict[str, Any]) -> dict[str, Any]:
        content = [{"type": "image", "image": row["picture"]}, {"type": "text", "text": READ}]
        return {"messages": [{"role": "user", "content": content}], "name": row["name"]}

    def after(row: dict[str, Any]) -> dict[str, Any]:
        return {"name": row["name"], "digits": row["generated_text"].split()}

    made = predictor(preprocess=before, postprocess=after, files=str(IMAGES))
    found = made({"picture": np.array(NAMES[:3], object), "name": np.array(NAMES[:3])})
    assert found["digits"].shape == (3,)
    assert list(found) == ["name", "digits"]
    assert list(found["digits"]) == [ANSWERS[name]["read"].split() for name in NAMES[:3]]


def test_arrays_of_pixels_and_files(predictor: Callable[..., Any]) -> None:
    pixels = np.stack([np.asarray(Image.open(IMAGES / name).convert("RGB")) for name in NAMES[:1]])
    made = predictor(prompt=READ)
    found = made({"image": pixels, "n": np.array([5], np.int16)})
    assert found["generated_text"][0].split() == ANSWERS[NAMES[0]]["read"].split()
    assert found["image"] is pixels
    assert found["n"].dtype == np.int16
    found = made({"image": np.array([str(IMAGES / NAMES[0])], object)})
    assert "has no folder of files" in found["error"][0] or "have no folder of files" in found["error"][0]


def test_without_ray(
    ask: Ask, capsys: pytest.CaptureFixture[str], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}])
    monkeypatch.setattr("vlpack.bulk.cluster.importlib.util.find_spec", lambda name: None)
    done = vlpack(capsys, "batch", digits, path, "-o", tmp_path / "out", "--ray", "auto")
    assert (done.code, done.err) == (2, "error: Ray is not installed.\npip install 'vlpack[ray]'\n")
    with pytest.raises(VlpackError, match="Ray is not installed"):
        ask(path, ray="auto")
