"""`vlpack.build`, which makes a package from a checkpoint in three steps: plan, write, seal."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlpack.architectures.ports import GraphOptions
from vlpack.build_name import Wanted
from vlpack.build_plan import PARTS, BuildOptions, BuildPlan, plan_build, trace_graphs
from vlpack.calibration.options import BESIDE, BESIDE_4, ReportProgress, report_nothing
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import Note, option
from vlpack.export.assets import write_beside
from vlpack.export.folder import check_free, check_space, output_folder
from vlpack.export.graph import Graph, Weight, declare
from vlpack.export.manifest import write_manifest
from vlpack.export.weights import DataFiles, planned_bytes
from vlpack.options import ExtraOptions
from vlpack.package.manifest import graph_files, read_manifest, whole_package
from vlpack.quantize.policy import QuantizationOptions, make_policy
from vlpack.quantize.transforms import packed_scales
from vlpack.store.changes import reserve
from vlpack.store.packages import Key, Package
from vlpack.system import available_cores, peak_memory_bytes
from vlpack.tasks import AUTO

if TYPE_CHECKING:
    from vlpack.calibration.hessians import Calibration


class Progress(Protocol):
    """An observer of a build's progress."""

    def start(self, total: int) -> None:
        """Receives the number of bytes that will be written."""

    def advance(self, written: int, path: str) -> None:
        """Receives the number of bytes that have been written since the last call, all of the weight at ``path``."""

    def say(self, text: str, done: int = 0, total: int = 0) -> None:
        """Receives the name of another step, with ``done`` of ``total`` units; ``total`` is 0 where not known."""


@dataclass(frozen=True)
class BuildResult:
    """A finished package and figures of its build.

    Args:
        folder: folder of the package.
        parts: part → (graph file, bytes of graph and data, storage labels with their bytes; 0 where shared).
        total_bytes: size of all files of the package, in bytes.
        source_bytes: size of the checkpoint's weights, in bytes.
        seconds: duration of the build.
        peak_memory: largest memory use of this process so far, in bytes.
        notes: sentences that the user should read.
    """

    folder: Path
    parts: dict[str, tuple[str, int, dict[str, int]]]
    total_bytes: int
    source_bytes: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """The results of the writing step, which the sealing step needs.

    Args:
        plan: plan of what was written; calibration may have chosen other bits for some weights than the first plan.
        notes: sentences that the user should read about the files beside the graphs.
        sources: file name → SHA-256 of the checkpoint's files.
        files: file name → SHA-256 of the files that were hashed while they were written.
        calibration: description of the calibration for the manifest; None if there was none.
        imported: description of a quantized checkpoint for the manifest, with the scales of the balanced channels,
            which could not be computed again from the original checkpoint; None for other checkpoints.
    """

    plan: BuildPlan
    notes: list[str]
    sources: dict[str, str]
    files: dict[str, str]
    calibration: dict[str, Any] | None
    imported: dict[str, Any] | None


def build(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    precision: str | None = None,
    execution_provider: str = "cpu",
    part: str = "all",
    task: str = AUTO,
    vision_precision: str | None = None,
    extra_options: ExtraOptions | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    lora: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    calibrate: str | os.PathLike[str] | None = None,
    bits: float | None = None,
    mmproj: str | os.PathLike[str] | None = None,
) -> BuildResult:
    """Builds a package from a checkpoint.

    Args:
        source: folder of a checkpoint, a GGUF file, or a Hub id.
        output: folder of the package; it must not exist, unless it is a package that ``force`` replaces. None puts the
            package of a Hub id into vlpack's cache of packages, or finds it there if it was built before.
        precision: fp32, fp16, int8 or int4. By default a quantized checkpoint keeps its own bits, and others become
            int8 on the CPU and fp16 elsewhere.
        execution_provider: cpu, cuda, dml or webgpu.
        part: ``all``; ``text`` for a decoder that runs by itself; or ``vision`` or ``embedding`` for that graph alone.
        task: generate, embedding, reranker, or auto: the task that the checkpoint indicates, or else generate.
        vision_precision: precision of the vision encoder; by default it follows from ``precision``.
        extra_options: detailed options.
        revision: branch, tag or commit of a Hub id.
        cache_dir: folder in which files from the Hub are kept.
        force: whether to replace an existing package; for one in the cache, to build the newest commit.
        threads: number of threads that encode weights; by default the number of cores, at most 8.
        progress: observer of the build's progress.
        lora: LoRA adapters of peft, as folders or Hub ids, which are merged one after another into the weights while
            these are read.
        calibrate: source of texts for calibration (GPTQ) of the decoder's weights in an int4 or int8 package: ``self``
            for texts that the model generates, a file of plain text, or a ``*.jsonl`` file of messages with
            images. Calibration takes minutes and, while it runs, the disk space of an 8-bit package.
        bits: average number of bits per weight of the decoder of a calibrated int4 package, scales included; the
            matrices that 4 bits harm most get 8.
        mmproj: GGUF file with the vision encoder of the model in the GGUF file ``source``. If ``source`` is a folder
            with one such file beside the model, it is used by default.

    Raises:
        VlpackError: the package cannot be built; the message says why and what to do. Nothing new is left at
            ``output``.
    """
    options = BuildOptions(
        precision=precision,
        execution_provider=execution_provider,
        part=part,
        task=task,
        vision_precision=vision_precision,
        extra=ExtraOptions() if extra_options is None else extra_options,
        revision=revision,
        cache_dir=cache_dir,
        threads=threads,
        lora=lora,
        calibrate=calibrate,
        bits=bits,
        mmproj=mmproj,
    )
    if output is None:
        return build_by_name(Wanted.read(source, options), force=force, progress=progress)
    return _build(source, Path(os.path.expanduser(output)), options, force=force, progress=progress)


def build_by_name(
    wanted: Wanted,
    *,
    key: Key | None = None,
    force: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> BuildResult:
    """Finds the package of a Hub id in the cache of packages, or builds it there.

    If several processes want the same package, the first builds it, and the others wait for it.

    Args:
        wanted: the package that is wanted.
        key: commit and options of the package, if the Hub was asked already; the package of another commit is then not
            used. None to use a package that is there without asking the Hub.
        force: whether to build the newest commit even if its package is there.
        progress: observer of the build's progress.
        tell: function that receives a sentence before this process waits for another; None for the observer's.

    Raises:
        VlpackError: the package cannot be built, or the cache cannot be written.
    """
    package = wanted.find() if key is None and not force else None
    if package is not None:
        package.note_use()
        return _existing(package)
    key = key or wanted.resolve()[0]
    say = tell or (progress.say if progress else lambda text: None)
    with reserve(key, wanted.revision, say) as place:
        there = None if force else place.note_revision()
        if there is not None:
            return _existing(there)
        with place.building() as record:
            options = replace(wanted.options, revision=key.commit)
            # a package without a usable sidecar is replaced; nothing else ever is
            result = _build(wanted.repository, place.folder, options, force=True, progress=progress)
            record(result.source_bytes)
    return result


def _existing(package: Package) -> BuildResult:
    """The result of a build that is not done, because its package is in the cache."""
    folder = package.folder
    manifest = whole_package(folder)
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(package.created))
    return BuildResult(
        folder=folder,
        parts={part: (name, _size(folder, name), {}) for part, name in graph_files(folder, manifest).items()},
        total_bytes=package.bytes,
        source_bytes=package.source_bytes,
        seconds=0.0,
        peak_memory=peak_memory_bytes(),
        notes=(Note(f"The package was built on {since}; {option('force', True)} builds the newest commit."),),
    )


def _build(
    source: str | os.PathLike[str], output: Path, options: BuildOptions, *, force: bool, progress: Progress | None
) -> BuildResult:
    """Builds a package at ``output``, as `build` does."""
    started = time.perf_counter()
    check_free(output, force=force)
    with ExitStack() as stack:
        plan = plan_build(source, output, options, stack)
        folder = stack.enter_context(output_folder(output, force=force))
        written = write(plan, folder, progress)
        plan = written.plan
        seal(plan, folder, written)
        parts = {
            graph.name: (name, _size(folder, name), _labels(graph, own))
            for (name, graph), own in zip(plan.graphs.items(), plan.own_weights, strict=True)
        }
        total_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return BuildResult(
        folder=output,
        parts=parts,
        total_bytes=total_bytes,
        source_bytes=plan.checkpoint.total_bytes(),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory_bytes(),
        notes=tuple(map(Note, [*plan.notes, *written.notes])),
    )


def write(plan: BuildPlan, folder: Path, progress: Progress | None) -> Written:
    """Writes everything but the manifest into the folder: settings, tokenizer and cards, graphs and their weights."""
    notes = _write_settings(plan, folder, progress)
    hashes = _in_background(lambda: _hash_sources(plan.checkpoint))
    calibration = calibrate_plan(plan, folder / BESIDE, progress)
    if calibration is not None and plan.options.bits is not None:
        plan = spend_bits(plan, plan.options.bits, calibration, folder / BESIDE_4, progress)
        calibration = calibration.again(plan.calibrated_weights)
        notes = _write_settings(plan, folder, progress)  # again, because these files describe the policy
    files = _data_files(plan, folder, calibration, progress)
    files.save_all(plan.graphs)
    for beside in (BESIDE, BESIDE_4):
        shutil.rmtree(folder / beside, ignore_errors=True)
    imported = None
    if plan.imported is not None:
        imported = {**plan.imported, "scales": packed_scales(files.scales.exponents())}
    described = calibration.described() if calibration else None
    return Written(plan, notes, hashes.result(), files.sha256, described, imported)


def _write_settings(plan: BuildPlan, folder: Path, progress: Progress | None) -> list[str]:
    """Writes the files beside the graphs, checks that the disk has space for the weights, and returns notes."""
    notes = write_beside(
        folder, plan.architecture, plan.checkpoint, plan.policy, plan.names, plan.origin, plan.retrieval
    )
    check_space(folder, plan.total_bytes)
    if progress:
        progress.start(plan.total_bytes)
    return notes


def _data_files(
    plan: BuildPlan, folder: Path, calibration: Calibration | None, progress: Progress | None = None
) -> DataFiles:
    return DataFiles(
        folder,
        plan.checkpoint,
        threads=plan.options.threads or default_threads(),
        share=plan.options.shares,
        progress=progress.advance if progress else None,
        calibration=calibration,
    )


def seal(plan: BuildPlan, folder: Path, written: Written) -> None:
    """Writes the manifest, which is the last file and makes the folder a package."""
    write_manifest(
        folder,
        plan.checkpoint,
        plan.origin,
        written.sources,
        plan.policy,
        plan.graphs,
        written.files,
        plan.task,
        plan.retrieval,
        written.calibration,
        written.imported,
    )


def calibrate_plan(plan: BuildPlan, beside: Path, progress: Progress | None) -> Calibration | None:
    """Builds an 8-bit package at ``beside`` and prepares the calibration of the plan's weights with it.

    Returns:
        The calibration; None if the build has none.
    """
    options = plan.options
    if options.calibrate is None:
        return None
    from vlpack.calibration.run import start_calibration
    from vlpack.calibration.teacher import CalibrationModel

    report = progress.say if progress else report_nothing
    eight_bits = build(
        plan.place,
        beside,
        precision="int8",
        task=plan.task,
        lora=[adapter.weights.folder for adapter in plan.adapters],
        mmproj=options.mmproj,
        threads=options.threads,
        progress=_NestedProgress(report),
    )
    files = {name: filename for name, (filename, _, _) in eight_bits.parts.items()}
    quantization = QuantizationOptions(**read_manifest(eight_bits.folder)["quantization"])
    policy = make_policy("int8", "cpu", quantization, plan.architecture.precision_facts)
    graphs = plan.architecture.parts(GraphOptions.of_policy(policy))
    transforms = {weight.path: weight.transform for part in graphs for weight in declare(part, policy)}
    model = CalibrationModel(eight_bits.folder, files, plan.architecture)
    return start_calibration(model, plan.calibrated_weights, transforms, plan.checkpoint, options.calibrate, report)


def spend_bits(
    plan: BuildPlan, bits: float, calibration: Calibration, beside: Path, progress: Progress | None
) -> BuildPlan:
    """The plan with 8 bits for the matrices that 4 bits harm most, within an average number of bits per weight.

    Args:
        plan: plan with 4 bits everywhere.
        bits: average number of bits per weight, scales included.
        calibration: calibration of the plan's weights.
        beside: path that does not exist yet, at which the decoder is written in 4 bits to measure it.
        progress: observer of the build's progress.
    """
    from vlpack.calibration.bits import spend_bits as policy_with_bits
    from vlpack.calibration.sensitivity import harms
    from vlpack.calibration.teacher import CalibrationModel

    decoder = {name: graph for name, graph in plan.graphs.items() if graph.name in ("text", "decoder")}
    beside.mkdir()
    _data_files(plan, beside, calibration).save_all(decoder)
    eight = calibration.model
    four = CalibrationModel(beside, {graph.name: name for name, graph in decoder.items()}, eight.architecture)
    report = progress.say if progress else report_nothing
    found = harms(eight, four, calibration.shown, partial(report, "measuring where 4 bits suffice"))
    weights = [weight for graph in decoder.values() for weight in graph.weights]
    policy = policy_with_bits(plan.policy, plan.architecture.precision_facts, weights, found, bits)
    return replace(plan, policy=policy, graphs=trace_graphs(plan.architecture, policy, plan.options))


class _NestedProgress:
    """An observer that reports the build of the 8-bit package for calibration as one step of the outer build."""

    def __init__(self, report: ReportProgress) -> None:
        self._report, self._done, self._total = report, 0, 0

    def start(self, total: int) -> None:
        """Receives the number of bytes that will be written."""
        self._total = total
        self.advance(0, "")

    def advance(self, written: int, path: str) -> None:
        """Reports ``written`` more bytes."""
        self._done = min(self._done + written, self._total)
        self._report("building an 8-bit package to calibrate with", self._done, self._total)

    def say(self, text: str, done: int = 0, total: int = 0) -> None:
        """Ignores other steps, which are short."""


def default_threads() -> int:
    """The default number of threads: one per core, at most 8, because each holds a weight or a few slabs in memory."""
    return min(available_cores(), 8)


def _in_background(work: Callable[[], Any]) -> Future[Any]:
    """Runs ``work`` in a daemon thread, which unlike an executor's lets a failed or interrupted program end at once."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _hash_sources(checkpoint: Checkpoint) -> dict[str, str]:
    names = list(checkpoint.weight_files())
    if checkpoint.place == checkpoint.folder:  # a GGUF file has its settings inside
        names.append(checkpoint.folder / "config.json")
    return {path.name: checkpoint.sha256(path) for path in names}


def _size(folder: Path, filename: str) -> int:
    return sum(path.stat().st_size for path in (folder / filename, folder / f"{filename}.data") if path.is_file())


def _labels(graph: Graph, own: list[Weight]) -> dict[str, int]:
    """Bytes of the matrices that are written for this graph, by storage label; 0 for matrices that it shares."""
    labels: dict[str, int] = {}
    written = set(map(id, own))
    for weight in graph.weights:
        if weight.cols > 1:
            here = id(weight) in written
            label = weight.storage.label if here else f"{weight.storage.label} (shared)"
            labels[label] = labels.get(label, 0) + (planned_bytes([weight]) if here else 0)
    return labels


__all__ = ["PARTS", "BuildResult", "Progress", "build"]
