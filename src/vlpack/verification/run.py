"""The verification itself: runs package and reference on the same cases and compares them stage by stage."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.architectures import Architecture, architecture_of
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.gguf import check_mmproj
from vlpack.checkpoint.hub import resolve
from vlpack.errors import VerifyError
from vlpack.export.check import check_tensors
from vlpack.lora.merge import merge_all, open_adapters, places_of
from vlpack.package.manifest import damaged_files, graph_files, read_manifest
from vlpack.preprocess import Tokenizer
from vlpack.preprocess.mrope import mrope_positions
from vlpack.quantize.policy import Policy
from vlpack.system import checked_threads, peak_memory_bytes, total_memory_bytes
from vlpack.tasks import EMBEDDING, GENERATE, RERANKER, manifest_task
from vlpack.verification.answers import Answers, Asked, ask
from vlpack.verification.cases import Case
from vlpack.verification.graphs import Graphs, Run
from vlpack.verification.hybrid import stage_name
from vlpack.verification.metrics import (
    GRAPH_TOLERANCE,
    KL_TOLERANCE,
    QUANTIZED_TOLERANCE,
    Agreement,
    Difference,
    agreement,
    difference,
)
from vlpack.verification.prompt_checks import check_prompts, check_stops
from vlpack.verification.reference import Reference, Trace, in_prompt_order, require
from vlpack.verification.result import CaseResult, Finding, ImageMap, Report, Stage, WeightResult
from vlpack.verification.weights import Parameters, Weights, policy_of

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
POSITIONS = "positions"
"""Name of the one stage that does not depend on weights."""
RESULTS = {GENERATE: "logits", EMBEDDING: "vector", RERANKER: "score"}
"""Name of the last stage, by task."""
VECTOR_SLACK = 1.5
"""Factor of the error bound of an embedding: it is one vector, and other results are averaged over many positions."""
INNER_SLACK = 4.0
"""Factor of the error bound of stages inside of a layer: a norm over what a state gives magnifies errors, of which the
residual stream gets a share only."""
TIE = 1e-3
"""Largest gap between the reference's two best logits that counts as a tie, of which either token may win."""


def verify(
    package: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    cases: Sequence[Case] | None = None,
    tokens: int = 32,
    streamed: bool | None = None,
    threads: int | None = None,
    lora: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    progress: Progress | None = None,
    mmproj: str | os.PathLike[str] | None = None,
) -> Report:
    """Compare a package, stage by stage, with the checkpoint that it was built from.

    Args:
        package: the package's folder.
        reference: the checkpoint's folder or Hub id.
        cases: prompts with images and videos; by default the built-in ones (`built_in`).
        tokens: largest number of tokens of each answer.
        streamed: whether only one module of the reference is in memory at a time; by default, if the reference would
            take more than a third of the machine's memory.
        threads: number of threads of onnxruntime.
        lora: the LoRA adapters that were merged when the package was built, in the same order and form.
        progress: called with a description of each step.
        mmproj: GGUF file with the vision encoder of the model in the GGUF file ``reference``.

    Raises:
        VlpackError: the comparison could not be made.
    """
    require()
    started = time.perf_counter()
    progress = progress or (lambda text: None)
    folder = Path(package).expanduser()
    manifest = read_manifest(folder)
    task = manifest_task(folder, manifest)
    adapters = open_adapters(places_of(lora))
    check_mmproj(reference, mmproj)
    found = resolve(reference)
    with ExitStack() as stack, Checkpoint.open(found.folder, mmproj) as opened:
        for adapter in adapters:
            stack.callback(adapter.close)
        architecture, base = architecture_of(opened, task)
        if base.architecture != manifest["source"]["architecture"]:
            raise VerifyError(
                f"The package is a {manifest['source']['architecture']}, but the reference is a {base.architecture}.",
                "Give the checkpoint that the package was built from.",
            )
        policy = policy_of(manifest, architecture.precision_facts)
        check_tensors(architecture, base, policy)
        checkpoint = [base, *merge_all(base, adapters, architecture)][-1]
        if streamed is None:
            values = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
            streamed = 4 * values > (total_memory_bytes() or 1 << 62) / 3
        findings = [Finding("files", problem) for problem in damaged_files(folder, manifest, hashes=True)]
        results: list[CaseResult] = []
        weights: list[WeightResult] = []
        limits = policy.precision
        if not findings:  # damaged files are not examined any further
            comparison = _Comparison(folder, manifest, architecture, checkpoint, policy, streamed, threads, progress)
            facts = architecture.vision
            visual = (facts.image_token_id, facts.video_token_id) if facts else ()
            answers = ask(folder, cases, tokens=tokens, threads=threads, visual=visual, progress=progress)
            findings += check_prompts(answers, checkpoint, facts)
            findings += check_stops(answers, checkpoint)
            weights = comparison.compare_weights()
            results = comparison.compare(answers, weights)
            limits = comparison.limits
            findings += _judge_weights(weights) + _judge(results, limits)
    return Report(
        package=folder.resolve().name,
        reference=found.repo_id or found.folder.resolve().name,
        architecture=checkpoint.architecture,
        precision=policy.precision,
        provider=policy.provider,
        cases=results,
        weights=weights,
        findings=findings,
        versions=_versions(),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory_bytes(),
        streamed=streamed,
        limits=limits,
    )


class _Comparison:
    """The comparison of a package with a checkpoint."""

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        architecture: Architecture,
        checkpoint: Checkpoint,
        policy: Policy,
        streamed: bool,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self.folder, self.architecture, self.checkpoint, self.policy = folder, architecture, checkpoint, policy
        self.streamed, self.threads, self.progress = streamed, threads, progress
        # the original of a quantized checkpoint has other weights, and perhaps other channels
        self.is_original = "imported" in manifest and not any(map(checkpoint.packed, checkpoint.tensors))
        self.limits = policy.precision
        if self.is_original and manifest["imported"].get("bits") == 4:
            self.limits = "int4"
        elif self.is_original and policy.precision != "int4":
            self.limits = "int8"
        self.result = RESULTS[architecture.task]
        files = graph_files(folder, manifest)
        text = architecture.text
        self.graphs = Graphs(
            folder,
            files,
            architecture.decoder.prefix,
            text.hidden_size,
            text.num_hidden_layers,
            architecture.vision.depth if architecture.vision else 0,
            checked_threads(threads),
            self._factors,
        )
        loaded = {part: self.graphs.load(part) for part in files}
        self.weights = Weights(
            architecture, checkpoint, policy, loaded, manifest.get("calibration", manifest.get("imported"))
        )

    def _factors(self, layer: int, name: str) -> Array | None:
        """The factors by which the package multiplies the inputs of a matrix in a layer; None for none."""
        path = f"{self.architecture.decoder.prefix}.layers.{layer}.{name}"
        reads = next((weight.transform.reads for _, weight in self.weights.all() if weight.path == path), None)
        return None if reads is None else reads.along_columns(self.weights.scales(reads))

    def compare_weights(self) -> list[WeightResult]:
        """Compare every weight of the package with the checkpoint; none if it is not the one that was built from."""
        if self.is_original:
            return []
        self.progress("comparing weights")
        return list(self.weights.compare())

    def compare(self, answers: Answers, weights: Sequence[WeightResult]) -> list[CaseResult]:
        """Compare all cases with the reference as it is and, if weights differ, with the package's weights in it."""
        asked = answers.asked
        reference = self._reference(stored=False)
        for one in asked:
            self.progress(f"reference: {one.case.name}")
            one.original = self._trace(reference, one)
        del reference
        totals = [self._run(one, exact=False) for one in asked]
        other = (
            self._reference(stored=True) if self.is_original or any(weight.error > 0 for weight in weights) else None
        )
        results = []
        for one, total in zip(asked, totals, strict=True):
            self.progress(f"graph: {one.case.name}")
            assert one.original is not None
            own = one.original if other is None else self._trace(other, one)
            graph = _differences(self._run(one, exact=True), own, self.result)
            results.append(self._result(one, answers.tokenizer, graph, total))
            one.original = None
        return results

    def _reference(self, *, stored: bool) -> Reference:
        self.progress("loading the reference" + (" with the package's weights" if stored else ""))
        self.parameters = Parameters(self.weights, stored=stored)
        prefix, head = self.architecture.decoder.prefix, self.weights.head(self.architecture.task, stored=stored)
        return Reference(
            self.checkpoint.folder,
            prefix,
            self.parameters,
            streamed=self.streamed,
            head=head,
            second_stage=self.weights.second_stage() if stored else None,
        )

    def _trace(self, reference: Reference, one: Asked) -> Trace:
        facts, arrays = self.architecture.vision, {"input_ids": one.ids}
        if facts is not None and one.prompt.has_images:
            arrays = one.prompt.transformers_arrays(facts.image_token_id, facts.video_token_id)
            answer = one.ids[:, arrays["input_ids"].shape[1] :]
            arrays["input_ids"] = np.concatenate([arrays["input_ids"], answer], axis=1)
            arrays["mm_token_type_ids"] = np.concatenate([arrays["mm_token_type_ids"], np.zeros_like(answer)], axis=1)
        trace = in_prompt_order(reference(arrays), one.prompt)
        self.parameters.forget()  # the next step runs a graph, which needs the memory
        return trace

    def _run(self, one: Asked, *, exact: bool) -> Run:
        return self.graphs.run(one.ids, one.prompt, self._positions(one), exact=exact)

    def _positions(self, one: Asked) -> Array:
        """The position ids that vlpack makes. The runtime makes its own; only the answer's tokens test those."""
        facts = self.architecture.vision
        if facts is None:
            return np.arange(one.ids.shape[1], dtype=np.int64)[None]
        return mrope_positions(one.ids[0], one.prompt.grids, facts.image_token_id, facts.spatial_merge_size)[:, None]

    def _result(self, one: Asked, tokenizer: Tokenizer, graph: list[tuple[str, Difference]], run: Run) -> CaseResult:
        assert one.original is not None
        total = _differences(run, one.original, self.result)
        tolerance, limit = GRAPH_TOLERANCE[self.policy.dtype], QUANTIZED_TOLERANCE[self.limits]
        if self.policy.dtype == "float32" and "fp16" in (self.policy.options.vision, self.policy.precision):
            tolerance = GRAPH_TOLERANCE["float16"]
        stages = [
            Stage(
                name,
                None if name == POSITIONS else exact,
                whole,
                tolerance,
                limit * (INNER_SLACK if name in run.inner else 1),
            )
            for (name, exact), (_, whole) in zip(graph, total, strict=True)
        ]
        if self.result == RESULTS[EMBEDDING]:
            stages[-1] = replace(stages[-1], limit=VECTOR_SLACK * limit)
        generates = self.architecture.task == GENERATE
        logits = one.original.result if generates else np.zeros((0, 2))  # [S, V]
        start = one.prompt.input_ids.shape[1] - 1
        best = np.argsort(logits[start : start + len(one.tokens)], axis=1)[:, :-3:-1]
        decisive = np.take_along_axis(logits[start : start + len(one.tokens)], best, axis=1)
        wanted = [int(token) for token in best[:, 0]]
        return CaseResult(
            name=one.case.name,
            prompt=one.case.prompt,
            images=list(one.case.labels),
            stages=stages,
            logits=agreement(run.result, logits) if generates else Agreement([], []),
            tokens=one.tokens,
            pieces=[tokenizer.decode([token], skip_special_tokens=False) for token in one.tokens],
            reference_tokens=wanted,
            reference_pieces=[tokenizer.decode([token], skip_special_tokens=False) for token in wanted],
            decisive=[float(gap) for gap in decisive[:, 0] - decisive[:, 1]],
            maps=self._maps(one, run),
        )

    def _maps(self, one: Asked, run: Run) -> list[ImageMap]:
        if run.features is None or one.original is None or one.original.features is None:
            return []
        gap = np.linalg.norm(run.features - one.original.features, axis=1)
        size = np.linalg.norm(one.original.features, axis=1)
        relative = gap / np.maximum(size, 1e-12)
        maps, first = [], 0
        facts = self.architecture.vision
        assert facts is not None
        images = iter(one.case.images)
        for (_, height, width), of_video in zip(one.prompt.grids, one.prompt.is_video, strict=True):
            rows, columns = int(height) // facts.spatial_merge_size, int(width) // facts.spatial_merge_size
            values = relative[first : first + rows * columns].reshape(rows, columns)
            first += rows * columns
            if of_video:
                continue
            image = next(images)
            small = image.convert("RGB")
            small.thumbnail((640, 640))
            file = io.BytesIO()
            small.save(file, "PNG")
            maps.append(ImageMap([[float(value) for value in row] for row in values], file.getvalue()))
        return maps


def _differences(run: Run, trace: Trace, result: str) -> list[tuple[str, Difference]]:
    """The differences of all stages, with their names, in the order of the computation."""
    stages: list[tuple[str, Any, Any]] = [(POSITIONS, run.positions, trace.positions)]
    for index, pair in enumerate(zip(run.blocks, trace.blocks, strict=True)):
        stages.append((f"input of vision block {index}", *pair))
    if run.features is not None:
        stages.append(("vision features", run.features, trace.features))
        stages += [(f"DeepStack {i}", *pair) for i, pair in enumerate(zip(run.levels, trace.levels, strict=True))]
    if run.embeds.size:
        stages.append(("embedding", run.embeds, trace.embeds))
    for index, (value, wanted) in enumerate(zip(run.layers, trace.layers, strict=True)):
        inner = [name for name in run.inner if name.startswith(stage_name(index, ""))]
        stages += [(name, run.inner[name], trace.inner[name]) for name in inner]
        stages.append((f"layer {index}", value, wanted[-len(value) :]))
    stages.append((result, run.result, trace.result))
    return [(name, difference(value, wanted)) for name, value, wanted in stages]


def _judge_weights(weights: Sequence[WeightResult]) -> list[Finding]:
    altered = [weight for weight in weights if not weight.same]
    if not altered:
        return []
    worst = max(altered, key=lambda weight: weight.error - weight.expected)
    more = f" The same holds for {len(altered) - 1} more." if len(altered) > 1 else ""
    return [
        Finding(
            "weights",
            f"{worst.path} in the {worst.part} graph is not what a build of the checkpoint stores: its relative error "
            f"is {worst.error:.2g}, where {worst.storage} explains {worst.expected:.2g}.{more}",
        )
    ]


def _judge(cases: Sequence[CaseResult], limits: str) -> list[Finding]:
    findings = []
    for case in cases:
        if (stage := case.first_bad) and stage.violation:
            apart, bound = stage.violation
            how = "in exact arithmetic with equal weights" if apart is stage.graph else "as the package runs"
            findings.append(
                Finding(
                    stage.name,
                    f"{case.name}: {stage.name} differs from the reference by {apart.relative:.2g} (relative L2) "
                    f"{how}; rounding explains at most {bound:.2g}.",
                )
            )
        elif case.logits.mean_kl > KL_TOLERANCE[limits]:
            findings.append(
                Finding(
                    "logits",
                    f"{case.name}: the next token's distribution differs from the reference's by "
                    f"{case.logits.mean_kl:.2g} nats; {limits} explains at most "
                    f"{KL_TOLERANCE[limits]:g}.",
                )
            )
        elif limits == "fp32" and (at := _wrong_token(case)) is not None:
            findings.append(
                Finding(
                    "tokens",
                    f"{case.name}: token {at + 1} of the answer is {case.pieces[at]!r} through the runtime, and "
                    f"{case.reference_pieces[at]!r} in the reference, although the graphs agree.",
                )
            )
    return findings


def _wrong_token(case: CaseResult) -> int | None:
    at = case.same_tokens
    return None if at == len(case.tokens) or case.decisive[at] < TIE else at


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("vlpack", "transformers", "torch", "onnxruntime", "onnxruntime-genai", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
