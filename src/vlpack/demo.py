"""Builds the small trained checkpoint that is installed with vlpack, and asks it about the installed images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlpack.builder import BuildResult, build
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling
from vlpack.shipped import examples_folder

QUESTIONS = {"read": "Read the digits.", "count": "How many digits are there?"}
"""Key in answers.json → question that the checkpoint was trained on."""


@dataclass(frozen=True)
class Row:
    """The answer to one question about one image, and the true answer."""

    image: str
    question: str
    answer: str
    truth: str

    @property
    def right(self) -> bool:
        """Whether the answer is the true one, white space aside."""
        return self.answer.split() == self.truth.split()


def demo(
    output: Path, *, precision: str = "int8", report: Callable[[Row], None] = lambda row: None
) -> tuple[BuildResult, list[Row]]:
    """Builds the demo's package and asks it every question about every image.

    Args:
        output: folder of the package.
        precision: precision of the package.
        report: callback that takes each row when it is ready.

    Returns:
        The result of the build, and all rows.
    """
    examples = examples_folder()
    result = build(examples / "digits-qwen3-vl", output, precision=precision)
    images = examples / "digits-images"
    answers = json.loads((images / "answers.json").read_text(encoding="utf-8"))
    model = Model(output)
    rows = []
    for name, truth in answers.items():
        for key, question in QUESTIONS.items():
            answer = model.generate(question, [images / name], max_tokens=32, sampling=Sampling(temperature=0))
            rows.append(Row(name, question, answer.text, truth[key]))
            report(rows[-1])
    return result, rows
