"""Draws scatter plots side by side as one SVG, with logarithmic vertical axes, in the style of plot.py."""

from __future__ import annotations

import math
from html import escape

from plot import COLORS, mark, text, ticks

Spots = list[tuple[float, float, str]]
"""A mark: its horizontal value, vertical value and label."""
PANEL_WIDTH, PANEL_HEIGHT = 470, 470
PANEL_LEFT, PANEL_RIGHT, PANEL_TOP, PANEL_BOTTOM = 62, 14, 66, 50
LABEL = 10.5
"""Font size of the labels."""
FAR = 11
"""Distance above which a label is connected with its mark by a line."""


def decades(lowest: float, highest: float) -> list[float]:
    """Ticks of a logarithmic axis from below the lowest to above the highest: 1, 2 and 5 times powers of 10."""
    every = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(lowest)) - 1, math.ceil(math.log10(highest)) + 1)
        for factor in (1, 2, 5)
    ]
    first = max(index for index, tick in enumerate(every) if tick <= lowest * (1 + 1e-9))
    last = min(index for index, tick in enumerate(every) if tick >= highest * (1 - 1e-9))
    return every[first : max(last, first + 1) + 1]


Box = tuple[float, float, float, float]
"""A box: left, top, right, bottom."""


def overlap(one: Box, other: Box) -> float:
    """The area of the intersection of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def near(place: tuple[float, float], box: Box) -> tuple[float, float]:
    """The point of a box that is nearest to a given point."""
    (x, y), (left, top, right, bottom) = place, box
    return min(max(x, left), right), min(max(y, top), bottom)


def label_boxes(places: list[tuple[float, float]], words: list[str], frame: Box) -> list[Box]:
    """The boxes of labels: close to their marks, inside the frame, and without covering marks or other labels."""
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    made = []
    for (x, y), label in zip(places, words, strict=True):
        width = len(label) * LABEL * 0.56
        boxes = [
            (left, middle - LABEL / 2, left + width, middle + LABEL / 2)
            for middle in (y + step * LABEL / 2 for step in range(-12, 13))
            for left in (*(x + right for right in (8, 30, 60, 90, 130)), x - 8 - width, x - 30 - width, x - width / 2)
        ]

        def cost(box: Box) -> float:
            outside = (box[2] - box[0]) * (box[3] - box[1]) - overlap(box, frame)
            hidden = sum(overlap(box, other) for other in taken)
            return 10 * (outside + hidden) + math.dist((x, y), near((x, y), box))  # noqa: B023

        best = min(boxes, key=cost)
        taken.append(best)
        made.append(best)
    return made


def panel(left: float, title: str, across: str, up: str, groups: dict[str, Spots]) -> list[str]:
    """The parts of one scatter plot, beginning at ``left``; the vertical axis is logarithmic."""
    spots = [spot for group in groups.values() for spot in group]
    rows = decades(min(y for _, y, _ in spots), max(y for _, y, _ in spots))
    xs = [x for x, _, _ in spots]
    step = ticks(max(max(xs) - min(xs), 1e-9))[1]
    first, last = math.floor(min(xs) / step), math.ceil(max(xs) / step)
    columns = [number * step for number in range(first, max(last, first + 1) + 1)]
    inner_width, inner_height = PANEL_WIDTH - PANEL_LEFT - PANEL_RIGHT, PANEL_HEIGHT - PANEL_TOP - PANEL_BOTTOM
    start = left + PANEL_LEFT

    def place(x: float, y: float) -> tuple[float, float]:
        share = math.log(y / rows[0]) / math.log(rows[-1] / rows[0])
        right = (x - columns[0]) / (columns[-1] - columns[0])
        return start + inner_width * right, PANEL_TOP + inner_height * (1 - share)

    parts = [text(start, PANEL_TOP - 12, title, "start", ' font-weight="bold"')]
    for value in rows:
        _, y = place(columns[0], value)
        parts.append(f'<path d="M{start:.1f} {y:.1f}h{inner_width}" stroke="#d8dde2"/>')
        parts.append(text(start - 8, y + 4.5, f"{value:g}", "end"))
    for value in columns:
        x, y = place(value, rows[0])
        parts.append(f'<path d="M{x:.1f} {y:.1f}v5" stroke="#5b6770"/>')
        parts.append(text(x, y + 20, f"{value:g}"))
    parts.append(text(start + inner_width / 2, PANEL_HEIGHT - 10, across))
    middle = PANEL_TOP + inner_height / 2
    parts.append(text(0, 0, up, more=f' transform="translate({left + 16:.1f} {middle:.1f}) rotate(-90)"'))
    places = [place(x, y) for x, y, _ in spots]
    frame = (start, PANEL_TOP - 4.0, start + inner_width, PANEL_TOP + inner_height + 4.0)
    boxes = iter(label_boxes(places, [words for _, _, words in spots], frame))
    for number, group in enumerate(groups.values()):
        color = COLORS[number % len(COLORS)]
        for x, y, words in group:
            box, spot = next(boxes), place(x, y)
            end = near(spot, box)
            if math.dist(spot, end) > FAR:
                line = f"M{spot[0]:.1f} {spot[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"
                parts.append(f'<path d="{line}" stroke="{color}" stroke-width="0.7"/>')
            parts.append(mark(number, *spot, color))
            size = f' font-size="{LABEL}" fill="{color}"'
            parts.append(text(box[0], box[3] - 2, words, "start", size))
    return parts


def panels(title: str, drawn: list[tuple[str, str, str, dict[str, Spots]]]) -> str:
    """An SVG of scatter plots side by side, with one legend.

    Args:
        title: title above all plots.
        drawn: title, names of the horizontal and the vertical axis, and marks by group, for each plot.

    Raises:
        ValueError: there is nothing to draw.
    """
    drawn = [one for one in drawn if any(one[3].values())]
    if not drawn:
        raise ValueError(f"There are no figures for '{title}'.")
    names = list(dict.fromkeys(name for *_, groups in drawn for name in groups))
    width = PANEL_WIDTH * len(drawn)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {PANEL_HEIGHT}" font-family="sans-serif" '
        f'font-size="13" role="img" aria-label="{escape(title)}">',
        f'<rect width="{width}" height="{PANEL_HEIGHT}" fill="#ffffff"/>',
        text(PANEL_LEFT, 24, title, "start", ' font-size="15" font-weight="bold"'),
    ]
    x = float(max(PANEL_LEFT + 9.5 * len(title), width - 110 * len(names)))
    for number, name in enumerate(names):
        color = COLORS[number % len(COLORS)]
        parts.append(mark(number, x, 19.5, color))
        parts.append(text(x + 10, 24, name, "start", f' fill="{color}"'))
        x += 30 + 8 * len(name)
    for number, (heading, across, up, groups) in enumerate(drawn):
        whole = {name: groups.get(name, []) for name in names}  # the same colors in every panel
        parts += panel(PANEL_WIDTH * number, heading, across, up, whole)
    return "\n".join([*parts, "</svg>", ""])
