"""Writes a `Report` as JSON for scripts and as a self-contained HTML page for people, with plots as SVG.

The text in a report (tokens, prompts, file names) is not trusted: the template escapes it, unprintable characters are
written as numbers, and the page's content security policy forbids scripts and external resources.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import jinja2

from vlpack.verification.drawing import heat, heat_scale, modules, number, stages_plot
from vlpack.verification.metrics import KL_TOLERANCE, Difference
from vlpack.verification.result import CaseResult, Finding, Report, Stage
from vlpack.verification.run import TIE

LISTED = 20
"""Largest number of findings, and of weights, in a list."""
CHIPS = 200
"""Largest number of tokens of an answer that are shown."""
PIECE, TEXT = 40, 1000
"""Largest number of characters shown of a token, and of any other text, which may have any length."""
MODULES = 300
"""Largest number of rows in the table of modules; the largest models have a few dozen."""
OPEN = 4
"""Largest number of cases that are shown unfolded."""
PIXELS = 2_500_000
"""Largest number of pixels of all pictures together, which keeps a page with many images below 5 MB."""


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as a JSON object, with the verdict as ``ok`` and ``verdict``.

    Numbers that are not finite become null, and pictures base64.
    """
    shown: dict[str, Any] = _finite(
        {"ok": report.ok, "verdict": verdict(report), "mean_kl": report.mean_kl, **asdict(report)}
    )
    for case, result in zip(shown["cases"], report.cases, strict=True):
        case["first_bad"] = result.first_bad.name if result.first_bad else None
        case["same_tokens"] = result.same_tokens
        case["mean_kl"], case["top1"] = _finite(_mean(result.logits.kl)), _finite(_mean(result.logits.same_top))
        for stage, found in zip(case["stages"], result.stages, strict=True):
            stage["ok"] = found.ok
    return shown


def verdict(report: Report) -> str:
    """The verdict in one sentence."""
    if report.ok:
        return f"The package is the model: it computes what {report.reference} does, within what rounding allows."
    first = report.findings[0]
    if first.stage == "files":
        return "The package is not the model: its files are not those that the build wrote."
    case = next((f" in “{case.name}”" for case in report.cases if _about(first, case)), "")
    return f"The package is not the model: it first differs at {first.stage}{case}."


def html(report: Report) -> str:
    """The HTML page, below 5 MB even with hundreds of stages, 20,000 weights and dozens of cases with images."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_printable, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "percent": _percent}
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    maps = [image for case in report.cases for image in case.maps]
    values = (value for image in maps for row in image.values for value in row if math.isfinite(value))
    side = int(min(640, math.sqrt(PIXELS / max(len(maps), 1))))
    stages = _worst_stages(report.cases)
    worst = max([*values, *(stage.tolerance for stage in stages)], default=0.0)  # so that rounding alone stays pale
    rows, exact = modules(report.weights)
    altered = [weight for weight in report.weights if not weight.same]
    rounded = [weight for weight in report.weights if weight.error]
    return template.render(
        report=report,
        verdict=verdict(report),
        stages=stages,
        plot=stages_plot(stages),
        tiles=_tiles(report, stages),
        cases=[_case(case, report, worst, side) for case in report.cases],
        scale=heat_scale(),
        heat_worst=worst,
        rows=rows[:MODULES],
        more_rows=len(rows) - MODULES,
        exact=exact,
        altered=sorted(altered, key=lambda weight: _last(weight.error - weight.expected), reverse=True)[:LISTED],
        altered_count=len(altered),
        largest=sorted(rounded, key=lambda weight: _last(weight.error), reverse=True)[:LISTED],
        kl_limit=KL_TOLERANCE[report.precision],
        positions=sum(len(case.logits.kl) for case in report.cases),
        chips=CHIPS,
        listed=LISTED,
    )


def _case(case: CaseResult, report: Report, worst: float, side: int) -> dict[str, Any]:
    ok = case.first_bad is None and not any(_about(finding, case) for finding in report.findings)
    answer = zip(case.tokens, case.pieces, case.reference_tokens, case.reference_pieces, case.decisive, strict=True)
    tokens = [
        {
            "text": _visible(piece, token),
            "other": _visible(other, wanted),
            "kind": "same" if token == wanted else "tie" if gap < TIE else "differs",
        }
        for token, piece, wanted, other, gap in answer
    ]
    labels = [*case.images, *(f"image {index + 1}" for index in range(len(case.images), len(case.maps)))]
    return {
        "result": case,
        "ok": ok,
        "open": not ok or len(report.cases) <= OPEN,
        "graph": max((stage.graph.relative for stage in case.stages if stage.graph), key=_last, default=None),
        "whole": max((stage.total.relative for stage in case.stages), key=_last, default=None),
        "kl": _mean(case.logits.kl),
        "top1": _mean(case.logits.same_top),
        "plot": stages_plot(case.stages) if len(report.cases) > 1 else None,
        "tokens": tokens[:CHIPS],
        "agreeing": sum(token["kind"] == "same" for token in tokens),
        "ties": sum(token["kind"] == "tie" for token in tokens),
        "maps": [{"label": name, **heat(image, worst, side)} for name, image in zip(labels, case.maps, strict=False)],
    }


def _tiles(report: Report, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The few numbers that sum up how close the package is to the model, each with its bound and a mark."""
    tiles = []

    def tile(title: str, value: str, note: str, ok: bool | None = None) -> None:
        tiles.append({"title": title, "value": value, "note": note, "ok": ok})

    graph = [(stage.graph.relative, stage.tolerance) for stage in stages if stage.graph]
    whole = [(stage.total.relative, stage.limit) for stage in stages]
    for title, pairs in (("Graph error", graph), ("Whole error", whole)):
        if pairs:
            value, bound = max((error for error, _ in pairs), key=_last), min(bound for _, bound in pairs)
            tile(title, number(value), f"at most {number(bound)}", all(error <= most for error, most in pairs))
    if found := [_last(_mean(case.logits.kl)) for case in report.cases if case.logits.kl]:
        kl, bound = max(found), KL_TOLERANCE[report.limits or report.precision]
        tile("Next token, KL", number(kl), f"nats, worst case; at most {number(bound)}", kl <= bound)
    if tokens := sum(len(case.tokens) for case in report.cases):
        pairs_of = (zip(case.tokens, case.reference_tokens, strict=True) for case in report.cases)
        agree = sum(mine == wanted for pairs in pairs_of for mine, wanted in pairs)
        tile("Answers", f"{agree:,} of {tokens:,}", "tokens are the reference’s choice")
    if total := len(report.weights):
        same = sum(weight.same for weight in report.weights)
        tile("Weights", f"{same:,} of {total:,}", "are as vlpack makes them", same == total)
    return tiles


def _worst_stages(cases: Iterable[CaseResult]) -> list[Stage]:
    """Every stage of any case, in order, with the largest errors and the narrowest bounds of all cases."""
    found: dict[str, list[Stage]] = {}
    for case in sorted(cases, key=lambda case: len(case.stages), reverse=True):  # the longest has all stages in order
        for stage in case.stages:
            found.setdefault(stage.name, []).append(stage)
    return [
        Stage(
            name,
            max((stage.graph for stage in stages if stage.graph), key=_relative, default=None),
            max((stage.total for stage in stages), key=_relative),
            min(stage.tolerance for stage in stages),
            min(stage.limit for stage in stages),
        )
        for name, stages in found.items()
    ]


def _relative(apart: Difference) -> float:
    return _last(apart.relative)


def _last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _about(finding: Finding, case: CaseResult) -> bool:
    return finding.message.startswith(f"{case.name}: ")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else math.nan


def _percent(share: float) -> str:
    """A share as a percentage, rounded down so that only a share of 1 is 100%."""
    return f"{math.floor(share * 1000) / 10:g}%" if math.isfinite(share) else "–"


def _visible(piece: str, token: int) -> str:
    """A token as visible text, with marks for spaces and line breaks; its id if it is only a part of a character."""
    shown = piece.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    if not shown or "\N{REPLACEMENT CHARACTER}" in shown:
        return f"#{token}"
    return shown if len(shown) <= PIECE else f"{shown[:PIECE]}…"


def _printable(value: Any) -> Any:
    """The value that jinja2 writes: plain text is cut after `TEXT` characters, and the page's own markup stays whole.

    Control characters, marks of writing direction and lone surrogates are written as numbers.
    """
    if type(value) is str and len(value) > TEXT:
        value = f"{value[:TEXT]}…"
    if not isinstance(value, str) or value.replace("\n", "").isprintable():
        return value
    spelled = "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in value)
    return type(value)(spelled)  # markup, which macros return, stays markup


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
