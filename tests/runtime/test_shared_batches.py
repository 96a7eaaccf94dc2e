"""Prompts of several threads share batches, with the same results as separate calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlpack
from retrieval import make_text, make_vision
from vlpack.errors import PackageError
from vlpack.preprocess import Prompt
from vlpack.runtime.retrieval import Embedder, Reranker, _batches
from vlpack.runtime.shared_batches import SharedBatches
from vlpack.sample_images import picture

TEXTS = ["a", "the river rose", "in the night and by morning the lower fields stood under water", "nobody slept " * 9]


def prompt(length: int, value: int = 0) -> Prompt:
    return Prompt(np.full((1, length), value, np.int32), np.zeros(0, np.int64), None, None, "")


def items(images: bool) -> list[Any]:
    """Texts of very different lengths and, for models with vision, images among them."""
    made: list[Any] = [f"{number} {text}" for number, text in enumerate(TEXTS * 3)]
    if images:
        made[1::3] = [{"image": picture(32 + 16 * n, 48, n), "text": text} for n, text in enumerate(made[1::3])]
    return made


@pytest.mark.parametrize("sees", [False, True])
@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_many_threads(sees: bool, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = (make_vision if sees else make_text)(tmp_path / "checkpoint")
    folder = vlpack.build(checkpoint, tmp_path / "package", task=task, precision="fp32", threads=1).folder
    model: Any = vlpack.load(folder, threads=1)
    asked = items(sees)

    def alone(item: Any) -> Any:
        return model.embed([item])[0] if isinstance(model, Embedder) else model.score("Where?", [item])[0]

    wanted = [alone(item) for item in asked]
    sizes: list[int] = []
    forward, kind = type(model)._forward, Embedder if task == "embedding" else Reranker
    together = threading.Barrier(len(asked))

    def counted(self: Any, prompts: Sequence[Prompt]) -> Any:
        sizes.append(len(prompts))
        return forward(self, prompts)

    def at_once(item: Any) -> Any:
        together.wait(30)
        return alone(item)

    monkeypatch.setattr(kind, "_forward", counted)
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(at_once, asked))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert len({np.asarray(each).tobytes() for each in found}) == len(asked)
    assert sum(sizes) == len(asked)
    assert max(sizes) > 1


class Slow:
    """A model whose first batch waits until all callers have called; the row of a prompt is its first token."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go, self.begun = threading.Event(), threading.Event()

    def __call__(self, prompts: Sequence[Prompt]) -> list[int]:
        self.begun.set()
        assert self.go.wait(30)
        rows = [int(each.input_ids[0, 0]) for each in prompts]
        self.batches.append(rows)
        if any(row < 0 for row in rows):
            raise PackageError("onnxruntime failed")
        return rows


def shared(
    monkeypatch: pytest.MonkeyPatch, jobs: list[list[int]], make: Callable[[], Slow] = Slow
) -> tuple[Slow, list[Any]]:
    """The results of several threads that call one after the other while the first one's prompt is computed."""
    monkeypatch.setattr("vlpack.runtime.retrieval.BATCH_TOKENS", 40)
    model = make()
    batches = SharedBatches(model, _batches)
    results: list[Any] = [None] * len(jobs)

    def ask(number: int) -> None:
        try:
            results[number] = batches([prompt(10, value) for value in jobs[number]])
        except PackageError as error:
            results[number] = error

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(jobs))]
    for number, thread in enumerate(threads):
        thread.start()
        assert model.begun.wait(30)
        while number and len(batches._jobs) < number:
            thread.join(0.01)
    model.go.set()
    for thread in threads:
        thread.join(30)
    assert not batches._jobs
    return model, results


def test_callers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    many = list(range(100, 120))
    model, results = shared(monkeypatch, [[1], many, [2, 3], [4]])
    assert results == [[1], many, [2, 3], [4]]
    assert model.batches[0] == [1]
    assert all(len(batch) <= 4 for batch in model.batches)
    last = max(number for number, batch in enumerate(model.batches) if {2, 3, 4} & set(batch))
    assert last <= 4  # of 7 batches: no caller waits for all prompts of the largest one
    assert any(len({value >= 100 for value in batch}) == 2 for batch in model.batches)  # of several callers together


def test_what_fails_fails_for_its_caller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, results = shared(monkeypatch, [[1], [2], [-3], [4, 5]])
    assert isinstance(results[2], PackageError)
    assert [results[0], results[1], results[3]] == [[1], [2], [4, 5]]


def test_who_is_interrupted_leaves_the_others_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Slow):
        def __call__(self, prompts: Sequence[Prompt]) -> list[int]:
            rows = super().__call__(prompts)
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return rows

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    _, results = shared(monkeypatch, [[1], [2], [3], [4]], Interrupted)
    assert results[0] == [1]
    assert sorted(value for result in results[1:] if result for value in result) in ([2, 3], [2, 4], [3, 4])
