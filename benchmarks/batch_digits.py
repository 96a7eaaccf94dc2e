"""Checks that `vlpack batch` gives the answers of one question after the other, from files, from Parquet and on Ray.

Usage: python benchmarks/batch_digits.py PACKAGE [--images 2000]

PACKAGE must be a package that reads digits (vlpack demo -p fp32 --output digits). The images are rendered, and all
different. Each is asked about by `vlpack.load(PACKAGE).generate`. Then the same images are answered by `vlpack.batch`
from a folder, from Parquet, and from Parquet on a Ray cluster of this machine, with one actor and with two, each with
one thread. The script prints the numbers of rows whose answers are equal and right, and the rows per minute of the
second half of each run, in which all actors have loaded the package. Two actors on two cores show that the work is
shared; how much faster they are depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from train_digits_qwen3_5 import QUESTION, SHAPES, Digits, text_of

import vlpack

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray listens on 127.0.0.1 only
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def render(folder: Path, count: int) -> dict[str, str]:
    """Writes images into a folder and returns the right answer for each name."""
    digits, right = Digits(5, 60), {}
    folder.mkdir()
    for number in range(count):
        pixels, cells = digits.image(*SHAPES[number % len(SHAPES)])
        name = f"{number:05}.png"
        Image.fromarray(pixels).save(folder / name)
        right[name] = text_of(cells)
    return right


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of an output, in order."""
    return [json.loads(line) for path in sorted(folder.glob("part-*")) for line in path.open(encoding="utf-8")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    given = parser.parse_args()
    import ray

    with tempfile.TemporaryDirectory(prefix="vlpack-digits-") as place:
        work = Path(place)
        right = render(work / "images", given.images)
        model, greedy = vlpack.load(given.package, threads=1), vlpack.Sampling(temperature=0)
        began = time.perf_counter()
        alone = {
            name: model.generate(QUESTION, [work / "images" / name], max_tokens=16, sampling=greedy).text
            for name in right
        }
        seconds = time.perf_counter() - began
        good = sum(alone[name] == right[name] for name in right)
        print(f"one by one: {good} of {len(right)} right, {60 * len(right) / seconds:.0f} rows a minute", flush=True)
        table = {"id": list(right), "image": [(work / "images" / name).read_bytes() for name in right]}
        parquet.write_table(pa.table(table), work / "rows.parquet", row_group_size=100)
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False
        )
        runs: dict[str, tuple[Path, dict[str, Any]]] = {
            "files": (work / "images", {"threads": 1}),
            "Parquet": (work / "rows.parquet", {"threads": 1}),
            "Ray, 1 actor": (work / "rows.parquet", {"ray": "auto", "workers": 1, "threads": 1}),
            "Ray, 2 actors": (work / "rows.parquet", {"ray": "auto", "workers": 2, "threads": 2}),
            "Ray, 1 actor again": (work / "rows.parquet", {"ray": "auto", "workers": 1, "threads": 1}),
        }
        for name, (source, options) in runs.items():
            seen: list[tuple[int, float]] = []

            def note(progress: vlpack.BatchResult, seen: list[tuple[int, float]] = seen) -> None:
                seen.append((progress.answered, progress.seconds))

            common = {"prompt": QUESTION, "max_tokens": 16, "sampling": greedy, "shard_rows": 50, "context": 256}
            vlpack.batch(given.package, source, work / name, progress=note, **common, **options)
            rows = rows_of(work / name)
            assert [row["id"] for row in rows] == list(right), "rows are lost, twice or in another order"
            same = sum(row["answer"] == alone[row["id"]] for row in rows)
            (first, start), (last, end) = seen[len(seen) // 2], seen[-1]
            speed = 60 * (last - first) / max(end - start, 1e-9)
            print(f"{name}: {same} of {len(rows)} as one by one, {speed:.0f} rows a minute", flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
