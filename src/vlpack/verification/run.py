"""The verification itself: the package and the reference over the same cases, compared stage by stage."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.architectures import Architecture, architecture_of
from vlpack.checkpoint import Checkpoint
from vlpack.errors import VerifyError
from vlpack.fit import check_tensors
from vlpack.hub import resolve
from vlpack.loading import checked_threads
from vlpack.lora import merge_all, open_adapters, places_of
from vlpack.memory import peak_memory_bytes, total_memory_bytes
from vlpack.package.manifest import damaged_files, graph_files, read_manifest
from vlpack.precision import Policy
from vlpack.preprocess import Prompt
from vlpack.preprocess.mrope import mrope_positions
from vlpack.runtime import Model
from vlpack.sampling import Sampling
from vlpack.tasks import GENERATE, manifest_task
from vlpack.verification.cases import Case, built_in
from vlpack.verification.graphs import Graphs, Run
from vlpack.verification.measure import (
    GRAPH_TOLERANCE,
    KL_TOLERANCE,
    QUANTIZED_TOLERANCE,
    Difference,
    agreement,
    difference,
)
from vlpack.verification.reference import Reference, Trace, require
from vlpack.verification.result import CaseResult, Finding, ImageMap, Report, Stage, WeightResult
from vlpack.verification.weights import Parameters, Weights, policy_of

Array = npt.NDArray[Any]
Say = Callable[[str], None]
POSITIONS = "positions"
"""The stage that no weights go into."""
TIE = 1e-3
"""Logits of the reference's two best tokens that are no further apart may come out either way."""


@dataclass
class _Asked:
    """A case on its way: the prompt, the package's answer, and what both sides made of prompt and answer."""

    case: Case
    prompt: Prompt
    tokens: list[int]
    ids: Array  # [1, S]: the prompt and all of the answer but its last token
    original: Trace | None = None


def verify(
    package: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    cases: Sequence[Case] | None = None,
    tokens: int = 32,
    streamed: bool | None = None,
    threads: int | None = None,
    lora: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    say: Say | None = None,
) -> Report:
    """Compare a package with the checkpoint that it should be.

    Args:
        package: its folder.
        reference: the checkpoint's folder or Hub id.
        cases: what is asked; by default `built_in` ones.
        tokens: of each answer.
        streamed: keep only one module of the reference in memory at a time; by default where it would take more than a
            third of the machine's memory.
        threads: of onnxruntime.
        lora: adapters that were merged when the package was built, as there.
        say: told what is being done.

    Raises:
        VlpackError: the comparison could not be made.
    """
    require()
    started = time.perf_counter()
    say = say or (lambda text: None)
    folder = Path(package).expanduser()
    manifest = read_manifest(folder)
    if manifest_task(folder, manifest) != GENERATE:
        raise VerifyError(f"{folder} does not generate; embedding models and rerankers cannot be verified yet.")
    adapters = open_adapters(places_of(lora))
    found = resolve(reference)
    with ExitStack() as stack, Checkpoint.open(found.folder) as base:
        for adapter in adapters:
            stack.callback(adapter.close)
        architecture = architecture_of(base)
        if base.architecture != manifest["source"]["architecture"]:
            raise VerifyError(
                f"The package is a {manifest['source']['architecture']}, the reference a {base.architecture}.",
                "Give the checkpoint that the package was built from.",
            )
        policy = policy_of(manifest, architecture.precision_facts)
        check_tensors(architecture, base, policy)
        checkpoint = [base, *merge_all(base, adapters, architecture)][-1]
        if streamed is None:
            streamed = 2 * checkpoint.total_bytes() > (total_memory_bytes() or 1 << 62) / 3
        findings = [Finding("files", problem) for problem in damaged_files(folder, manifest, hashes=True)]
        results: list[CaseResult] = []
        weights: list[WeightResult] = []
        if not findings:  # what is damaged is not looked at any closer
            comparison = _Comparison(folder, manifest, architecture, checkpoint, policy, streamed, threads, say)
            asked = comparison.ask(cases, tokens)
            findings += comparison.check_prompts(asked) + comparison.check_stops()
            weights = comparison.compare_weights()
            results = comparison.compare(asked, weights)
            findings += _judge_weights(weights) + _judge(results, policy)
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
    )


class _Comparison:
    """A package and a checkpoint side by side."""

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        architecture: Architecture,
        checkpoint: Checkpoint,
        policy: Policy,
        streamed: bool,
        threads: int | None,
        say: Say,
    ) -> None:
        self.folder, self.architecture, self.checkpoint, self.policy = folder, architecture, checkpoint, policy
        self.streamed, self.threads, self.say = streamed, threads, say
        self.image_token_id = architecture.vision.image_token_id if architecture.vision else None
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
        )
        self.weights = Weights(architecture, checkpoint, policy, {part: self.graphs.load(part) for part in files})

    def ask(self, cases: Sequence[Case] | None, tokens: int) -> list[_Asked]:
        """The package's greedy answers, through the runtime, which is gone when this returns."""
        model = Model(self.folder, threads=self.threads)
        self.config, self.tokenizer = model.config, model.tokenizer
        return [self._ask(model, case, tokens) for case in cases or built_in(sees="vision" in self.graphs.files)]

    def _ask(self, model: Model, case: Case, tokens: int) -> _Asked:
        self.say(f"asking: {case.name}")
        content = [*({"type": "image"} for _ in case.images), {"type": "text", "text": case.prompt}]
        prompt = model.prompt([{"role": "user", "content": content if case.images else case.prompt}], case.images)
        answer = model.generate(prompt, max_tokens=tokens, sampling=Sampling(temperature=0)).tokens
        facts = self.architecture.vision
        visual = (facts.image_token_id, facts.video_token_id) if facts else ()
        # the reference takes such a token, which a model may write, for an image's
        answer = list(takewhile(lambda token: token not in visual, answer))
        ids = np.concatenate([prompt.input_ids[0], answer[:-1]]).astype(np.int64)[None]
        return _Asked(case, prompt, answer, ids)

    def check_prompts(self, asked: Sequence[_Asked]) -> list[Finding]:
        """Token ids and pixels against those of the checkpoint's own tokenizer and image settings, in transformers."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint.folder)
        for one in asked:
            if tokenizer.chat_template is not None:
                ids = tokenizer(one.prompt.text, add_special_tokens=False)["input_ids"]
                mine = one.prompt.input_ids[0]
                if one.case.images:  # placeholders are one token before they are expanded
                    starts = np.concatenate([[True], (mine[1:] != self.image_token_id) | (mine[:-1] != mine[1:])])
                    mine = mine[starts]
                if list(mine) != list(ids):
                    return [Finding("prompt", f"{one.case.name}: the package's tokens are not the checkpoint's.")]
            if one.case.images and (problem := self._pixels(one)):
                return [Finding("pixels", f"{one.case.name}: {problem}")]
        return []

    def _pixels(self, one: _Asked) -> str | None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        processor = Qwen2VLImageProcessorPil.from_pretrained(self.checkpoint.folder)
        wanted = processor(images=list(one.case.images), return_tensors="np")
        grid, pixels = one.prompt.grids, one.prompt.pixel_values
        assert pixels is not None
        if grid.tolist() != wanted["image_grid_thw"].tolist():
            return f"the images are {grid.tolist()} patches, transformers' {wanted['image_grid_thw'].tolist()}."
        apart = difference(pixels, wanted["pixel_values"])
        return None if apart.relative < 1e-3 else f"pixels are {apart.relative:.2g} away from transformers'."

    def check_stops(self) -> list[Finding]:
        """The tokens that end an answer are those of the checkpoint."""
        generation = self.checkpoint.json("generation_config.json") or {}
        text = self.checkpoint.config.get("text_config") or {}
        wanted = generation.get("eos_token_id") or self.checkpoint.config.get("eos_token_id") or text["eos_token_id"]
        ends = self.config["model"]["eos_token_id"]
        mine, theirs = (set(ids if isinstance(ids, list) else [ids]) for ids in (ends, wanted))
        if mine == theirs:
            return []
        return [Finding("stop tokens", f"Answers end at {sorted(mine)} where the checkpoint ends at {sorted(theirs)}.")]

    def compare_weights(self) -> list[WeightResult]:
        """Every weight."""
        self.say("comparing weights")
        return list(self.weights.compare())

    def compare(self, asked: Sequence[_Asked], weights: Sequence[WeightResult]) -> list[CaseResult]:
        """All cases: the reference as it is, then with the package's weights where these are others."""
        reference = self._reference(stored=False)
        for one in asked:
            self.say(f"reference: {one.case.name}")
            one.original = self._trace(reference, one)
        del reference
        totals = [self._run(one, exact=False) for one in asked]
        other = self._reference(stored=True) if any(weight.error > 0 for weight in weights) else None
        results = []
        for one, total in zip(asked, totals, strict=True):
            self.say(f"graph: {one.case.name}")
            assert one.original is not None
            own = one.original if other is None else self._trace(other, one)
            graph = _differences(self._run(one, exact=True), own)
            results.append(self._result(one, graph, total))
            one.original = None
        return results

    def _reference(self, *, stored: bool) -> Reference:
        self.say("loading the reference" + (" with the package's weights" if stored else ""))
        parameters = Parameters(self.weights, stored=stored)
        return Reference(self.checkpoint.folder, self.architecture.decoder.prefix, parameters, streamed=self.streamed)

    def _trace(self, reference: Reference, one: _Asked) -> Trace:
        return reference(one.ids, one.prompt.pixel_values, one.prompt.image_grid_thw, self.image_token_id)

    def _run(self, one: _Asked, *, exact: bool) -> Run:
        return self.graphs.run(one.ids, one.prompt, self._positions(one), exact=exact)

    def _positions(self, one: _Asked) -> Array:
        """As vlpack makes them; the runtime makes its own, which show in the tokens of its answer."""
        facts = self.architecture.vision
        if facts is None:
            return np.arange(one.ids.shape[1], dtype=np.int64)[None]
        return mrope_positions(one.ids[0], one.prompt.grids, facts.image_token_id, facts.spatial_merge_size)[:, None]

    def _result(self, one: _Asked, graph: list[tuple[str, Difference]], run: Run) -> CaseResult:
        assert one.original is not None
        total = _differences(run, one.original)
        tolerance, limit = GRAPH_TOLERANCE[self.policy.dtype], QUANTIZED_TOLERANCE[self.policy.precision]
        if self.policy.dtype == "float32" and "fp16" in (self.policy.options.vision, self.policy.precision):
            tolerance = GRAPH_TOLERANCE["float16"]
        stages = [
            Stage(name, None if name == POSITIONS else exact, whole, tolerance, limit)
            for (name, exact), (_, whole) in zip(graph, total, strict=True)
        ]
        start = one.prompt.input_ids.shape[1] - 1
        logits = one.original.logits[start : start + len(one.tokens)]
        best = np.argsort(logits, axis=1)[:, :-3:-1]
        decisive = np.take_along_axis(logits, best, axis=1)
        wanted = [int(token) for token in best[:, 0]]
        tokenizer = self.tokenizer
        return CaseResult(
            name=one.case.name,
            prompt=one.case.prompt,
            images=list(one.case.labels),
            stages=stages,
            logits=agreement(run.logits, one.original.logits),
            tokens=one.tokens,
            pieces=[tokenizer.decode([token], skip_special_tokens=False) for token in one.tokens],
            reference_tokens=wanted,
            reference_pieces=[tokenizer.decode([token], skip_special_tokens=False) for token in wanted],
            decisive=[float(gap) for gap in decisive[:, 0] - decisive[:, 1]],
            maps=self._maps(one, run),
        )

    def _maps(self, one: _Asked, run: Run) -> list[ImageMap]:
        if run.features is None or one.original is None or one.original.features is None:
            return []
        gap = np.linalg.norm(run.features - one.original.features, axis=1)
        size = np.linalg.norm(one.original.features, axis=1)
        relative = gap / np.maximum(size, 1e-12)
        maps, first = [], 0
        facts = self.architecture.vision
        assert facts is not None
        for image, (_, height, width) in zip(one.case.images, one.prompt.grids, strict=True):
            rows, columns = int(height) // facts.spatial_merge_size, int(width) // facts.spatial_merge_size
            values = relative[first : first + rows * columns].reshape(rows, columns)
            first += rows * columns
            small = image.convert("RGB")
            small.thumbnail((640, 640))
            file = io.BytesIO()
            small.save(file, "PNG")
            maps.append(ImageMap([[float(value) for value in row] for row in values], file.getvalue()))
        return maps


def _differences(run: Run, trace: Trace) -> list[tuple[str, Difference]]:
    """Every stage that both sides have, in the order of the computation."""
    stages: list[tuple[str, Any, Any]] = [(POSITIONS, run.positions, trace.positions)]
    for index, pair in enumerate(zip(run.blocks, trace.blocks, strict=True)):
        stages.append((f"input of vision block {index}", *pair))
    if run.features is not None:
        stages.append(("vision features", run.features, trace.features))
        stages += [(f"DeepStack {i}", *pair) for i, pair in enumerate(zip(run.levels, trace.levels, strict=True))]
    if run.embeds.size:
        stages.append(("embedding", run.embeds, trace.embeds))
    stages += [(f"layer {index}", *pair) for index, pair in enumerate(zip(run.layers, trace.layers, strict=True))]
    stages.append(("logits", run.logits, trace.logits))
    return [(name, difference(value, wanted)) for name, value, wanted in stages]


def _judge_weights(weights: Sequence[WeightResult]) -> list[Finding]:
    altered = [weight for weight in weights if not weight.same]
    if not altered:
        return []
    worst = max(altered, key=lambda weight: weight.error - weight.expected)
    more = f", and {len(altered) - 1} more are not" if len(altered) > 1 else ""
    return [
        Finding(
            "weights",
            f"{worst.path} in the {worst.part} graph is not what vlpack makes of the checkpoint: {worst.error:.2g} "
            f"away from it where {worst.expected:.2g} is {worst.storage}'s share{more}.",
        )
    ]


def _judge(cases: Sequence[CaseResult], policy: Policy) -> list[Finding]:
    findings = []
    for case in cases:
        if (stage := case.first_bad) and stage.wrong:
            apart, bound = stage.wrong
            how = "in exact arithmetic, weights being equal" if apart is stage.graph else "as the package runs"
            findings.append(
                Finding(
                    stage.name,
                    f"{case.name}: {stage.name} is {apart.relative:.2g} away from the reference {how}; at most "
                    f"{bound:.2g} is rounding.",
                )
            )
        elif case.logits.mean_kl > KL_TOLERANCE[policy.precision]:
            findings.append(
                Finding(
                    "logits", f"{case.name}: the next token's distribution differs by {case.logits.mean_kl:.2g} nats."
                )
            )
        elif policy.precision == "fp32" and (at := _wrong_token(case)) is not None:
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
