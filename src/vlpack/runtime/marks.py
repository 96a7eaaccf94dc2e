"""Boxes and points in an answer, read from its JSON and drawn on the image.

Qwen3-VL answers in JSON: ``{"bbox_2d": [x1, y1, x2, y2], "label": …}`` and ``{"point_2d": [x, y], "label": …}``, with
coordinates from 0 to 1000 on both axes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

SCALE = 1000
"""Coordinate of the right and of the lower edge of an image."""

HUES = ("#c2255c", "#1864ab", "#2b8a3e", "#a3540a", "#5f3dc4", "#0b7285", "#846358", "#495057")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


class Mark(NamedTuple):
    """A box (x1, y1, x2, y2) or a point (x, y), from 0 to 1000, and its label, which may be empty."""

    place: tuple[float, ...]
    label: str


def marks_of(text: str) -> list[Mark]:
    """All boxes and points of an answer that is JSON or contains a block of JSON; an empty list if there are none."""
    fence = _FENCE.search(text)
    for candidate in (text, fence[1] if fence else ""):
        if not candidate.lstrip().startswith(("{", "[")):
            continue
        try:
            return list(_marks(json.loads(candidate)))
        except (ValueError, RecursionError):
            continue
    return []


def _marks(value: Any) -> Iterator[Mark]:
    if isinstance(value, list):
        for item in value:
            yield from _marks(item)
    elif isinstance(value, dict):
        names = (value.get(key) for key in ("label", "text_content", "name"))
        label = next((name for name in names if isinstance(name, str)), "")
        for key, count in (("bbox_2d", 4), ("point_2d", 2)):
            given = value.get(key)
            several = isinstance(given, list) and given and isinstance(given[0], list)
            for place in given if several and isinstance(given, list) else [given]:
                if isinstance(place, list) and _is_place(place, count):
                    yield Mark(tuple(place), label)
        for key, item in value.items():
            if key not in ("bbox_2d", "point_2d"):
                yield from _marks(item)


def _is_place(value: list[Any], count: int) -> bool:
    return len(value) == count and all(type(v) in (int, float) and -1e9 < v < 1e9 for v in value)


def draw_marks(image: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """A copy of an image with marks drawn on it; marks with the same label have the same colour."""
    drawn = image.convert("RGB")
    if drawn is image:
        drawn = image.copy()
    pencil = ImageDraw.Draw(drawn)
    width, height = drawn.size
    line = max(2, round(max(width, height) / 400))
    font = ImageFont.load_default(max(11, round(max(width, height) / 60)))
    labels = list(dict.fromkeys(mark.label for mark in marks))
    for mark in marks:
        hue = HUES[labels.index(mark.label) % len(HUES)]
        sides = (width - 1, height - 1)
        places = [min(max(value, 0), SCALE) / SCALE * sides[index % 2] for index, value in enumerate(mark.place)]
        if len(places) == 4:
            left, right = sorted(places[::2])
            upper, lower = sorted(places[1::2])
            pencil.rectangle((left, upper, right, lower), outline=hue, width=line)
        else:
            left, upper = places
            size = 2 * line
            edges = (left - size, upper - size, left + size, upper + size)
            pencil.ellipse(edges, fill=hue, outline="white", width=max(1, line // 2))
            left, upper = left + size, upper - size
        if label := " ".join(mark.label.split())[:80]:
            x1, y1, x2, y2 = pencil.textbbox((0, 0), label, font=font)
            wide, high = x2 - x1 + 2 * line, y2 - y1 + 2 * line
            left, upper = max(0.0, min(left, width - wide)), max(0.0, upper - high)
            pencil.rectangle((left, upper, left + wide, upper + high), fill=hue)
            pencil.text((left + line - x1, upper + line - y1), label, fill="white", font=font)
    return drawn
