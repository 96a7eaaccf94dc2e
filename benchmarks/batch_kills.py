"""Kills `vlpack batch` with kill -9 at many moments and checks that every row is answered exactly once.

Usage: python benchmarks/batch_kills.py PACKAGE [--kills 50] [--rows 600]

PACKAGE must be a package that reads the shipped images (vlpack demo --output digits). One run after the other is killed
after a random time, while it loads, answers or writes; a last run completes the output. Then the script checks that
the output has the rows of the input, once and in their order, with the digits on the images as answers.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "examples" / "digits-images"
ANSWERS = json.loads((IMAGES / "answers.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=600)
    given = parser.parse_args()
    names = list(ANSWERS)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="vlpack-kills-") as place:
        rows, out = Path(place) / "rows.jsonl", Path(place) / "out"
        keys = [f"row {number}" for number in range(given.rows)]
        with rows.open("w", encoding="utf-8") as file:
            for number, key in enumerate(keys):
                file.write(json.dumps({"id": key, "image": names[number % len(names)]}) + "\n")
        command = [sys.executable, "-m", "vlpack", "batch", given.package, rows, "-o", out, "--files", IMAGES]
        command += ["--prompt", "Read the digits.", "--max-tokens", "20", "--temperature", "0", "--shard-rows", "11"]
        command = [str(part) for part in command]
        killed = empty = 0
        for _ in range(given.kills):
            before = sum(1 for path in out.glob("*") for _ in path.open("rb")) if out.exists() else 0
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
                try:
                    running.wait(rng.uniform(0.5, 3.5))
                except subprocess.TimeoutExpired:
                    running.kill()
                    killed += 1
            for path in out.glob("part-*"):  # every shard is whole at any time
                for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                    json.loads(line)
            after = sum(1 for path in out.glob("*") for _ in path.open("rb")) if out.exists() else 0
            empty += before == after
        began = time.perf_counter()
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
        told = json.loads(done.stdout)
        found = [json.loads(line) for path in sorted(out.glob("part-*")) for line in path.open(encoding="utf-8")]
        left = sorted(path.name for path in out.iterdir() if not path.name.startswith("part-"))
    assert [row["id"] for row in found] == keys, "rows are lost, twice or in another order"
    wrong = [row["id"] for row in found if row["answer"].split() != ANSWERS[row["image"]]["read"].split()]
    assert not wrong, f"wrong answers: {wrong[:5]}"
    assert left == [".lock", "manifest.json"], left
    print(
        f"{killed} of {given.kills} runs were killed ({empty} wrote nothing new); the last run found {told['before']} "
        f"of {given.rows} rows and answered {told['answered']} in {time.perf_counter() - began:.1f} s. "
        f"All {len(found)} rows are there once, in order, with the right answers."
    )


if __name__ == "__main__":
    main()
