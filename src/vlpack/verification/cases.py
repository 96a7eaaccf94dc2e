"""What is asked in a verification: built-in prompts and pictures, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlpack.errors import InputError
from vlpack.jsonl import read_jsonl
from vlpack.pictures import picture
from vlpack.preprocess import load_image

MAX_CASES = 1000
DOCUMENT = "Paris is the capital and the largest city of France."
"""What a reranker scores where a case has no document of its own."""
LINE = '{"prompt": "What is this?", "images": ["a.png"]}'
"""Of a file of cases."""


@dataclass(frozen=True)
class Case:
    """A prompt with its images.

    Args:
        name: for people.
        prompt: the question.
        images: already decoded.
        labels: of the images: their file names, or sizes.
        document: for a reranker, whose query the prompt is and whose images are the document's; `DOCUMENT` by default.
    """

    name: str
    prompt: str
    images: tuple[Image.Image, ...] = ()
    labels: tuple[str, ...] = ()
    document: str | None = None


def built_in(*, sees: bool) -> list[Case]:
    """Text, short and long; and where the model ``sees``, one image and two unequal ones."""
    long = "The river rose in the night, and by morning the lower fields stood under water. " * 6
    cases = [
        Case("text", "What is the capital of France?"),
        Case("long text", f"{long}\nSummarize this in one sentence."),
    ]
    if sees:
        one, wide, tall = picture(320, 224, 1), picture(416, 128, 2), picture(160, 288, 3)
        cases.append(Case("one image", "What is the total on this receipt?", (one,), ("320 x 224",)))
        cases.append(Case("two images", "What differs between these?", (wide, tall), ("416 x 128", "160 x 288")))
    return cases


def own(prompts: Sequence[str], images: Sequence[str]) -> list[Case]:
    """The user's prompts, each with all of the user's images.

    Raises:
        InputError: an image cannot be read.
    """
    loaded, labels = tuple(load_image(image) for image in images), tuple(Path(image).name for image in images)
    prompts = prompts or ["Describe what you see."]
    return [Case(f"prompt {number}", prompt, loaded, labels) for number, prompt in enumerate(prompts, 1)]


def from_file(path: Path) -> list[Case]:
    """Cases of a JSONL file: an object a line, with ``prompt`` and perhaps ``images`` (paths from the file's folder).

    Where a reranker is verified, ``document`` may say what it scores.

    Raises:
        InputError: the file cannot be read, or a line is something else.
    """

    def parse(entry: Any) -> tuple[str, list[str], str | None]:
        prompt, images, document = entry["prompt"], entry.get("images", []), entry.get("document")
        if not isinstance(prompt, str) or not isinstance(images, list) or not isinstance(document, str | None):
            raise TypeError("prompt and document must be texts and the images a list")
        if not all(isinstance(image, str) for image in images):
            raise TypeError("images are file names")
        return prompt, images, document

    cases = []
    for number, (prompt, images, document) in read_jsonl(
        path, parse, '{"prompt": "What is this?", "images": ["a.png"]}'
    ):
        loaded = tuple(load_image(path.parent / image) for image in images)
        labels = tuple(Path(image).name for image in images)
        cases.append(Case(f"line {number}", prompt, loaded, labels, document))
    if len(cases) > MAX_CASES:
        raise InputError(f"{path} has {len(cases)} cases; {MAX_CASES} are the most.")
    return cases
