"""Reports of verifications made by hand, for the tests of the page and the JSON."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from samples import IMAGES
from vlpack.verification.metrics import Agreement, Difference
from vlpack.verification.result import CaseResult, Finding, ImageMap, Report, Stage, WeightResult

HOSTILE = "</style></title><script>alert(\"x\")</script><img src=x onerror='alert(1)'>\u202e\ud800\x00"
INT4 = "int4 block 32"


def stage(name: str, graph: float | None, total: float, tolerance: float = 3e-5, limit: float = 0.6) -> Stage:
    exact = None if graph is None else Difference(graph, 1.0, 1.0)
    return Stage(name, exact, Difference(total, 1.0, 0.999), tolerance, limit)


def stages(layers: int = 12, blocks: int = 6) -> list[Stage]:
    names = [f"input of vision block {index}" for index in range(blocks)]
    names += ["vision features", "DeepStack 0", "DeepStack 1"] if blocks else []
    names += ["embedding", *(f"layer {index}" for index in range(layers)), "logits"]
    return [stage("positions", 0.0, 0.0)] + [
        stage(name, 1e-7 * 1.02**i, 0.01 * 1.02**i) for i, name in enumerate(names)
    ]


def case(**changes: Any) -> CaseResult:
    whole = CaseResult(
        name="one image",
        prompt="What is the total on this receipt?",
        images=["320 x 224"],
        stages=stages(),
        logits=Agreement([0.01, 0.02], [True, False]),
        tokens=[1, 2, 3, 9],
        pieces=["The", " end", "", "\ufffd"],
        reference_tokens=[1, 4, 5, 9],
        reference_pieces=["The", " other", "\n", "\ufffd"],
        decisive=[3.0, 2.0, 1e-5, 1.0],
        maps=[ImageMap([[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]], (IMAGES / "00.png").read_bytes())],
    )
    return replace(whole, **changes)


def report(**changes: Any) -> Report:
    weights = [
        WeightResult(f"model.language_model.layers.{layer}.mlp.{name}", "decoder", storage, error, error, True)
        for layer in range(12)
        for name, storage, error in (("down_proj", INT4, 0.09 + layer / 1e3), ("norm.weight", "float32", 0.0))
    ]
    text = case(name="text", images=[], maps=[], stages=stages(blocks=0))
    whole = Report(
        "package", "checkpoint", "Qwen3VLForConditionalGeneration", "int4", "cpu", [text, case()], weights, [],
        {"vlpack": "0.1", "torch": "2.13"}, 12.0, 10**9, True,
    )  # fmt: skip
    return replace(whole, **changes)


def exact() -> Report:
    """A report of an fp32 package with one case, in which no weight is rounded."""
    fine = [replace(s, total=s.graph or s.total, limit=3e-5) for s in stages()]
    weights = [replace(weight, storage="float32", error=0.0, expected=0.0) for weight in report().weights]
    agreed = Agreement([1e-12, 1e-13], [True, True])
    only = case(stages=fine, logits=agreed, reference_tokens=[1, 2, 3, 9], maps=[ImageMap([[1e-6, 2e-6]], b"no PNG")])
    return report(precision="fp32", cases=[only], weights=weights)


def failed() -> Report:
    good = report()
    bad = [replace(s, graph=Difference(0.5, 1.0, 0.8)) if s.name in {"layer 7", "layer 8"} else s for s in stages()]
    bad[-1] = stage("logits", 0.5, float("inf"))
    maps = [ImageMap([[0.0, float("inf")]], case().maps[0].png)]
    weights = [replace(good.weights[6], error=0.4, same=False)]
    findings = [
        Finding("layer 7", "one image: layer 7 is 0.5 away"),
        Finding("weights", f"{weights[0].path} in the decoder graph is not what a build of the checkpoint stores."),
    ]
    cases = [good.cases[0], case(stages=bad, maps=maps, logits=Agreement([float("nan")], [False]))]
    return replace(good, cases=cases, weights=[*good.weights[:6], *weights, *good.weights[7:]], findings=findings)


def hostile() -> Report:
    bad = [replace(s, name=HOSTILE) for s in failed().cases[1].stages[:9]] + [stage(HOSTILE, 1.0, 2.0)]
    evil = case(name=HOSTILE, prompt=HOSTILE, images=[HOSTILE], stages=bad)
    evil = replace(evil, pieces=[HOSTILE] * 4, reference_pieces=[HOSTILE] * 4)
    weights = [WeightResult(HOSTILE, HOSTILE, HOSTILE, 0.1, 0.2, same) for same in (True, False)]
    findings = [Finding(HOSTILE, f"{HOSTILE}: {HOSTILE}")]
    return Report(HOSTILE, HOSTILE, HOSTILE, "int4", HOSTILE, [evil], weights, findings, {HOSTILE: HOSTILE})


@cache
def huge() -> Report:
    """A huge report: 100 layers, 64 cases with two noisy images of 3,000 tokens, 500-token answers, 20,000 weights."""
    random = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (640, 480, 3), np.uint8)).save(file, "PNG")
    maps = [ImageMap(random.random((60, 50)).tolist(), file.getvalue())] * 2
    tokens, other = random.integers(0, 9, (2, 500)).tolist()
    pieces = [" word"] * 500
    many = case(
        prompt="Why? " * 5000, images=["a.png", "b.png"], stages=stages(100, 32), maps=maps, decisive=[1.0] * 500,
        tokens=tokens, reference_tokens=other, pieces=pieces, reference_pieces=pieces,
    )  # fmt: skip
    bad = replace(many, stages=[*many.stages[:-1], stage("logits", 0.1, 0.9)])
    weights = [
        WeightResult(f"model.layers.{i % 100}.mlp.experts.{i // 700}.w{i % 7}", "decoder", INT4, 0.1, 0.09, i % 2 == 0)
        for i in range(20_000)
    ]
    cases = [replace(bad if index % 2 else many, name=f"case {index}") for index in range(64)]
    findings = [Finding("logits", f"{c.name}: logits is 0.1 away") for c in cases[1::2]]
    return report(cases=cases, weights=weights, findings=findings)


REPORTS: dict[str, Callable[[], Report]] = {
    "good": report,
    "exact": exact,
    "failed": failed,
    "hostile": hostile,
    "text": lambda: report(cases=report().cases[:1]),
    "damaged": lambda: report(cases=[], weights=[], findings=[Finding("files", "decoder.onnx was altered.")]),
    "empty": lambda: report(cases=[case(stages=[], logits=Agreement([], []), maps=[ImageMap([], b"")])], versions={}),
    "huge": huge,
}
