"""The whole story on one page: checkpoint → architecture → graphs → weights → package."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlpack.architectures import Architecture, Part, architecture_of
from vlpack.architectures.base import GraphOptions
from vlpack.before_download import check_settings, resolve_checked
from vlpack.calibration.choice import BESIDE, Say, check_calibration, say_nothing
from vlpack.checkpoint import Checkpoint
from vlpack.cores import available_cores
from vlpack.datafile import DataFiles, planned_bytes
from vlpack.errors import OptionError
from vlpack.fit import check_tensors
from vlpack.graph import Graph, Weight, declare, trace
from vlpack.hub import ResolvedSource
from vlpack.layers.attention import has_grouped_kernel
from vlpack.lora import Adapter, adapter_notes, merge_all, open_adapters, places_of
from vlpack.memory import peak_memory_bytes
from vlpack.options import ExtraOptions, check_effects
from vlpack.package.beside import write_beside
from vlpack.package.encoder_section import encoder_section
from vlpack.package.manifest import write_manifest
from vlpack.package.output import check_free, check_space, output_folder
from vlpack.precision import Policy, QuantizationOptions, make_policy
from vlpack.tasks import AUTO, GENERATE, check_task, check_task_options, decide_task

if TYPE_CHECKING:
    from vlpack.calibration.layers import Calibration

PARTS = ("all", "text", "vision", "embedding")


class Progress(Protocol):
    """Told how far a build is."""

    def start(self, total: int) -> None:
        """``total`` bytes will be written."""

    def advance(self, written: int, path: str) -> None:
        """``written`` more bytes are, of the weight at ``path``."""

    def say(self, text: str, done: int = 0, total: int = 0) -> None:
        """Something else is being done, ``done`` of ``total`` where that is known."""


@dataclass(frozen=True)
class BuildResult:
    """A finished package.

    Args:
        folder: where it is.
        parts: part → (graph file, bytes of graph and data, storage labels with their bytes; 0 where shared).
        seconds: the build took.
        peak_memory: of this process so far, bytes.
        notes: what a user should know.
    """

    folder: Path
    parts: dict[str, tuple[str, int, dict[str, int]]]
    total_bytes: int
    source_bytes: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...]


def build(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
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
) -> BuildResult:
    """Build a package.

    Args:
        source: a checkpoint's folder, or a Hub id.
        output: the package's folder; it must not exist, unless ``force`` lets it replace a package.
        precision: fp32, fp16, int8 or int4; int8 on the CPU and fp16 elsewhere by default.
        execution_provider: cpu, cuda, dml or webgpu.
        part: all; or text, the decoder that runs by itself; or one of the parts of the whole.
        task: generate, embedding or reranker; auto is what can be told from the checkpoint, and else generate.
        vision_precision: of the vision encoder, where it is not to follow from ``precision``.
        extra_options: finer choices.
        revision: branch, tag or commit of a Hub id.
        cache_dir: where the Hub's files are kept.
        force: replace an existing package.
        threads: that encode weights; by default as many as there are cores, at most 8.
        progress: is told the bytes written.
        lora: LoRA adapters of peft, folders or Hub ids, merged into the weights one after another as these are read.
        calibrate: round the decoder's weights in int4 and int8 packages for the inputs that they meet in texts:
            ``self`` for such as the model writes itself, a file of plain text, or one of messages with images,
            ``*.jsonl``. It takes minutes, and for them an 8-bit package's disk space.

    Raises:
        VlpackError: with a sentence that says what is wrong and what to do; nothing is left at ``output``.
    """
    started = time.perf_counter()
    extra = ExtraOptions() if extra_options is None else extra_options
    _check_arguments(extra, part, threads)
    check_calibration(calibrate, part)
    check_task(task)
    execution_provider = str(execution_provider).lower()
    vision_precision = str(vision_precision).lower() if vision_precision else None
    precision = str(precision).lower() if precision else ("int8" if execution_provider == "cpu" else "fp16")
    quantization = extra.quantization(vision_precision, calibrated=calibrate is not None)
    # what is wrong with the options is told before anything is downloaded
    check_effects(extra, part, make_policy(precision, execution_provider, quantization), vision_precision)
    check_task_options(extra, task, precision)
    output = Path(os.path.expanduser(output))
    check_free(output, force=force)
    # adapters first: they are small, and what is wrong with them is told before the model is downloaded
    places = places_of(lora)
    adapters = open_adapters(places, cache_dir, extra.hf_token)
    found = resolve_checked(
        source,
        partial(
            check_settings,
            output=output,
            part=part,
            task=task,
            vision_precision=vision_precision,
            policy=partial(make_policy, precision, execution_provider, quantization),
        ),
        revision=revision,
        cache_dir=cache_dir,
        token=extra.hf_token,
    )
    notes = _unused_hub_options([source, *places], cache_dir, extra)

    with (
        ExitStack() as stack,
        Checkpoint.open(found.folder) as base,
        output_folder(output, force=force) as folder,
    ):
        for adapter in adapters:
            stack.callback(adapter.close)
        task, reasons = decide_task(base, task, found.repo_id or found.name)
        notes += reasons
        check_task_options(extra, task, precision)
        architecture = architecture_of(base, task)
        policy = make_policy(precision, execution_provider, quantization, architecture.precision_facts)
        check_tensors(architecture, base, policy)
        merged = merge_all(base, adapters, architecture)
        checkpoint = [base, *merged][-1]
        graphs = {_filename(p, extra): trace(p, policy) for p in _parts(architecture, part, policy, extra)}
        weights = [weight for graph in graphs.values() for weight in graph.weights]
        notes += [*_check_sharing(architecture, policy, extra), *adapter_notes(merged, found, weights)]
        origin = _origin(found, adapters)
        names = {graph.name: filename for filename, graph in graphs.items()}
        encoder = None if task == GENERATE else encoder_section(architecture, checkpoint, names)
        notes += write_beside(folder, architecture, checkpoint, policy, names, origin, encoder)
        own = _unshared(graphs, _shares(extra))
        total = sum(map(planned_bytes, own))
        check_space(folder, total)
        if progress:
            progress.start(total)
        hashes = _in_background(lambda: _hash_sources(checkpoint))
        calibration = _calibration(
            calibrate,
            part,
            architecture,
            checkpoint,
            graphs,
            partial(
                build,
                base.folder,
                folder / BESIDE,
                precision="int8",
                task=task,
                lora=[adapter.weights.folder for adapter in adapters],
                threads=threads,
            ),
            progress,
        )
        files = DataFiles(
            folder,
            checkpoint,
            threads=threads or default_threads(),
            share=_shares(extra),
            progress=progress.advance if progress else None,
            calibration=calibration,
        )
        files.save_all(graphs)
        shutil.rmtree(folder / BESIDE, ignore_errors=True)
        write_manifest(
            folder,
            checkpoint,
            origin,
            hashes.result(),
            policy,
            graphs,
            files.sha256,
            task,
            encoder,
            calibration.described() if calibration else None,
        )
        parts = {
            graph.name: (name, _size(folder, name), _labels(graph, weights))
            for (name, graph), weights in zip(graphs.items(), own, strict=True)
        }
        total_bytes = sum(path.stat().st_size for path in folder.iterdir())
        source_bytes = checkpoint.total_bytes()
    return BuildResult(
        folder=output,
        parts=parts,
        total_bytes=total_bytes,
        source_bytes=source_bytes,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory_bytes(),
        notes=tuple(notes),
    )


def _check_arguments(extra: object, part: str, threads: int | None) -> None:
    if not isinstance(extra, ExtraOptions):
        raise OptionError(
            "extra_options must be a vlpack.ExtraOptions.", "vlpack.ExtraOptions(block_size=64), for example."
        )
    if part not in PARTS:
        raise OptionError(f"Unknown part '{part}'.", "Parts are " + ", ".join(PARTS) + ".")
    if threads is not None and threads < 1:
        raise OptionError(f"threads is {threads}; it must be at least 1.")


def default_threads() -> int:
    """Cores, but no more than keep a disk busy: each thread holds a weight or a few slabs in memory."""
    return min(available_cores(), 8)


def _origin(found: ResolvedSource, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The checkpoint and what is merged into it, for the manifest."""
    merged = [adapter.described() for adapter in adapters]
    return {**found.described(), **({"adapters": merged} if merged else {})}


def _calibration(
    source: str | os.PathLike[str] | None,
    part: str,
    architecture: Architecture,
    checkpoint: Checkpoint,
    graphs: dict[str, Graph],
    eight_bits: Callable[..., BuildResult],
    progress: Progress | None,
) -> Calibration | None:
    """What the calibrated weights of ``graphs`` multiply; None where nothing is calibrated."""
    if source is None:
        return None
    from vlpack.calibration.model import CalibrationModel
    from vlpack.calibration.start import start_calibration

    say = progress.say if progress else say_nothing
    beside = eight_bits(progress=_Beside(say))
    files = {name: filename for name, (filename, _, _) in beside.parts.items()}
    weights = [weight for graph in graphs.values() for weight in graph.weights if weight.calibrated]
    policy = make_policy("int8", "cpu", QuantizationOptions(), architecture.precision_facts)
    parts = architecture.parts(GraphOptions(policy.ir_dtype))
    transforms = {weight.path: weight.transform for part in parts for weight in declare(part, policy)}
    model = CalibrationModel(beside.folder, files, architecture)
    return start_calibration(model, weights, transforms, checkpoint, source, say)


class _Beside:
    """The progress of the 8-bit package that is built to calibrate with, told in one sentence."""

    def __init__(self, say: Say) -> None:
        self._say, self._done, self._total = say, 0, 0

    def start(self, total: int) -> None:
        """``total`` bytes will be written."""
        self._total = total
        self.advance(0, "")

    def advance(self, written: int, path: str) -> None:
        """``written`` more bytes are."""
        self._done = min(self._done + written, self._total)
        self._say("building an 8-bit package to calibrate with", self._done, self._total)

    def say(self, text: str, done: int = 0, total: int = 0) -> None:
        """Nothing else is worth a word."""


def _check_cache(architecture: Architecture, policy: Policy) -> None:
    if policy.cache == "int8" and not architecture.decoder.qk_norm:
        raise OptionError(
            "kv_cache=int8 is for models that normalize their keys, as Qwen3's families do.",
            "How large this one's become is not known, so nothing can be said of what 8 bits would lose.",
        )


def _unused_hub_options(
    places: Sequence[str | os.PathLike[str]], cache_dir: str | os.PathLike[str] | None, extra: ExtraOptions
) -> list[str]:
    """Command lines for the builder name a cache for local folders too, so this is a note and not an error."""
    unused = [name for name, value in (("cache_dir", cache_dir), ("hf_token", extra.hf_token)) if value is not None]
    if not unused or not all(Path(place).expanduser().is_dir() for place in places):
        return []
    return [f"The checkpoint is a folder, so {' and '.join(unused)} had no effect."]


def _shares(extra: ExtraOptions) -> bool:
    return extra.shared_embeddings is not False


def _check_sharing(architecture: Architecture, policy: Policy, extra: ExtraOptions) -> list[str]:
    """A note where shared_embeddings was given and changes nothing; an error where it cannot be had."""
    if extra.shared_embeddings and not architecture.tied:
        raise OptionError("shared_embeddings=true needs a checkpoint with a tied head; this one is untied.")
    if extra.shared_embeddings is None:
        return []
    if not architecture.tied:
        return ["The embedding and the head are not tied, so shared_embeddings had no effect."]
    if policy.storage("text.embedding") != policy.storage("text.head"):
        return ["The embedding and the head are stored in different ways here, so shared_embeddings had no effect."]
    return []


def _in_background(work: Callable[[], Any]) -> Future[Any]:
    """``work`` in a thread that does not keep a failed or interrupted program from ending, unlike an executor's."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _parts(architecture: Architecture, part: str, policy: Policy, extra: ExtraOptions) -> list[Part]:
    _check_cache(architecture, policy)
    grouped = has_grouped_kernel(policy.provider, policy.ir_dtype)
    options = GraphOptions(policy.ir_dtype, extra.prune_lm_head is not False, grouped, policy.cache == "int8")
    if part == "text":
        return [architecture.decoder_part(options) if extra.exclude_embeds else architecture.text_part(options)]
    parts = architecture.parts(options)
    return [p for p in parts if part in ("all", p.name)]


def _filename(part: Part, extra: ExtraOptions) -> str:
    if part.name in ("text", "decoder") and extra.filename:
        return extra.filename
    return "model.onnx" if part.name == "text" else f"{part.name}.onnx"


def _unshared(graphs: dict[str, Graph], share: bool) -> list[list[Weight]]:
    """The weights of each graph, without those that are written already."""
    seen: set[Any] = set()
    lists: list[list[Weight]] = []
    for graph in graphs.values():
        lists.append([])
        for weight in graph.weights:
            if not share or weight.key not in seen:
                lists[-1].append(weight)
            seen.add(weight.key)
    return lists


def _hash_sources(checkpoint: Checkpoint) -> dict[str, str]:
    names = [*checkpoint.weight_files(), checkpoint.folder / "config.json"]
    return {path.name: checkpoint.sha256(path) for path in names}


def _size(folder: Path, filename: str) -> int:
    return sum(path.stat().st_size for path in (folder / filename, folder / f"{filename}.data") if path.is_file())


def _labels(graph: Graph, own: list[Weight]) -> dict[str, int]:
    """Bytes of the matrices that are written for this graph, by storage; 0 for what it shares."""
    labels: dict[str, int] = {}
    written = set(map(id, own))
    for weight in graph.weights:
        if weight.cols > 1:
            here = id(weight) in written
            label = weight.storage.label if here else f"{weight.storage.label} (shared)"
            labels[label] = labels.get(label, 0) + (planned_bytes([weight]) if here else 0)
    return labels


__all__ = ["PARTS", "BuildResult", "Progress", "build"]
