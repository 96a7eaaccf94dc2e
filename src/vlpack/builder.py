"""The whole story on one page: checkpoint → architecture → graphs → weights → package."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from vlpack.architectures import Architecture, Part, architecture_of
from vlpack.architectures.base import GraphOptions
from vlpack.checkpoint import Checkpoint
from vlpack.config import Section
from vlpack.datafile import DataFiles, planned_bytes
from vlpack.errors import CheckpointError, OptionError
from vlpack.graph import Graph, Weight, declare, trace
from vlpack.hub import resolve
from vlpack.memory import peak_memory_bytes
from vlpack.options import ExtraOptions, check_effects
from vlpack.package.genai_config import genai_config
from vlpack.package.manifest import write_manifest
from vlpack.package.model_card import model_card
from vlpack.package.output import check_free, check_space, output_folder
from vlpack.package.processor_config import processor_config
from vlpack.precision import Policy, make_policy
from vlpack.preprocess import ImageProcessor, PromptBuilder, Tokenizer
from vlpack.safefile import locate

PARTS = ("all", "text", "vision", "embedding")

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
"""Files that go into the package whole, where the checkpoint has them."""

UNUSED = ("*.rotary_emb.inv_freq", "*.rotary_pos_emb.inv_freq")
"""Buffers that old checkpoints carry and that are computed from the config."""


class Progress(Protocol):
    """Told how far a build is."""

    def start(self, total: int) -> None:
        """``total`` bytes will be written."""

    def advance(self, written: int, path: str) -> None:
        """``written`` more bytes are, of the weight at ``path``."""


@dataclass(frozen=True)
class BuildResult:
    """A finished package.

    Args:
        folder: where it is.
        parts: part → (graph file, bytes of graph and data, storage labels with their bytes).
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
    vision_precision: str | None = None,
    extra_options: ExtraOptions | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Build a package.

    Args:
        source: a checkpoint's folder, or a Hub id.
        output: the package's folder; it must not exist, unless ``force`` lets it replace a package.
        precision: fp32, fp16, int8 or int4; int8 on the CPU and fp16 elsewhere by default.
        execution_provider: cpu, cuda, dml or webgpu.
        part: all; or text, the decoder that runs by itself; or one of the parts of the whole.
        vision_precision: of the vision encoder, where it is not to follow from ``precision``.
        extra_options: finer choices.
        revision: branch, tag or commit of a Hub id.
        cache_dir: where the Hub's files are kept.
        force: replace an existing package.
        threads: that encode weights; by default as many as there are cores, at most 8.
        progress: is told the bytes written.

    Raises:
        VlpackError: with a sentence that says what is wrong and what to do; nothing is left at ``output``.
    """
    started = time.perf_counter()
    extra = extra_options or ExtraOptions()
    if part not in PARTS:
        raise OptionError(f"Unknown part '{part}'.", "Parts are " + ", ".join(PARTS) + ".")
    if threads is not None and threads < 1:
        raise OptionError(f"threads is {threads}; it must be at least 1.")
    precision = precision or ("int8" if execution_provider == "cpu" else "fp16")
    quantization = extra.quantization(vision_precision)
    # what is wrong with the options is told before anything is downloaded
    check_effects(extra, part, make_policy(precision, execution_provider, quantization, 1), vision_precision)
    check_free(Path(output), force=force)
    found = resolve(source, revision=revision, cache_dir=cache_dir, token=extra.hf_token)
    notes = _unused_hub_options(source, cache_dir, extra)

    with Checkpoint.open(found.folder) as checkpoint, output_folder(Path(output), force=force) as folder:
        architecture = architecture_of(checkpoint)
        policy = make_policy(precision, execution_provider, quantization, architecture.text.num_hidden_layers)
        check_tensors(architecture, checkpoint, policy)
        graphs = {_filename(p, extra): trace(p, policy) for p in _parts(architecture, part, policy, extra)}
        notes += _check_sharing(architecture, policy, extra)
        origin: dict[str, Any] = (
            {"repo_id": found.repo_id, "commit": found.commit} if found.repo_id else {"name": _name(found.folder)}
        )
        notes += _write_beside(folder, architecture, checkpoint, policy, graphs, origin)
        total = sum(planned_bytes(weights) for weights in _unshared(graphs, _shares(extra)))
        check_space(folder, total)
        if progress:
            progress.start(total)
        hashes = _in_background(lambda: _hash_sources(checkpoint))
        files = DataFiles(
            folder,
            checkpoint,
            threads=threads or default_threads(),
            share=_shares(extra),
            progress=progress.advance if progress else None,
        )
        for filename, graph in graphs.items():
            files.save(graph, filename)
        write_manifest(folder, checkpoint, origin, hashes.result(), policy, graphs, files.sha256)
        parts = {graph.name: (name, _size(folder, name), _labels(graph)) for name, graph in graphs.items()}
        total_bytes = sum(path.stat().st_size for path in folder.iterdir())
        source_bytes = checkpoint.total_bytes()
    return BuildResult(
        folder=Path(output),
        parts=parts,
        total_bytes=total_bytes,
        source_bytes=source_bytes,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory_bytes(),
        notes=tuple(notes),
    )


def default_threads() -> int:
    """Cores, but no more than keep a disk busy: each thread holds a weight or a few slabs in memory."""
    return min(os.cpu_count() or 1, 8)


def _name(folder: Path) -> str:
    """The folder's own name, for the manifest: where it lies is nobody's business."""
    return folder.resolve().name.encode(errors="replace").decode()


def _unused_hub_options(
    source: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None, extra: ExtraOptions
) -> list[str]:
    """Command lines for the builder name a cache for local folders too, so this is a note and not an error."""
    unused = [name for name, value in (("cache_dir", cache_dir), ("hf_token", extra.hf_token)) if value is not None]
    if not unused or not Path(source).expanduser().is_dir():
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
    if policy.storage("model.language_model.embed_tokens") != policy.storage("lm_head"):
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
    options = GraphOptions(policy.ir_dtype, extra.prune_lm_head is not False)
    if part == "text" and not extra.exclude_embeds:
        return [architecture.text_part(options)]
    parts = architecture.parts(options)
    wanted = "decoder" if part == "text" else part
    return [p for p in parts if wanted in ("all", p.name)]


def _filename(part: Part, extra: ExtraOptions) -> str:
    if part.name in ("text", "decoder") and extra.filename:
        return extra.filename
    return "model.onnx" if part.name == "text" else f"{part.name}.onnx"


def _unshared(graphs: dict[str, Graph], share: bool) -> list[list[Weight]]:
    """The weights of each graph, without those that an earlier one has written already."""
    seen: set[Any] = set()
    lists = []
    for graph in graphs.values():
        fresh = [w for w in graph.weights if not share or (w.sources, w.storage) not in seen]
        seen |= {(w.sources, w.storage) for w in fresh}
        lists.append(fresh)
    return lists


def check_tensors(architecture: Architecture, checkpoint: Checkpoint, policy: Policy) -> None:
    """Every tensor of the whole model is there in its shape, and the checkpoint holds nothing else.

    Raises:
        CheckpointError: the first few that are missing, misshapen or unknown are named.
    """
    if checkpoint.config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: the checkpoint is quantized already (quantization_config).",
            "Use the original one, in bfloat16 or float32.",
        )
    options = GraphOptions(policy.ir_dtype)
    weights = [w for part in architecture.parts(options) for w in declare(part.module, policy)]
    wanted = {source.name: source.shape for weight in weights for source in weight.sources}
    missing = [name for name in wanted if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: {_some(missing)} missing from the checkpoint.",
            "The config and the weights do not belong together, or the checkpoint is not complete.",
        )
    for name, shape in wanted.items():
        found = checkpoint.tensors[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{found.file}: the tensor {name} has the shape {list(found.shape)} where config.json asks for "
                f"{list(shape)}.",
                "The config and the weights do not belong together.",
            )
        if found.dtype.kind not in "fV" or found.dtype.itemsize < 2:
            raise CheckpointError(
                f"{found.file}: the tensor {name} is of type {found.dtype}; weights must be bfloat16, float16, float32 "
                "or float64.",
                "Quantized checkpoints are not supported: use the original one.",
            )
    unused = (*UNUSED, "lm_head.weight") if architecture.tied else UNUSED
    extra = [
        name
        for name in checkpoint.tensors
        if name not in wanted and not any(fnmatchcase(name, pattern) for pattern in unused)
    ]
    if extra:
        raise CheckpointError(
            f"{checkpoint.folder}: the model has no place for {_some(extra)}.",
            "The config and the weights do not belong together, or this is another model.",
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more are" if len(names) > 3 else (" are" if len(names) > 1 else " is")
    return f"{'tensors' if len(names) > 1 else 'tensor'} {shown}{more}"


def _write_beside(
    folder: Path,
    architecture: Architecture,
    checkpoint: Checkpoint,
    policy: Policy,
    graphs: dict[str, Graph],
    origin: dict[str, Any],
) -> list[str]:
    """Everything but the graphs and the manifest; returns notes for the user."""
    names = {graph.name: filename for filename, graph in graphs.items()}
    for name in COPIED:
        _copy(checkpoint, name, folder)
    generation = checkpoint.json("generation_config.json") or {}
    config = genai_config(architecture, names, policy.provider, Section(checkpoint.config), generation)
    _write_json(folder / "genai_config.json", config)
    if "vision" in names:
        nested = (checkpoint.json("processor_config.json") or {}).get("image_processor")
        if isinstance(nested, dict):  # transformers 5 keeps the settings there; that name is the runtime's here
            _write_json(folder / "preprocessor_config.json", nested)
        processor = ImageProcessor.from_folder(checkpoint.folder)
        _write_json(folder / "processor_config.json", processor_config(architecture, processor))
    card = model_card(origin, policy, config["model"]["type"], names)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if not (folder / "tokenizer.json").is_file():
        return ["The checkpoint has no tokenizer.json, so the package runs on token ids only; `vlpack run` needs one."]
    Tokenizer.from_folder(checkpoint.folder)
    templates = ("chat_template.jinja", "chat_template.json")
    in_config = (checkpoint.json("tokenizer_config.json") or {}).get("chat_template") is not None
    if not in_config and not any((folder / name).is_file() for name in templates):
        return ["The checkpoint has no chat template, so `vlpack run` will not work; the runtime itself needs none."]
    # what is wrong with tokenizer or template is told now, not when the package is first used
    image_token_id = architecture.vision.image_token_id if "vision" in names else None
    PromptBuilder.from_folder(checkpoint.folder, image_token_id=image_token_id)
    return []


def _copy(checkpoint: Checkpoint, name: str, folder: Path) -> None:
    """A file of the checkpoint into the package, where there is one; links that lead out of it are refused."""
    target = locate(checkpoint.folder, name)
    if target is None:
        return
    if not os.access(target, os.R_OK):
        raise CheckpointError(f"{checkpoint.folder / name} cannot be read: permission denied.")
    shutil.copyfile(target, folder / name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _hash_sources(checkpoint: Checkpoint) -> dict[str, str]:
    names = [*checkpoint.weight_files(), checkpoint.folder / "config.json"]
    return {path.name: checkpoint.sha256(path) for path in names}


def _size(folder: Path, filename: str) -> int:
    return sum(path.stat().st_size for path in (folder / filename, folder / f"{filename}.data") if path.is_file())


def _labels(graph: Graph) -> dict[str, int]:
    labels: dict[str, int] = {}
    for weight in graph.weights:
        if weight.cols > 1:
            labels[weight.storage.label] = labels.get(weight.storage.label, 0) + planned_bytes([weight])
    return labels


__all__ = ["PARTS", "BuildResult", "Progress", "build", "check_tensors"]
