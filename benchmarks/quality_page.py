"""Makes the table and the plot of the results of quality.py and the peers' quality scripts, for page.py."""

from __future__ import annotations

from typing import Any

import scatter
from quality_scores import MODELS

HEADS = (
    "who", "bits per weight", "of the head", "KL", "top-1", "KL with outliers", "top-1 with outliers",
)  # fmt: skip
UNQUANTIZED = 16
"""Number of bits per weight from which on a row is only a control that its runtime computes the same model."""

Rows = dict[str, dict[str, dict[str, Any]]]
"""Rows of quality_scores by tool and model."""


def merged(results: list[dict[str, Any]]) -> Rows:
    """The rows of all files, ordered by descending bits, then by ascending KL divergence."""
    rows: Rows = {}
    for result in results:
        for row in result["quality"]:
            rows.setdefault(row["name"], {})[row["model"]] = row

    def order(name: str) -> tuple[float, float]:
        first = next(iter(rows[name].values()))
        return -round(first["bits"], 2), first["kl"]

    return {name: rows[name] for name in sorted(rows, key=order)}


def table(results: list[dict[str, Any]]) -> str:
    rows = merged(results)
    lines = ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    controls = []
    for name, models in rows.items():
        first = next(iter(models.values()))
        if first["bits"] >= UNQUANTIZED:
            controls.append(f"{name} {max(row['kl'] for row in models.values()):.1g}")
            continue
        cells = [name, f"{first['bits']:.2f}", f"{first['head']:.2f}"]
        for model in MODELS:
            row = models.get(model)
            error = f" ± {row['error']:.{digits(row['kl'])}f}" if row else ""
            cells += [f"{row['kl']:.{digits(row['kl'])}f}{error}", f"{row['top1']:.1%}"] if row else ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    versions = dict.fromkeys(row["version"] for models in rows.values() for row in models.values())
    said = f"{'; '.join(versions)}."
    if controls:
        said += f" The largest KL of weights in fp32: {', '.join(controls)}."
    return "\n".join([said, "", *lines])


def digits(value: float) -> int:
    """Number of decimals with which small figures have two significant digits."""
    return 4 if value < 0.1 else 3


def chart(
    results: list[dict[str, Any]], timing: dict[str, Any] | None = None, timed: dict[str, str] | None = None
) -> str:
    """The plot: KL divergence by bits per weight for each model, and by time per token where it is known.

    Args:
        results: files of the quality scripts.
        timing: a file of compare.py.
        timed: names in the timing by names in the quality files; equal names can be omitted.
    """
    rows = merged(results)
    whose = sorted({name.split()[0] for name in rows}, key=lambda who: (who != "vlpack", who))
    titles = {"mild": "SmolLM2-135M", "outliers": "the same function with planted outliers"}
    drawn = []
    for model in MODELS:
        groups: dict[str, scatter.Spots] = {who: [] for who in whose}
        for name, models in rows.items():
            if model in models and models[model]["bits"] < UNQUANTIZED:
                who, _, what = name.partition(" ")
                groups[who].append((models[model]["bits"], models[model]["kl"], what))
        drawn.append((titles[model], "bits per weight of the decoder's matrices", "KL, nats per token", groups))
    if timing:
        work = next(work for work in timing["results"] if work.isdigit())
        groups = {who: [] for who in whose}
        for name, models in rows.items():
            runs = timing["results"][work].get((timed or {}).get(name, name))
            if runs and MODELS[0] in models:
                who, _, what = name.partition(" ")
                token = 1e3 * min(run["token"] for run in runs)
                groups[who].append((token, models[MODELS[0]]["kl"], what))
        drawn.append((f"speed at 2B shapes, after {work} tokens", "ms per token", "KL, nats per token", groups))
    return scatter.panels("How near quantized models are to the fp32 model", drawn)
