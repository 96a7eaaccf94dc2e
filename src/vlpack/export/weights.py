"""Writes the external data files of a package: weights are streamed from the checkpoint, encoded, hashed and written.

The arrays of all weights are written in the order of the graph, large ones at page boundaries so that they can be
mapped. Worker threads encode a few weights ahead, each through a queue of a few slabs, and one thread writes in order:
memory stays at a few slabs per worker, and the bytes do not depend on the number of threads. A weight that several
graphs use in the same storage (such as a tied head) is written once.
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

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import CheckpointError, option
from vlpack.export.graph import Graph, Weight, WeightKey
from vlpack.quantize.gptq import HessianFactor
from vlpack.quantize.kept import KeptRows
from vlpack.quantize.storage import Array, Blocks, ChannelInt8, RowReader, slabs
from vlpack.quantize.transforms import ChannelScales

PAGE = 4096
"""Alignment of large arrays in a data file, in bytes."""
SMALL = 64
"""Alignment of arrays that are smaller than a page, in bytes."""

Progress = Callable[[int, str], None]
"""A callback that takes the number of bytes just written and the path of their weight."""


class Measurements(Protocol):
    """Measurements of a model's activations (`vlpack.calibration.hessians.Calibration`)."""

    scales: ChannelScales

    def __call__(self, weight: Weight, expert: int = 0) -> HessianFactor:
        """The calibration data of a matrix's inputs, or of those of one expert; experts are requested in order."""


_END = object()


class DataFiles:
    """A writer of graphs and their weights, for one folder.

    Args:
        folder: folder of the files.
        checkpoint: the checkpoint that the weights are read from.
        threads: number of threads that encode weights.
        share: whether to store a weight that several graphs use only once.
        progress: callback after every write.
        calibration: measured inputs of the matrices, requested once for each calibrated matrix, in order, and the
            scales of balanced channels derived from them. Without it, the scales come from the checkpoint's weights.
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
        """Writes the graph ``filename`` and, for weights that are not in the folder yet, its data ``filename.data``.

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
        """Saves several graphs, given by file name, in order."""
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
    """Size of the stored arrays of ``weights`` in bytes, without padding."""
    total = 0
    for weight in weights:
        for dtype, shape in weight.storage.arrays(weight.rows, weight.cols).values():
            total += dtype.itemsize * int(np.prod(shape))
    return total


def encode(
    checkpoint: Checkpoint, weight: Weight, scales: ChannelScales, inputs_of: Measurements | None = None
) -> Iterator[tuple[str, Array]]:
    """Encodes one weight, piece by piece. A calibrated weight is rounded to the nearest if ``inputs_of`` is None.

    Yields:
        Name of a stored array, and the next piece of it.

    Raises:
        CheckpointError: a value is NaN or infinite, or outside the storage's range; the message names the tensor.
    """
    read, storage = weight.reader(checkpoint, scales), weight.storage
    if isinstance(storage, Blocks | ChannelInt8) and storage.kept:
        yield from storage.kept_chunks(KeptRows(weight.source, checkpoint), weight.rows, weight.cols)
        return
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
            f"Build with {option('precision', 'fp32')}.",
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
    """The name of a tensor of the weight that has a value outside the range of float16."""
    for source in weight.source.tensors():
        for start, stop in slabs(source.rows, source.cols):
            with np.errstate(over="ignore"):
                narrow = source.read(checkpoint, start, stop).astype(np.float16)
            if not np.isfinite(narrow).all():
                return source.name
    return weight.path


def ahead(jobs: Sequence[Callable[[], Iterator[Any]]], threads: int, depth: int = 2) -> Iterator[Iterator[Any]]:
    """Runs generators in worker threads and yields their iterators in order; each runs up to ``depth`` items ahead.

    At most ``threads + 1`` jobs are begun and not yet read, because finished ones wait in memory. An exception in a job
    is raised where its items are read. Closing this generator early stops the workers.

    Args:
        jobs: functions that return an iterator.
        threads: number of worker threads.
        depth: number of items that a job may be ahead of its reader.
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
