"""What a verification found, as data: the report, the exit code and the model card are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlpack.verification.metrics import Agreement, Difference


@dataclass(frozen=True)
class Stage:
    """One stage of one case: positions, a vision block, DeepStack's level, the embedding, a decoder layer, the logits;
    of an embedding model its vector, of a reranker its score.

    Args:
        name: such as ``positions``, ``input of vision block 3``, ``DeepStack 1``, ``layer 12``, ``logits``.
        graph: the package's graph with exact arithmetic against the reference with the package's own weights: what the
            graph does wrong. None for what is not computed with weights.
        total: the package as it runs against the reference as it is: what its user gets.
        tolerance: that ``graph.relative`` (``total.relative`` where there is no ``graph``) must not exceed.
        limit: that ``total.relative`` must not exceed.
    """

    name: str
    graph: Difference | None
    total: Difference
    tolerance: float
    limit: float

    @property
    def ok(self) -> bool:
        """Within both of its bounds."""
        return self.wrong is None

    @property
    def wrong(self) -> tuple[Difference, float] | None:
        """What is beyond its bound, and the bound; the graph's error goes first."""
        first = self.total if self.graph is None else self.graph
        pairs = ((first, self.tolerance), (self.total, self.limit))
        return next(((apart, bound) for apart, bound in pairs if not apart.relative <= bound), None)


@dataclass(frozen=True)
class ImageMap:
    """Where in an image the features differ: relative L2 of each token, ``[rows][columns]``, beside a small picture.

    Args:
        values: by row and column of the image's tokens.
        png: the image as the model saw its size, a PNG file's bytes.
    """

    values: list[list[float]]
    png: bytes


@dataclass(frozen=True)
class CaseResult:
    """One prompt.

    Args:
        name: of the case.
        prompt: its text, as a person would write it.
        images: names or sizes of its images.
        stages: in the order in which they are computed.
        logits: agreement of the next token at every position, package as it runs against reference as it is; empty, as
            the tokens are, where the model does not generate.
        tokens: the package's greedy answer through the runtime, ids.
        pieces: the same as text, token by token.
        reference_tokens: what the reference likes best after each of the package's own prefixes.
        reference_pieces: as text.
        decisive: for each token, the reference's logit of its best minus that of its second: a tie may fall either way.
        maps: one for each image.
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
        """The largest relative errors of all stages: the graph's, and the whole package's."""
        graph = max((stage.graph.relative for stage in self.stages if stage.graph), default=0.0)
        return graph, max(stage.total.relative for stage in self.stages)

    @property
    def first_bad(self) -> Stage | None:
        """The first stage that is beyond its tolerance."""
        return next((stage for stage in self.stages if not stage.ok), None)

    @property
    def speaks(self) -> bool:
        """Whether it is of a model that generates, so that there are next tokens to compare."""
        return bool(self.logits.kl)

    @property
    def same_tokens(self) -> int:
        """How many tokens of the answer the reference would have chosen too, before the first that it would not."""
        pairs = zip(self.tokens, self.reference_tokens, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.tokens))


@dataclass(frozen=True)
class WeightResult:
    """One weight of the package against the checkpoint.

    Args:
        path: its module.
        part: its graph.
        storage: how it is kept.
        error: relative L2 of what the package holds against the checkpoint's.
        expected: the same of what vlpack makes of the checkpoint; they differ where the package was altered.
        same: the package holds byte for byte what vlpack makes of the checkpoint.
    """

    path: str
    part: str
    storage: str
    error: float
    expected: float
    same: bool


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, in one sentence, with the stage where it shows."""

    stage: str
    message: str


@dataclass(frozen=True)
class Report:
    """The whole.

    Args:
        package: its folder's name.
        reference: the checkpoint's name or Hub id.
        architecture: of both.
        precision: of the package.
        provider: it was made for.
        cases: in order.
        weights: all of them.
        findings: what is wrong, in the order of the stages; empty where the package is the model.
        versions: of vlpack and the libraries that took part.
        seconds: it took.
        peak_memory: bytes.
        streamed: the reference was never in memory as a whole.
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

    @property
    def mean_kl(self) -> float | None:
        """KL of the next token's distribution over all positions of all cases, in nats; None without any."""
        values = [value for case in self.cases for value in case.logits.kl]
        return sum(values) / len(values) if values else None

    @property
    def ok(self) -> bool:
        """The package is the model, within its precision."""
        return not self.findings
