"""Fixtures: a package that reads the shipped images, and functions that run batches with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from samples import ANSWERS, DIGITS
from vlpack import Sampling, batch
from vlpack.builder import build
from vlpack.bulk import BatchResult


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a package that reads the shipped images."""
    return build(DIGITS, tmp_path_factory.mktemp("batch") / "digits", precision="fp32", threads=1).folder


@pytest.fixture
def ask(digits: Path, tmp_path: Path) -> Callable[..., BatchResult]:
    """Returns a function that runs a batch with short greedy answers; the output is the folder ``out`` or a URI."""

    def get(source: Path | str, output: str = "out", package: Path | str = digits, **options: Any) -> BatchResult:
        common = {"max_tokens": 20, "sampling": Sampling(temperature=0), "threads": 1, "context": 200}
        place = output if "://" in output else tmp_path / output
        return batch(package, source, place, **{**common, **options})

    return get


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of an output in JSON lines, in order; fails if the folder has other files than it should."""
    parts = sorted(folder.glob("part-*.jsonl"))
    assert {path.name for path in folder.iterdir()} <= {".lock", "manifest.json", *(path.name for path in parts)}
    return [json.loads(line) for path in parts for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Writes a file of JSON lines; a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def right(rows: Iterable[dict[str, Any]], column: str = "file") -> bool:
    """Whether all answers are the digits on the images."""
    return all(row["answer"].split() == ANSWERS[Path(row[column]).name]["read"].split() for row in rows)
