"""Asks a program to read the 24 images that ship with vlpack, and fails unless it reads all of them.

Usage: python .ci/read_digits.py PACKAGE PROGRAM...
The program is called with PACKAGE, the question and an image, and prints the answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "examples" / "digits-images"


def main(package: str, *program: str) -> None:
    answers = json.loads((IMAGES / "answers.json").read_text(encoding="utf-8"))
    wrong = []
    for name, truth in answers.items():
        command = [*program, package, "Read the digits.", str(IMAGES / name)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        if answer.split() != truth["read"].split():
            wrong.append(f"{name}: {answer!r} and not {truth['read']!r}")
    print(*wrong, f"{len(answers) - len(wrong)} of {len(answers)} images read", sep="\n")
    sys.exit(1 if wrong or len(answers) != 24 else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
