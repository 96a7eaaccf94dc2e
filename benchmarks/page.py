"""Puts results into docs/benchmarks.md: the tables between its marks, and the plots beside it.

All figures come from files that compare.py, build.py, quality.py, the peers' quality scripts and `vlpack bench` have
written; none is written by hand. Tables without a given file are not changed.

Usage: python benchmarks/page.py [--compare compare.json] [--images compare.json] [--build build.json ...]
       [--bench result.json ...] [--docs FOLDER]
       [--quality quality.json ... [--timing compare.json] [--timed "NAME=NAME IN THE TIMING" ...]]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import build
import compare
import plot
import quality_page

DOCS = Path(__file__).parents[1] / "docs"


def machine(result: dict[str, Any]) -> str:
    about = result["machine"]
    return f"{about['processor']}, {about['cores']} cores, {about['memory'] / 1e9:.0f} GB, {about['system']}"


def compared(result: dict[str, Any]) -> str:
    """The Markdown of a comparison: machine, tools, and a table of results."""
    rounds = (
        f"{result['threads']} threads, {result['new_tokens']} new tokens, {result['rounds']} rounds, "
        f"{result['answers']} answer{'s' * (result['answers'] != 1)} in each process"
    )
    versions = {who: runs[0]["version"] for rows in result["results"].values() for who, runs in rows.items()}
    said = "; ".join(f"{who}: {version}" for who, version in versions.items())
    return f"{machine(result)}; {rounds}. {said}.\n\n{compare.table(result['results'])}"


def built(results: list[dict[str, Any]]) -> str:
    """The Markdown of the builds: a table for each checkpoint."""
    heads = (f"{result['checkpoint']} ({result['bytes'] / 1e9:.2f} GB), {machine(result)}:" for result in results)
    return "\n\n".join(
        f"{head}\n\n{build.table(result['builds'])}" for head, result in zip(heads, results, strict=True)
    )


def benched(results: list[dict[str, Any]]) -> str:
    """The Markdown of results of `vlpack bench`."""
    heads = ("package", "prompt", "tokens", "first token", "preprocessing", "vision", "prefill", "a token", "memory")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    loads = []
    for result in results:
        for work in result["works"]:
            parts = [work[part]["median"] for part in ("first_token", "preprocess", "vision", "prefill")]
            seconds = [f"{part:.2f} s" if part else "-" for part in parts]
            token, memory = f"{1e3 * work['token']['median']:.1f} ms", f"{work['resident'] / 1e9:.2f} GB"
            cells = (result["package"], work["name"], str(work["prompt_tokens"]), *seconds, token, memory)
            lines.append("| " + " | ".join(cells) + " |")
        load, reading = result["load"]["median"], result["read"]
        loads.append(
            f"{result['package']} ({result['precision']}, {result['bytes'] / 1e9:.2f} GB) loads in {load:.2f} s, "
            f"{load / reading:.1f} times reading it once ({machine(result)}, {result['threads']} threads, "
            f"medians of {result['repeat']})."
        )
    return "\n".join([*lines, "", *loads])


def images(result: dict[str, Any]) -> str:
    """A plot of the time to the first token by image size, for later requests if all results have them."""
    rows = {work: found for work, found in result["results"].items() if "x" in work}
    runs = [run for found in rows.values() for each in found.values() for run in each]
    warm = all(run.get("warm") is not None for run in runs)
    key, which = ("warm", "later requests (warm)") if warm else ("first", "a process's first request (cold)")
    series: dict[str, plot.Points] = {}
    labels = {}
    for work, found in rows.items():
        width, height = map(int, work.split("x"))
        labels[width * height / 1e6] = work.replace("x", "×")
        for who, each in found.items():
            series.setdefault(who, []).append((width * height / 1e6, min(run[key] for run in each)))
    return plot.chart(f"Time to the first token, {which}", "image (area to scale)", "seconds", series, labels)


def memory(results: list[dict[str, Any]]) -> str:
    """Peak memory of a build against the checkpoint's size; builds that failed have no point."""
    series: dict[str, plot.Points] = {}
    for result in results:
        for who, runs in result["builds"].items():
            if who != "copy" and not any(run["code"] for run in runs):
                point = (result["bytes"] / 1e9, max(run["peak"] for run in runs) / 1e9)
                series.setdefault(who, []).append(point)
    return plot.chart("Memory to build", "checkpoint, GB", "peak memory, GB", series)


def fill(page: str, name: str, content: str) -> str:
    """The page with the text between a name's marks replaced.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not found.search(page):
        raise ValueError(f"The page has no {begin} … {end}.")
    return found.sub(lambda _: f"{begin}\n{content}\n{end}", page)


def load(paths: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=Path, help="the table")
    parser.add_argument("--images", type=Path, help="the plot of images; one with several sizes")
    parser.add_argument("--build", type=Path, nargs="+", default=[], help="tables, and the plot of memory")
    parser.add_argument("--bench", type=Path, nargs="+", default=[])
    parser.add_argument("--quality", type=Path, nargs="+", default=[], help="a table and a plot")
    parser.add_argument("--timing", type=Path, help="of compare.py, for the plot of quality against time")
    parser.add_argument("--timed", nargs="+", default=[], metavar="NAME=NAME", help="who has which name in the timing")
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    if not (given.compare or given.images or given.build or given.bench or given.quality):
        parser.error("give results")
    path = given.docs / "benchmarks.md"
    page = path.read_text(encoding="utf-8")
    try:
        if given.compare:
            page = fill(page, "compare", compared(*load([given.compare])))
        if given.build:
            page = fill(page, "build", built(load(given.build)))
            (given.docs / "build-memory.svg").write_text(memory(load(given.build)), encoding="utf-8")
        if given.bench:
            page = fill(page, "bench", benched(load(given.bench)))
        if given.quality:
            results, timing = load(given.quality), load([given.timing])[0] if given.timing else None
            timed = dict(pair.split("=", 1) for pair in given.timed)
            page = fill(page, "quality", quality_page.table(results))
            (given.docs / "quality.svg").write_text(quality_page.chart(results, timing, timed), encoding="utf-8")
        if given.images:
            (given.docs / "image-time.svg").write_text(images(*load([given.images])), encoding="utf-8")
    except (KeyError, TypeError) as error:
        sys.exit(f"A file is not a result of the kind that was said: {error!r}.")
    except ValueError as error:
        sys.exit(str(error))
    path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
