"""The drawings of a verification's page: a plot of the stages' errors, heat maps over images, bars of weight errors.

Coordinates of plots are thousandths of their width and height, and the browser stretches the plot to its size. Text is
outside the stretched part and strokes do not scale, so that both have the same size on a phone as elsewhere.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from vlpack.verification.result import ImageMap, Stage, WeightResult

DOTS = 60
"""Largest number of stages for which a plot has a dot at every stage; with more, only at stages beyond their bound."""
LABELS = 14
"""Largest number of stage numbers below a plot."""
HEAT = np.array([[255, 224, 102, 0], [255, 193, 61, 100], [240, 110, 30, 180], [205, 20, 45, 220], [120, 0, 60, 240]])
"""Colours of a heat map, RGBA, at equal steps from no error to the largest."""
SHADES = 64
"""Number of colours in a heat map's palette."""
NOT_FINITE = (0, 0, 0, 255)
"""Colour of errors that are not finite, RGBA: black."""
WIDEST = 24.0
"""Largest width and height of a picture on the page, in rem."""
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None) -> str:
    """A number as text for people: two or three digits, with a power of ten if it is small or large."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or 1e-2 <= abs(value) < 999.5:
        return f"{value:.3g}"
    mantissa, power = f"{value:.1e}".split("e")
    return f"{mantissa}×{_power(int(power))}"


def _power(power: int) -> str:
    return f"10{str(power).translate(SUPERSCRIPT)}" if power else "1"


def stages_plot(stages: Sequence[Stage]) -> dict[str, Any] | None:
    """The plot of both errors of every stage, with their bounds, on a logarithmic scale.

    Errors of exactly zero lie at the bottom and errors that are not finite at the top; neither is joined to its
    neighbours by a line.

    Returns:
        coordinates and labels for the page's template; None if there is nothing to draw.
    """
    # positions are whole numbers, so their error is 0 unless they are wrong
    stages = [stage for stage in stages if stage.name != "positions" or not stage.ok]
    if not stages:
        return None
    errors: dict[str, list[float | None]] = {
        "graph": [stage.graph.relative if stage.graph else None for stage in stages],
        "whole": [stage.total.relative for stage in stages],
    }
    bounds = {"graph": [stage.tolerance for stage in stages], "whole": [stage.limit for stage in stages]}
    every = [value for values in errors.values() for value in values if value is not None]
    every += [bound for values in bounds.values() for bound in values]
    logs = [math.log10(value) for value in every if 0 < value < math.inf]
    zero, infinite = 0.0 in every, not all(map(math.isfinite, every))
    low = math.floor(min(logs, default=-1.0)) - zero
    high = max(math.ceil(max(logs, default=0.0)), low + 1) + infinite

    def x(index: float) -> float:
        return round(1000 * (index + 0.5) / len(stages), 1)

    def y(value: float) -> float:
        power = low if value == 0 else math.log10(value) if math.isfinite(value) else high
        return round(1000 * (high - power) / (high - low), 1)

    powers = range(high - infinite, low + zero - 1, -math.ceil((high - low) / 8))
    ticks = [{"y": y(10.0**power), "label": _power(power)} for power in powers]
    ticks += [{"y": 0.0, "label": "∞"}] * infinite + [{"y": 1000.0, "label": "0"}] * zero
    bad = next((index for index, stage in enumerate(stages) if not stage.ok), None)
    return {
        "ticks": ticks,
        "lines": [
            {
                "kind": kind,
                "path": _path([(x(i), y(v)) if v and math.isfinite(v) else None for i, v in enumerate(values)]),
                "bound": _steps([y(bound) for bound in bounds[kind]]),
                "at_most": min(bounds[kind]),
                "dots": [
                    {"x": x(i), "y": y(v), "title": f"{stage.name}, {kind}: {number(v)}", "ok": v <= bound}
                    for i, (stage, v, bound) in enumerate(zip(stages, values, bounds[kind], strict=True))
                    if v is not None and (len(stages) <= DOTS or not v <= bound)
                ],
            }
            for kind, values in errors.items()
            if any(value is not None for value in values)
        ],
        "bad": None if bad is None else {"x": x(bad), "name": stages[bad].name, "right": x(bad) > 500},
        **_axis(stages, x),
    }


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """An SVG path with a line between each two neighbouring points; None is a gap."""
    pairs = zip([None, *points[:-1]], points, strict=True)
    return "".join(f"{'L' if before else 'M'}{point[0]:g} {point[1]:g}" for before, point in pairs if point)


def _steps(heights: Sequence[float]) -> str:
    """An SVG path of the bounds: a horizontal line over all stages, with a step wherever the bound changes."""
    path, position = f"M0 {heights[0]:g}", 0
    for height, group in groupby(heights):
        position += sum(1 for _ in group)
        path += f"V{height:g}H{1000 * position / len(heights):g}"
    return path


def _axis(stages: Sequence[Stage], x: Callable[[float], float]) -> dict[str, Any]:
    """The labels of the x axis: some of the blocks' and layers' numbers, and a name below each run with enough room."""
    every = math.ceil(len(stages) / LABELS)
    numbers, spans = [], []
    named = [re.fullmatch(r"(?:input of )?(.*\D)(\d+)(?:: .*)?", stage.name) for stage in stages]
    for kind, run in groupby(enumerate(named), key=lambda pair: pair[1] and pair[1][1].strip()):
        members = [(index, match[2]) for index, match in run if match]
        if kind and len(members) >= max(2, len(stages) / 8):
            left, right = x(members[0][0] - 0.4), x(members[-1][0] + 0.4)
            label = f"{kind}s" if kind.endswith(("block", "layer")) else kind
            spans.append({"x": left, "width": round(right - left, 1), "label": label})
            numbers += [{"x": x(index), "label": label} for index, label in members[::every]]
    return {"numbers": numbers, "spans": spans}


def heat(image: ImageMap, worst: float, side: int) -> dict[str, Any]:
    """A heat map for the page: the picture, an overlay with one pixel per token, and figures about the errors.

    Args:
        image: the picture with the error of each of its tokens.
        worst: the error that is drawn in the deepest colour.
        side: largest width and height of the picture, in pixels.
    """
    values = np.array(image.values, np.float64)
    if values.ndim != 2 or not values.size:
        values = np.zeros((1, 1))
    finite = np.isfinite(values)
    share = np.clip(np.where(finite, values, 0.0) / (worst or 1.0), 0, 1)
    steps, shades = np.linspace(0, 1, len(HEAT)), np.linspace(0, 1, SHADES)
    palette = np.stack([np.interp(shades, steps, HEAT[:, channel]) for channel in range(4)], -1).round().astype(int)
    overlay = Image.fromarray(np.where(finite, share * (SHADES - 1), SHADES).round().astype(np.uint8))
    overlay.putpalette([*palette.ravel().tolist(), *NOT_FINITE], "RGBA")
    row, column = np.unravel_index(int(np.argmax(np.where(finite, values, np.inf))), values.shape)
    height, width = values.shape
    return {
        "overlay": _data("png", overlay),
        "picture": _picture(image.png, side),
        "rows": height,
        "columns": width,
        "rem": round(WIDEST * min(1.0, max(width / height, 0.25)), 1),
        "worst": float(values[row, column]),
        "mean": float(values[finite].mean()) if finite.any() else math.inf,
        "where": f"row {row + 1} of {height}, column {column + 1} of {width}",
        "not_finite": int((~finite).sum()),
    }


def _picture(png: bytes, side: int) -> str | None:
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((side, side))
    return _data("jpeg", small)


def _data(kind: str, picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, kind, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def heat_scale() -> str:
    """The colours of a heat map, as the colour list of a CSS gradient."""
    return ", ".join(f"rgb({red} {green} {blue} / {alpha / 255:.2f})" for red, green, blue, alpha in HEAT.tolist())


def modules(weights: Iterable[WeightResult]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Group weights by module name and storage, over all layers, for the page's table of modules.

    Returns:
        A row for each group, those with altered weights first. Its bars are the largest error of each layer, as a share
        of the largest error of that storage. Groups without any error have no row.
        The number of weights without a row, by storage.
    """
    groups: dict[tuple[str, str, str], dict[int, list[WeightResult]]] = {}
    for weight in weights:
        parts = weight.path.split(".")
        layer = next((int(part) for part in parts if part.isdecimal() and len(part) < 10), 0)
        name = ".".join("*" if part.isdecimal() else part for part in parts)
        name = re.sub(r"^(model\.|language_model\.|visual\.)+", "", name)
        groups.setdefault((weight.part, name, weight.storage), {}).setdefault(layer, []).append(weight)
    exact: dict[str, int] = {}
    top: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for (part, name, storage), layers in groups.items():
        members = [weight for found in layers.values() for weight in found]
        errors = [_or_inf(weight.error) for weight in members]
        altered = sum(not weight.same for weight in members)
        if not any(errors) and not altered:
            exact[storage] = exact.get(storage, 0) + len(members)
            continue
        top[storage] = max([top.get(storage, 0.0), *filter(math.isfinite, errors)])
        bars = [
            {
                "layer": layer,
                "error": max(_or_inf(weight.error) for weight in found),
                "same": all(w.same for w in found),
            }
            for layer, found in sorted(layers.items())
        ]
        rows.append(
            {"part": part, "name": name, "storage": storage, "count": len(members), "altered": altered, "bars": bars}
            | {"mean": math.fsum(errors) / len(errors), "worst": max(errors)}
        )
    for row in rows:
        for bar in row["bars"]:
            bar["share"] = min(bar["error"] / (top[row["storage"]] or 1.0), 1.0)
    return sorted(rows, key=lambda row: not row["altered"]), exact


def _or_inf(value: float) -> float:
    """The value, or infinity if it is not finite. (`max` keeps or loses a NaN depending on its place.)"""
    return value if math.isfinite(value) else math.inf
