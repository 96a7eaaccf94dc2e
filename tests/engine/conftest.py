"""Fixtures: engines, and the same packages in the stock runtime, which answers one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from tiny import Tiny
from vlpack import Engine
from vlpack.runtime.model import Model

TINY = Tiny(seed=1)
PACKED = pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 32),
    reason="steps check several tokens of an answer from onnxruntime 1.32 on",
)


@pytest.fixture(scope="session")
def alone(built: Callable[..., Path]) -> Callable[..., Model]:
    """Returns a package loaded in onnxruntime-genai as the reference; arguments as for `built`."""
    made: dict[Path, Model] = {}

    def get(tiny: Tiny = TINY, *extra: str, **options: Any) -> Model:
        folder = built(tiny, *extra, **options)
        if folder not in made:
            made[folder] = Model(folder, threads=1)
        return made[folder]

    return get


@pytest.fixture
def engine(built: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    """Returns an engine of a tiny package, or of ``folder``, closed after the test; options are those of `Engine`."""
    made: list[Engine] = []

    def get(folder: Path | None = None, **options: Any) -> Engine:
        made.append(Engine(folder or built(TINY), threads=1, **{"slots": 4, "context": 512, **options}))
        return made[-1]

    yield get
    for one in made:
        one.close()
