"""The result of a verification as data, from which the report, the exit code and the model card are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlpack.verification.metrics import Agreement, Difference


@dataclass(frozen=True)
class Stage:
    """The comparison of one stage of one case.

    Stages are positions, inputs of vision blocks, DeepStack's levels, embeddings, decoder layers, and the result:
    logits, the vector of an embedding model, or the score of a reranker.

    Args:
        name: the stage's name, such as ``positions``, ``input of vision block 3``, ``DeepStack 1``, ``layer 12``.
        graph: the package's graph in exact arithmetic compared with the reference that has the package's weights, which
            shows errors of the graph; None for a stage that does not depend on weights.
        total: the package as it runs compared with the reference as it is, which shows all errors that a user gets.
        tolerance: upper bound of ``graph.relative``, or of ``total.relative`` if ``graph`` is None.
        limit: upper bound of ``total.relative``.
    """

    name: str
    graph: Difference | None
    total: Difference
    tolerance: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the stage is within both of its bounds."""
        return self.violation is None

    @property
    def violation(self) -> tuple[Difference, float] | None:
        """The first difference that exceeds its bound, and that bound; the graph's error is checked first."""
        first = self.total if self.graph is None else self.graph
        pairs = ((first, self.tolerance), (self.total, self.limit))
        return next(((apart, bound) for apart, bound in pairs if not apart.relative <= bound), None)


@dataclass(frozen=True)
class ImageMap:
    """A map of where in an image the features differ.

    Args:
        values: relative L2 error of each of the image's tokens, ``[rows][columns]``.
        png: a small picture of the image, as the bytes of a PNG file.
    """

    values: list[list[float]]
    png: bytes


@dataclass(frozen=True)
class CaseResult:
    """The result of one case. For a model that does not generate, ``logits`` and the lists of tokens are empty.

    Args:
        name: the case's name.
        prompt: the prompt's text, as the user wrote it.
        images: names or sizes of the images and videos.
        stages: the stages in the order in which they are computed.
        logits: agreement of the next token at every position, the package as it runs against the reference as it is.
        tokens: the package's greedy answer through the runtime, as ids.
        pieces: the answer as text, token by token.
        reference_tokens: the reference's most likely token after each prefix of the package's answer.
        reference_pieces: the reference's tokens as text.
        decisive: for each token, the reference's largest logit minus its second largest; near 0 it is a tie, and either
            token is right.
        maps: a map for each image.
    """

    name: str
    prompt: str
    images: list[str]
    stages: list[Stage]
    logits: Agreement
    tokens: list[int]
    pieces: list[str]
    reference_tokens: list[int]
    reference_pieces: list[str]
    decisive: list[float]
    maps: list[ImageMap]

    @property
    def worst(self) -> tuple[float, float]:
        """The largest relative errors over all stages: that of the graph, and that of the whole package."""
        graph = max((stage.graph.relative for stage in self.stages if stage.graph), default=0.0)
        return graph, max(stage.total.relative for stage in self.stages)

    @property
    def first_bad(self) -> Stage | None:
        """The first stage that exceeds one of its bounds; None if there is none."""
        return next((stage for stage in self.stages if not stage.ok), None)

    @property
    def generates(self) -> bool:
        """Whether the model generates, so that there are next tokens to compare."""
        return bool(self.logits.kl)

    @property
    def same_tokens(self) -> int:
        """The number of the answer's tokens before the first one that the reference would not have chosen."""
        pairs = zip(self.tokens, self.reference_tokens, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.tokens))


@dataclass(frozen=True)
class WeightResult:
    """The comparison of one weight of the package with the checkpoint.

    Args:
        path: path of the weight's module.
        part: name of the graph that contains it.
        storage: format in which it is stored.
        error: relative L2 error of the package's values against the checkpoint's.
        expected: the error that vlpack's own conversion of the checkpoint has; another ``error`` means an altered
            package.
        same: whether the package's bytes are those that vlpack makes from the checkpoint.
    """

    path: str
    part: str
    storage: str
    error: float
    expected: float
    same: bool


@dataclass(frozen=True)
class Finding:
    """Something wrong with the package: the stage where it shows, and a sentence about it."""

    stage: str
    message: str


@dataclass(frozen=True)
class Report:
    """The whole result of a verification.

    Args:
        package: name of the package's folder.
        reference: the checkpoint's name or Hub id.
        architecture: name of the architecture.
        precision: the package's precision.
        provider: execution provider that the package was built for.
        cases: results of the cases, in order.
        weights: results of all weights.
        findings: everything wrong, in the order of the stages; empty if the package is the model.
        versions: versions of vlpack and the libraries that took part.
        seconds: duration of the verification in seconds.
        peak_memory: peak memory in bytes.
        streamed: whether the reference was loaded module by module, never as a whole.
        limits: precision whose bounds apply; another one than the package's if it was built from a quantized checkpoint
            and the reference is the original.
    """

    package: str
    reference: str
    architecture: str
    precision: str
    provider: str
    cases: list[CaseResult]
    weights: list[WeightResult]
    findings: list[Finding]
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int = 0
    streamed: bool = False
    limits: str = ""

    @property
    def mean_kl(self) -> float | None:
        """Mean KL divergence of the next token's distribution over all cases' positions, in nats; None without any."""
        values = [value for case in self.cases for value in case.logits.kl]
        return sum(values) / len(values) if values else None

    @property
    def ok(self) -> bool:
        """Whether the package is the model, within its precision."""
        return not self.findings
