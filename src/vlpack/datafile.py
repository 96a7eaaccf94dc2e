"""The external data files of a package: weights streamed from the checkpoint, encoded, hashed and written once.

Every weight's arrays follow each other in the order of the graph, large ones on page boundaries so that they can be
mapped. Worker threads encode a few weights ahead, each through a queue of a few slabs, and one thread writes in order:
memory stays at a few slabs per worker, and the bytes do not depend on the number of threads. A weight that several
graphs use in the same storage (a tied head) is written once and referred to.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from vlpack.checkpoint import Checkpoint
from vlpack.errors import CheckpointError
from vlpack.graph import Graph, Weight, WeightKey
from vlpack.quantize.gptq import Inputs
from vlpack.storage import Array, Blocks, ChannelInt8, RowReader, slabs
from vlpack.transforms import ChannelScales

PAGE = 4096
SMALL = 64

Progress = Callable[[int, str], None]
"""Told the bytes just written and the path of their weight."""


class Measurements(Protocol):
    """What was measured of a model's activations (`vlpack.calibration.layers.Calibration`)."""

    scales: ChannelScales

    def __call__(self, weight: Weight, expert: int = 0) -> Inputs:
        """What a matrix multiplies, or that of one of its experts, which are asked for in order."""


_END = object()


class DataFiles:
    """Writes graphs and their weights into a folder.

    Args:
        folder: where the files go.
        checkpoint: where the weights come from.
        threads: that encode.
        share: store a weight that two graphs use once.
        progress: called after every write.
        calibration: what matrices multiply, asked once for each that is calibrated, in order; and, from that, the
            scales of balanced channels. Without it the scales come from the checkpoint's weights.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        *,
        threads: int,
        share: bool = True,
        progress: Progress | None = None,
        calibration: Measurements | None = None,
    ) -> None:
        self.folder, self.checkpoint, self.threads, self.share = folder, checkpoint, max(1, threads), share
        self.progress = progress or (lambda written, path: None)
        self.scales = calibration.scales if calibration else ChannelScales(checkpoint)
        self.inputs_of = calibration
        self.sha256: dict[str, str] = {}
        self._placed: dict[WeightKey, dict[str, tuple[str, int]]] = {}

    def save(self, graph: Graph, filename: str) -> None:
        """Write ``filename`` and, for weights that are not yet in the folder, ``filename.data``.

        Raises:
            CheckpointError: a weight is not finite or does not fit its storage.
            OSError: the folder cannot be written, or is full.
        """
        new: dict[WeightKey, Weight] = {}
        for weight in graph.weights:
            key = self._key(weight)
            if key not in self._placed and key not in new:
                new[key] = weight
        if new:
            self._write(f"{filename}.data", new)
        for weight in graph.weights:
            places = self._placed[self._key(weight)]
            for name, parameter in weight.parameters.items():
                location, offset = places[name]
                parameter.const_value = ir.ExternalTensor(
                    location,
                    offset,
                    int(parameter.dtype.itemsize * np.prod(parameter.shape.numpy())),  # type: ignore[union-attr]
                    parameter.dtype,  # type: ignore[arg-type]
                    shape=parameter.shape,  # type: ignore[arg-type]
                    name=parameter.name or name,
                    base_dir=self.folder,
                )
        ir.save(graph.model, self.folder / filename)

    def save_all(self, graphs: Mapping[str, Graph]) -> None:
        """`save`, by file name."""
        for filename, graph in graphs.items():
            self.save(graph, filename)

    def _key(self, weight: Weight) -> Any:
        return weight.key if self.share else id(weight)

    def _write(self, filename: str, weights: dict[WeightKey, Weight]) -> None:
        digest = hashlib.sha256()
        with open(self.folder / filename, "wb") as file:

            def append(data: Any) -> None:
                file.write(data)
                digest.update(data)

            position = 0
            jobs = [
                partial(encode, self.checkpoint, weight, self.scales, self.inputs_of) for weight in weights.values()
            ]
            for (key, weight), chunks in zip(weights.items(), ahead(jobs, self.threads), strict=True):
                places: dict[str, tuple[str, int]] = {}
                for name, chunk in chunks:
                    if name not in places:
                        padding = -position % (PAGE if chunk.nbytes >= PAGE else SMALL)
                        append(bytes(padding))
                        position += padding
                        places[name] = (filename, position)
                    append(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
                    position += chunk.nbytes
                    self.progress(chunk.nbytes, weight.path)
                self._placed[key] = places
        self.sha256[filename] = digest.hexdigest()


def planned_bytes(weights: Sequence[Weight]) -> int:
    """What the arrays of ``weights`` will take, without padding."""
    total = 0
    for weight in weights:
        for dtype, shape in weight.storage.arrays(weight.rows, weight.cols).values():
            total += dtype.itemsize * int(np.prod(shape))
    return total


def encode(
    checkpoint: Checkpoint, weight: Weight, scales: ChannelScales, inputs_of: Measurements | None = None
) -> Iterator[tuple[str, Array]]:
    """The arrays of one weight, piece by piece; a calibrated one is rounded to the nearest without ``inputs_of``.

    Raises:
        CheckpointError: a value is NaN or infinite, or leaves the storage's range; the tensor is named.
    """
    read, storage = weight.reader(checkpoint, scales), weight.storage
    try:
        if inputs_of is not None and weight.calibrated:
            assert isinstance(storage, Blocks | ChannelInt8)
            if weight.experts > 1:
                yield from _by_experts(weight, read, storage, inputs_of)
            else:
                yield from storage.chunks(read, weight.rows, weight.cols, inputs_of(weight))
        else:
            yield from storage.chunks(read, weight.rows, weight.cols)
    except OverflowError as error:
        raise CheckpointError(
            f"The tensor {_overflowing(checkpoint, weight)} has a value that cannot be stored: {error}.",
            "Build with --precision fp32.",
        ) from None


def _by_experts(
    weight: Weight, read: RowReader, storage: Blocks | ChannelInt8, inputs_of: Measurements
) -> Iterator[tuple[str, Array]]:
    """The arrays of experts that are calibrated one by one; all but the codes are small and come last."""
    rows = weight.rows // weight.experts
    small: dict[str, list[Array]] = {}
    for expert in range(weight.experts):

        def own(start: int, stop: int, first: int = expert * rows) -> Array:
            return read(first + start, first + stop)

        for name, chunk in storage.chunks(own, rows, weight.cols, inputs_of(weight, expert)):
            if name == "qweight":
                yield name, chunk
            else:
                small.setdefault(name, []).append(chunk)
    for name, chunks in small.items():
        yield name, np.concatenate(chunks)


def _overflowing(checkpoint: Checkpoint, weight: Weight) -> str:
    """Which of the weight's tensors has a value beyond float16."""
    for source in weight.source.tensors():
        for start, stop in slabs(source.rows, source.cols):
            with np.errstate(over="ignore"):
                narrow = source.read(checkpoint, start, stop).astype(np.float16)
            if not np.isfinite(narrow).all():
                return source.name
    return weight.path


def ahead(jobs: Sequence[Callable[[], Iterator[Any]]], threads: int, depth: int = 2) -> Iterator[Iterator[Any]]:
    """The iterators that ``jobs`` make, in order, each run by one of ``threads`` workers ``depth`` items ahead.

    No more jobs are begun than there are workers, and one: finished ones wait in memory until they are read.
    An exception of a job is raised where its items are read. Leaving early stops the workers.
    """
    queues: list[queue.Queue[Any]] = [queue.Queue(depth) for _ in jobs]
    stop = threading.Event()
    numbers = iter(range(len(jobs)))
    lock = threading.Lock()
    room = threading.Semaphore(threads + 1)

    def put(number: int, item: Any) -> None:
        while not stop.is_set():
            try:
                queues[number].put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        while not stop.is_set():
            if not room.acquire(timeout=0.1):
                continue
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                for item in jobs[number]():
                    put(number, item)
                    if stop.is_set():
                        return
            except BaseException as error:
                put(number, error)
            else:
                put(number, _END)

    def read(number: int) -> Iterator[Any]:
        while (item := queues[number].get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(jobs)))]
    for worker in workers:
        worker.start()
    try:
        for number in range(len(jobs)):
            yield read(number)
            room.release()
    finally:
        stop.set()
        for worker in workers:
            worker.join()
