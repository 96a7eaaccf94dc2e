"""The plan of a build, made before anything is written: options are checked, the checkpoint found, graphs traced."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vlpack.architectures import Architecture, Part, architecture_of
from vlpack.architectures.ports import GraphOptions
from vlpack.architectures.task import decide_task
from vlpack.calibration.bits import check_reachable
from vlpack.calibration.options import check_bits, check_calibration
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats import Unpacked, detect
from vlpack.checkpoint.gguf import check_mmproj
from vlpack.checkpoint.hub import ResolvedSource, is_folder
from vlpack.errors import OptionError, option
from vlpack.export.check import check_tensors, ignored_notes
from vlpack.export.graph import Graph, Weight, trace
from vlpack.export.imported import OWN_BITS, described, kept_rules, notes, outcomes
from vlpack.export.preflight import check_settings, resolve_checked
from vlpack.export.retrieval import encoder_section
from vlpack.export.weights import planned_bytes
from vlpack.lora.merge import Adapter, adapter_notes, merge_all, open_adapters, places_of
from vlpack.options import ExtraOptions, check_effects, check_task_options
from vlpack.quantize.policy import Policy, PrecisionFacts, QuantizationOptions, make_policy
from vlpack.tasks import AUTO, GENERATE, check_task

PARTS = ("all", "text", "vision", "embedding")

Place = str | os.PathLike[str]


@dataclass(frozen=True)
class BuildOptions:
    """The options of a build, checked as far as possible without a checkpoint.

    The fields are arguments of `vlpack.build`, where they are described; ``extra`` is its ``extra_options``.
    ``own_bits`` says that no precision was given, so that a quantized checkpoint keeps its own bits.

    Raises:
        OptionError: an option is unknown, or has no effect in combination with the others.
    """

    precision: str | None = None
    execution_provider: str = "cpu"
    part: str = "all"
    task: str = AUTO
    vision_precision: str | None = None
    extra: ExtraOptions = field(default_factory=ExtraOptions)
    revision: str | None = None
    cache_dir: Place | None = None
    threads: int | None = None
    lora: Place | Sequence[Place] = ()
    calibrate: Place | None = None
    bits: float | None = None
    own_bits: bool = False
    mmproj: Place | None = None

    def __post_init__(self) -> None:
        for name in ("execution_provider", "vision_precision", "precision"):
            value = getattr(self, name)
            object.__setattr__(self, name, str(value).lower() if value else None)
        if self.bits is not None:
            mixed = self.extra.matmul_mixed_precision if isinstance(self.extra, ExtraOptions) else None
            check_bits(self.bits, self.precision, self.execution_provider, self.calibrate, mixed or {})
            object.__setattr__(self, "precision", "int4")
        if self.precision is None:
            object.__setattr__(self, "own_bits", True)
            object.__setattr__(self, "precision", "int8" if self.execution_provider == "cpu" else "fp16")
        _check_arguments(self.extra, self.part, self.threads)
        check_calibration(self.calibrate, self.part)
        check_task(self.task)
        check_effects(self.extra, self.part, self.policy(), self.vision_precision)
        check_task_options(self.extra, self.task, str(self.precision))

    @property
    def quantization(self) -> QuantizationOptions:
        """The options of quantization that follow from these options."""
        calibrated = self.calibrate is not None
        # Calibrated, a 4-bit head costs 0.0015 of KL and saves a twentieth of a token's time (docs/results.md). With
        # a number of bits the user asks for accuracy, and the CPU alone scores the likeliest tokens again.
        narrow = calibrated and self.precision == "int4" and self.execution_provider == "cpu" and self.bits is None
        return self.extra.quantization(self.vision_precision, calibrated=calibrated, head="int4" if narrow else None)

    def policy(self, facts: PrecisionFacts | None = None) -> Policy:
        """The precision policy for a model with these facts, or for any model if they are None."""
        return make_policy(str(self.precision), self.execution_provider, self.quantization, facts or PrecisionFacts())

    def for_checkpoint(self, checkpoint: Checkpoint) -> BuildOptions:
        """These options, with the precision of a quantized checkpoint's own bits if none was given.

        Raises:
            CheckpointError: the checkpoint is quantized in a way that vlpack does not read.
            OptionError: an option has no effect with that precision.
        """
        declared = detect(checkpoint) if self.own_bits else None
        if declared is None:
            return self
        eight = "int8" if self.execution_provider == "cpu" else "fp16"
        return replace(self, precision="int4" if declared.bits == 4 else eight)

    @property
    def keeps_nothing(self) -> str:
        """The given option that asks for other values than a quantized checkpoint's; empty if there is none."""
        for name in ("block_size", "is_symmetric", "balance", "rotation"):
            value = getattr(self.extra, name)
            if value is not None and not (name in ("balance", "rotation") and value is False):
                return option(f"extra.{name}", value)
        return ""

    @property
    def shares(self) -> bool:
        """Whether weights that are equal in several graphs are stored once."""
        return self.extra.shared_embeddings is not False


@dataclass(frozen=True)
class BuildPlan:
    """The plan of a build: the graphs and weights to write, and the checkpoint to read them from.

    Args:
        options: options of the build.
        place: folder or GGUF file of the checkpoint.
        task: task of the model, one of `vlpack.tasks.TASKS`.
        architecture: architecture of the model.
        checkpoint: checkpoint to read weights from, with adapters merged.
        adapters: LoRA adapters that are merged.
        policy: precision policy, which gives each weight its storage.
        graphs: file name → graph, whose weights are not read yet.
        origin: description of the checkpoint and the adapters for the manifest.
        imported: description of a quantized checkpoint and of what became of its matrices, for the manifest; None for
            other checkpoints.
        notes: sentences that the user should read.
    """

    options: BuildOptions
    place: Path
    task: str
    architecture: Architecture
    checkpoint: Checkpoint
    adapters: Sequence[Adapter]
    policy: Policy
    graphs: dict[str, Graph]
    origin: dict[str, Any]
    imported: dict[str, Any] | None
    notes: tuple[str, ...]

    @cached_property
    def names(self) -> dict[str, str]:
        """File names of the graphs, by part."""
        return {graph.name: filename for filename, graph in self.graphs.items()}

    @cached_property
    def retrieval(self) -> dict[str, Any] | None:
        """The manifest's section about an embedding model or reranker; None for a model that generates."""
        return None if self.task == GENERATE else encoder_section(self.architecture, self.checkpoint, self.names)

    @cached_property
    def own_weights(self) -> list[list[Weight]]:
        """The weights that are written for each graph, without those that it shares with an earlier graph."""
        seen: set[Any] = set()
        lists: list[list[Weight]] = []
        for graph in self.graphs.values():
            lists.append([])
            for weight in graph.weights:
                if not self.options.shares or weight.key not in seen:
                    lists[-1].append(weight)
                seen.add(weight.key)
        return lists

    @property
    def total_bytes(self) -> int:
        """Number of bytes of weights that will be written."""
        return sum(map(planned_bytes, self.own_weights))

    @property
    def calibrated_weights(self) -> list[Weight]:
        """The weights that are calibrated, that is rounded by GPTQ."""
        return [weight for graph in self.graphs.values() for weight in graph.weights if weight.calibrated]


def plan_build(source: Place, output: Path, options: BuildOptions, stack: ExitStack) -> BuildPlan:
    """Finds the checkpoint, checks that it can be built with these options, and traces the graphs.

    Args:
        source: folder of a checkpoint, a GGUF file, or a Hub id.
        output: folder of the package, which need not exist.
        options: options of the build.
        stack: exit stack that closes the checkpoint and the adapters.

    Raises:
        VlpackError: the checkpoint or an adapter is missing, not supported, or not compatible with the options.
    """
    extra = options.extra
    check_mmproj(source, options.mmproj)
    # adapters first: they are small, so that errors in them are reported before the model is downloaded
    places = places_of(options.lora)
    adapters = open_adapters(places, options.cache_dir, extra.hf_token)
    for adapter in adapters:
        stack.callback(adapter.close)

    def check(checkpoint: Checkpoint, *, room: bool) -> None:
        check_settings(
            checkpoint,
            output=output,
            part=options.part,
            task=options.task,
            vision_precision=options.vision_precision,
            policy=options.for_checkpoint(checkpoint).policy,
            room=room,
        )

    found = resolve_checked(
        source,
        check,
        revision=options.revision,
        cache_dir=options.cache_dir,
        token=extra.hf_token,
        mmproj=options.mmproj,
    )
    opened = stack.enter_context(Checkpoint.open(found.folder, options.mmproj))
    options = options.for_checkpoint(opened)
    task, reasons = decide_task(opened, options.task, found.repo_id or found.name)
    check_task_options(extra, task, str(options.precision))
    architecture, base = architecture_of(opened, task)
    policy = options.policy(architecture.precision_facts)
    check_tensors(architecture, base, policy)
    merged = merge_all(base, adapters, architecture)
    imported, policy, outcome = _import(architecture, base, [base, *merged][-1], policy, options)
    graphs = trace_graphs(architecture, policy, options)
    weights = [weight for graph in graphs.values() for weight in graph.weights]
    check_reachable(weights, policy, architecture.precision_facts, options.bits)
    fitted = [weight for weight in weights if weight.calibrated and weight.role != "text.head"]
    if options.calibrate is not None and imported is not None and not fitted:
        raise OptionError(
            f"{option('calibrate')} has no effect: every matrix that it could round keeps the checkpoint's codes.",
            f"Leave {option('calibrate')} out, or choose another {option('precision')}.",
        )
    return BuildPlan(
        options=options,
        place=found.folder,
        task=task,
        architecture=architecture,
        checkpoint=[base, *merged][-1],
        adapters=adapters,
        policy=policy,
        graphs=graphs,
        origin=_origin(found, adapters),
        imported=imported,
        notes=(
            *opened.notes,
            *outcome,
            *_unused_hub_options([source, *places], options.cache_dir, extra),
            *reasons,
            *ignored_notes(architecture, base),
            *_check_sharing(architecture, policy, extra),
            *adapter_notes(merged, found, weights),
        ),
    )


def _import(
    architecture: Architecture, base: Checkpoint, merged: Checkpoint, policy: Policy, options: BuildOptions
) -> tuple[dict[str, Any] | None, Policy, list[str]]:
    """Plans which matrices of a quantized checkpoint keep their codes.

    Returns:
        A description for the manifest, the policy with these matrices, and notes for the user.

    Raises:
        CheckpointError: a scale of the checkpoint is not usable.
    """
    if not isinstance(base, Unpacked):
        return None, policy, []
    base.check_values()
    bits = OWN_BITS if options.own_bits else ()
    found = outcomes(architecture, policy, base, merged, bits, options.keeps_nothing)
    kept = replace(policy.options, kept=kept_rules(found))
    policy = make_policy(policy.precision, policy.provider, kept, architecture.precision_facts)
    return described(base.declared, found), policy, notes(base.declared, found)


def trace_graphs(architecture: Architecture, policy: Policy, options: BuildOptions) -> dict[str, Graph]:
    """The graphs of the parts that are built, by file name."""
    parts = _parts(architecture, options.part, policy, options.extra)
    return {_filename(part, options.extra): trace(part, policy) for part in parts}


def _check_arguments(extra: object, part: str, threads: int | None) -> None:
    if not isinstance(extra, ExtraOptions):
        raise OptionError(
            "extra_options must be a vlpack.ExtraOptions.", "Pass vlpack.ExtraOptions(block_size=64), for example."
        )
    if part not in PARTS:
        raise OptionError(f"Unknown part '{part}'.", "Choose one of " + ", ".join(PARTS) + ".")
    if threads is not None and threads < 1:
        raise OptionError(f"{option('threads')} is {threads}; it must be at least 1.")


def _origin(found: ResolvedSource, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Description of the checkpoint and the merged adapters for the manifest."""
    merged = [adapter.described() for adapter in adapters]
    return {**found.described(), **({"adapters": merged} if merged else {})}


def _check_cache(architecture: Architecture, policy: Policy) -> None:
    if policy.cache == "int8" and not architecture.decoder.qk_norm:
        raise OptionError(
            f"{option('extra.kv_cache', 'int8')} is for models that normalize their keys, such as Qwen3's families.",
            f"This model's keys have no known bound, so the loss by 8 bits cannot be estimated; leave "
            f"{option('extra.kv_cache')} out.",
        )


def _unused_hub_options(
    places: Sequence[str | os.PathLike[str]], cache_dir: str | os.PathLike[str] | None, extra: ExtraOptions
) -> list[str]:
    """A note on Hub options that local folders do not need; no error, because callers of other builders set them."""
    given = (("cache_dir", cache_dir), ("extra.hf_token", extra.hf_token))
    unused = [option(name) for name, value in given if value is not None]
    if not unused or not all(is_folder(place) for place in places):
        return []
    kind = "folder" if Path(places[0]).expanduser().is_dir() else "file"
    return [f"The checkpoint is a {kind}, so {' and '.join(unused)} had no effect."]


def _check_sharing(architecture: Architecture, policy: Policy, extra: ExtraOptions) -> list[str]:
    """A note if ``shared_embeddings`` is given but changes nothing.

    Raises:
        OptionError: the embedding and the head cannot be shared, because they are not tied.
    """
    if extra.shared_embeddings and not architecture.tied:
        raise OptionError(
            f"{option('extra.shared_embeddings', True)} needs a checkpoint with a tied head; this one's is untied.",
            f"Leave {option('extra.shared_embeddings')} out.",
        )
    if extra.shared_embeddings is None:
        return []
    if not architecture.tied:
        return [f"The embedding and the head are not tied, so {option('extra.shared_embeddings')} had no effect."]
    if policy.storage("text.embedding") != policy.storage("text.head"):
        return [
            "The embedding and the head are stored in different ways here, "
            f"so {option('extra.shared_embeddings')} had no effect."
        ]
    return []


def _parts(architecture: Architecture, part: str, policy: Policy, extra: ExtraOptions) -> list[Part]:
    _check_cache(architecture, policy)
    options = GraphOptions.of_policy(policy, last_logits=extra.prune_lm_head is not False)
    if part == "text":
        return [architecture.decoder_part(options) if extra.exclude_embeds else architecture.text_part(options)]
    parts = architecture.parts(options)
    return [p for p in parts if part in ("all", p.name)]


def _filename(part: Part, extra: ExtraOptions) -> str:
    if part.name in ("text", "decoder") and extra.filename:
        return extra.filename
    return "model.onnx" if part.name == "text" else f"{part.name}.onnx"
