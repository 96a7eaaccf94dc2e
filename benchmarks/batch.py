"""Compares `vlpack batch` with a loop over `vlpack.load(...).generate`, in rows per minute on the same images.

Usage: python benchmarks/batch.py PACKAGE [--images 200] [--size 640x480] [--tokens 64] [--slots 8] [--output FILE]

Without --size, the images are the shipped ones, repeated, each with one pixel changed. Both are measured in turns: the
loop on the first half of its images, then the batch on all images, then the loop on its other half. Loading is measured
separately. Packages with random weights usually generate --tokens tokens; the average number is printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from quiet import Others

import vlpack
from vlpack.sample_images import picture

SHIPPED = Path(__file__).parents[1] / "examples" / "digits-images"


def write_images(folder: Path, count: int, size: str | None) -> list[Path]:
    """Writes different images into a folder and returns their paths."""
    shipped = sorted(SHIPPED.glob("*.png"))
    paths = []
    for number in range(count):
        if size is None:
            image = Image.open(shipped[number % len(shipped)]).convert("RGB")
            image.putpixel((0, 0), (number % 256, number // 256, 0))
        else:
            width, height = map(int, size.split("x"))
            image = picture(width, height, number)
        paths.append(folder / f"{number:05}.png")
        image.save(paths[-1])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--loop-images", type=int, help="number of images of the loop (default: a fifth)")
    parser.add_argument("--size", help="WIDTHxHEIGHT of generated images (default: the shipped images)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", default="Read the digits.")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    greedy = vlpack.Sampling(temperature=0)
    with tempfile.TemporaryDirectory(prefix="vlpack-batch-") as place:
        images = Path(place) / "images"
        images.mkdir()
        paths = write_images(images, given.images, given.size)
        chosen = paths[: given.loop_images or max(2, given.images // 5)]
        model = vlpack.load(given.package)
        loop: dict[str, Any] = {"rows": 0, "tokens": 0, "seconds": 0.0}

        def alone(some: list[Path]) -> dict[str, str]:
            answers = {}
            began = time.perf_counter()
            for path in some:
                answer = model.generate(given.prompt, [path], max_tokens=given.tokens, sampling=greedy)
                answers[path.name] = answer.text
                loop["rows"] += 1
                loop["tokens"] += len(answer.tokens)
            loop["seconds"] += time.perf_counter() - began
            return answers

        with Others() as others:
            half = len(chosen) // 2
            texts = alone(chosen[:half])
            result = vlpack.batch(
                given.package,
                images,
                Path(place) / "out",
                prompt=given.prompt,
                max_tokens=given.tokens,
                sampling=greedy,
                slots=given.slots,
                context=given.context,
            )
            texts |= alone(chosen[half:])
        rows = [json.loads(line) for path in (Path(place) / "out").glob("part-*") for line in path.open()]
    same = sum(texts[row["file"]] == row["answer"] for row in rows if row["file"] in texts)
    found = {
        "batch_rows_per_minute": result.rows_per_minute,
        "loop_rows_per_minute": round(60 * loop["rows"] / loop["seconds"], 2),
        "batch_tokens_per_second": result.tokens_per_second,
        "loop_tokens_per_second": round(loop["tokens"] / loop["seconds"], 2),
        "ratio": round(result.rows_per_minute * loop["seconds"] / loop["rows"] / 60, 2),
        "rows": result.rows,
        "errors": result.errors,
        "loop_rows": loop["rows"],
        "tokens_of_an_answer": round(sum(row["answer_tokens"] or 0 for row in rows) / max(1, len(rows)), 1),
        "same_answers": f"{same} of {len(texts)}",
        "load_seconds": result.load_seconds,
        "busy_cores_of_others": others.cores,
    }
    print(json.dumps(found, indent=1))
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
