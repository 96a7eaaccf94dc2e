"""Writes line charts as SVG without a library: the same bytes for the same figures, readable on dark pages, too."""

from __future__ import annotations

import math
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 44, 56
COLORS = ("#0b62c4", "#d1495b", "#2e8b57", "#8e5ea2", "#c77700", "#5b6770")
"""Colors that, together with the marks, can be distinguished by people with red-green color blindness."""

Points = list[tuple[float, float]]


def ticks(highest: float, about: int = 5) -> list[float]:
    """Ticks from 0 to above the highest value, in steps of 1, 2 or 5 times a power of 10."""
    step = 10 ** math.floor(math.log10(highest / about))
    step *= next(factor for factor in (1, 2, 5, 10) if highest / (step * factor) <= about)
    return [number * step for number in range(math.ceil(highest / step - 1e-9) + 1)]


def mark(kind: int, x: float, y: float, color: str) -> str:
    """A mark of a line: a circle, square, diamond or triangle."""
    if kind % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>'
    shapes = (
        ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        ((0, -6), (6, 0), (0, 6), (-6, 0)),
        ((0, -5.5), (5.5, 4.5), (-5.5, 4.5)),
    )
    corners = " ".join(f"{x + right:.1f},{y + down:.1f}" for right, down in shapes[kind % 4 - 1])
    return f'<polygon points="{corners}" fill="{color}"/>'


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def spread(places: list[float], least: float) -> list[float]:
    """Heights of labels in the order of their places, moved apart where they would touch."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    over = max(0.0, moved[order[-1]] - (HEIGHT - BOTTOM)) if order else 0.0
    return [place - over for place in moved]


def chart(title: str, across: str, up: str, series: dict[str, Points], labels: dict[float, str] | None = None) -> str:
    """An SVG of lines from 0, each with its name at its end.

    Args:
        title: title above the chart.
        across: name and unit of the horizontal axis.
        up: name and unit of the vertical axis.
        series: points of each line, by name.
        labels: labels of places on the horizontal axis, instead of round numbers.

    Raises:
        ValueError: there is nothing to draw.
    """
    series = {name: sorted(points) for name, points in series.items() if points}
    if not series:
        raise ValueError(f"There are no figures for '{title}'.")
    rows = ticks(max(y for points in series.values() for _, y in points))
    columns = ticks(max(x for points in series.values() for x, _ in points))
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + inner_width * x / columns[-1], TOP + inner_height * (1 - y / rows[-1])

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 24, title, "start", ' font-size="15" font-weight="bold"'),
    ]
    for value in rows:
        _, y = place(0, value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + inner_width}" stroke="#d8dde2"/>')
        parts.append(text(LEFT - 8, y + 4.5, f"{value:g}", "end"))
    for value, words in sorted((labels or {value: f"{value:g}" for value in columns}).items()):
        x, y = place(value, 0)
        parts.append(f'<path d="M{x:.1f} {y:.1f}v5" stroke="#5b6770"/>')
        parts.append(text(x, y + 20, words))
    parts.append(text(LEFT + inner_width / 2, HEIGHT - 14, across))
    parts.append(text(0, 0, up, more=f' transform="translate(18 {TOP + inner_height / 2:.1f}) rotate(-90)"'))
    heights = spread([place(*points[-1])[1] for points in series.values()], 17)
    for number, (name, points) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        spots = [place(*point) for point in points]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        parts.append(f'<path d="M{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [mark(number, x, y, color) for x, y in spots]
        parts.append(text(spots[-1][0] + 12, heights[number] + 4.5, name, "start", f' fill="{color}"'))
    return "\n".join([*parts, "</svg>", ""])
