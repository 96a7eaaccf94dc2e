"""Builds the small trained checkpoint that ships with vlpack and asks it about the images that ship with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlpack.builder import BuildResult, build
from vlpack.runtime import Model
from vlpack.sampling import Sampling
from vlpack.shipped import examples_folder

QUESTIONS = {"read": "Read the digits.", "count": "How many digits are there?"}
"""Key in answers.json → the question the checkpoint was trained on."""


@dataclass(frozen=True)
class Row:
    """One image, one question, what was answered and what is true."""

    image: str
    question: str
    answer: str
    truth: str

    @property
    def right(self) -> bool:
        """The answer is the truth, white space aside."""
        return self.answer.split() == self.truth.split()


def demo(
    output: Path, *, precision: str = "int8", report: Callable[[Row], None] = lambda row: None
) -> tuple[BuildResult, list[Row]]:
    """Build into ``output`` and ask about every image; ``report`` is told each row as it comes."""
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
