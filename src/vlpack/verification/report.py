"""A `Report` as JSON for scripts and as one page for people: no script, nothing from elsewhere, plots as SVG.

All text in a report (tokens, prompts, file names) may come from anybody: the template escapes it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from dataclasses import asdict
from importlib.resources import files
from itertools import groupby
from typing import Any

import jinja2

from vlpack.verification.measure import KL_TOLERANCE
from vlpack.verification.result import CaseResult, ImageMap, Report, WeightResult
from vlpack.verification.run import TIE

WIDTH, HEIGHT, LEFT, TOP = 720, 240, 48, 10
LISTED = 20


def as_json(report: Report) -> dict[str, Any]:
    """The whole, with the verdict as ``ok``; numbers that are not finite are null, pictures base64."""
    shown = {"ok": report.ok, **_finite(asdict(report))}
    for case, result in zip(shown["cases"], report.cases, strict=True):
        case["first_bad"] = result.first_bad.name if result.first_bad else None
        case["same_tokens"] = result.same_tokens
        case["mean_kl"], case["top1"] = _finite(result.logits.mean_kl), result.logits.top1
        for stage, found in zip(case["stages"], result.stages, strict=True):
            stage["ok"] = found.ok
    return shown


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def html(report: Report) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": _number, "megabytes": lambda count: f"{count / 1e6:,.0f} MB"}
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    altered = [weight for weight in report.weights if not weight.same]
    return template.render(
        report=report,
        cases=[_case(case) for case in report.cases],
        groups=_groups(report.weights),
        altered=sorted(altered, key=lambda weight: weight.error, reverse=True)[:LISTED],
        altered_count=len(altered),
        kl_limit=KL_TOLERANCE[report.precision],
    )


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-2 else f"{value:.3g}"


def _case(case: CaseResult) -> dict[str, Any]:
    graph, whole = case.worst
    tokens = [
        {
            "text": piece,
            "other": other,
            "kind": "same" if mine == theirs else "tie" if gap < TIE else "differs",
        }
        for piece, other, mine, theirs, gap in zip(
            case.pieces, case.reference_pieces, case.tokens, case.reference_tokens, case.decisive, strict=True
        )
    ]
    labels = zip(case.images, case.maps, strict=False)
    return {
        "result": case,
        "graph": graph,
        "whole": whole,
        "plot": _plot(case),
        "tokens": tokens,
        "maps": [{"label": label, **_heat(image)} for label, image in labels],
    }


def _plot(case: CaseResult) -> dict[str, Any]:
    """Both errors of every stage on a logarithmic scale, as points of an SVG of `WIDTH` × `HEIGHT`."""
    stages = [stage for stage in case.stages if stage.name != "positions"]
    lines = {
        "graph": [stage.graph.relative if stage.graph else 0.0 for stage in stages],
        "whole": [stage.total.relative for stage in stages],
    }
    bounds = [stages[0].tolerance, stages[0].limit] if stages else []
    logs = [_log(value) for value in (*lines["graph"], *lines["whole"], *bounds)]
    low, high = math.floor(min(logs, default=-8)), math.ceil(max(logs, default=0) + 0.2)

    def x(index: int) -> float:
        return round(LEFT + (WIDTH - LEFT - 10) * (index + 0.5) / max(len(stages), 1), 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - 20) * (high - _log(value)) / max(high - low, 1), 1)

    return {
        "ticks": [{"y": y(10.0**power), "label": f"1e{power}"} for power in range(low, high + 1)],
        "lines": [
            {
                "kind": kind,
                "points": " ".join(f"{x(index)},{y(value)}" for index, value in enumerate(values)),
                "dots": [
                    {"x": x(index), "y": y(value), "title": f"{stage.name}: {_number(value)}", "ok": stage.ok}
                    for index, (stage, value) in enumerate(zip(stages, values, strict=True))
                ],
            }
            for kind, values in lines.items()
        ],
        "bound": y(bounds[0]) if bounds else None,
        "first": stages[0].name if stages else "",
        "last": stages[-1].name if stages else "",
    }


def _log(value: float) -> float:
    return math.log10(min(max(value, 1e-9), 1e3)) if math.isfinite(value) else 3.0


def _heat(image: ImageMap) -> dict[str, Any]:
    worst = max((value for row in image.values for value in row), default=0.0)
    cells = [
        {"x": column, "y": row, "share": round(value / worst, 3) if worst else 0.0, "value": _number(value)}
        for row, values in enumerate(image.values)
        for column, value in enumerate(values)
    ]
    return {
        "png": base64.b64encode(image.png).decode(),
        "columns": len(image.values[0]) if image.values else 1,
        "rows": len(image.values) or 1,
        "cells": cells,
        "worst": worst,
    }


def _groups(weights: Iterable[WeightResult]) -> list[dict[str, Any]]:
    """Weights of one name and storage in all layers, as one row; vectors, which no precision rounds, are left out."""

    def key(weight: WeightResult) -> tuple[str, str, str]:
        name = ".".join("*" if part.isdigit() else part for part in weight.path.split("."))
        return weight.part, name, weight.storage

    rows = []
    for (part, name, storage), group in groupby(sorted(weights, key=key), key):
        members = list(group)
        errors = [weight.error for weight in members]
        if max(errors) == 0 and name.endswith((".bias", "norm.weight")):
            continue
        rows.append(
            {"part": part, "name": name, "storage": storage, "count": len(members), "mean": sum(errors) / len(errors)}
            | {"worst": max(errors), "same": sum(weight.same for weight in members)}
        )
    return rows
