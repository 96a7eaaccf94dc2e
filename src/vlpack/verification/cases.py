"""The cases of a verification: built-in prompts with pictures, or the user's own prompts, images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlpack.errors import InputError
from vlpack.jsonl import read_jsonl
from vlpack.preprocess import VideoOptions, VideoSource, load_image
from vlpack.sample_images import picture

MAX_CASES = 1000
"""Largest number of cases in a file."""
DOCUMENT = "Paris is the capital and the largest city of France."
"""The document that a reranker scores if a case has none of its own."""
LINE = '{"prompt": "What is this?", "images": ["a.png"]}'
"""An example of a line in a file of cases."""


@dataclass(frozen=True)
class Case:
    """A prompt with its images and videos, which come before the text.

    Args:
        name: the case's name, for people.
        prompt: the question.
        images: the images, already decoded.
        labels: file names or sizes of the images and videos.
        document: the document for a reranker, `DOCUMENT` by default; the prompt is then the query, and the images
            belong to the document.
        videos: video files, folders of frames or lists of frames.
        video_options: how the videos are sampled, such as the frame rate of a list of frames.
    """

    name: str
    prompt: str
    images: tuple[Image.Image, ...] = ()
    labels: tuple[str, ...] = ()
    document: str | None = None
    videos: tuple[VideoSource, ...] = ()
    video_options: VideoOptions | None = None


def built_in(*, sees: bool, videos: bool = False) -> list[Case]:
    """The built-in cases: a short and a long text; one image, and two of unequal sizes; and a video.

    Args:
        sees: whether the model has a vision encoder; only then are there cases with images.
        videos: whether the package takes videos.
    """
    long = "The river rose in the night, and by morning the lower fields stood under water. " * 6
    cases = [
        Case("text", "What is the capital of France?"),
        Case("long text", f"{long}\nSummarize this in one sentence."),
    ]
    if sees:
        one, wide, tall = picture(320, 224, 1), picture(416, 128, 2), picture(160, 288, 3)
        cases.append(Case("one image", "What is the total on this receipt?", (one,), ("320 x 224",)))
        cases.append(Case("two images", "What differs between these?", (wide, tall), ("416 x 128", "160 x 288")))
    if videos:  # an odd number of frames, so that the last one is repeated
        frames = [picture(192, 128, seed) for seed in range(5)]
        options = VideoOptions(fps=2)
        cases.append(
            Case("video", "What happens?", (), ("5 frames of 192 x 128",), videos=(frames,), video_options=options)
        )
    return cases


def user_cases(prompts: Sequence[str], images: Sequence[str], videos: Sequence[str] = ()) -> list[Case]:
    """One case for each of the user's prompts, each with all of the user's images and videos.

    Raises:
        InputError: an image cannot be read.
    """
    loaded = tuple(load_image(image) for image in images)
    labels = tuple(Path(name).name for name in (*images, *videos))
    prompts = prompts or ["Describe what you see."]
    return [
        Case(f"prompt {number}", prompt, loaded, labels, videos=tuple(videos))
        for number, prompt in enumerate(prompts, 1)
    ]


def read_cases(path: Path) -> list[Case]:
    """Read the cases of a JSONL file, with one JSON object per line.

    An object has a ``prompt`` and may have ``images`` and ``videos``, lists of paths relative to the file's folder. For
    a reranker it may also have a ``document``, the text to score.

    Raises:
        InputError: the file cannot be read, a line is not such an object, or there are too many cases.
    """

    def parse(entry: Any) -> tuple[str, list[str], list[str], str | None]:
        prompt, document = entry["prompt"], entry.get("document")
        images, videos = entry.get("images", []), entry.get("videos", [])
        if not isinstance(prompt, str) or not isinstance(document, str | None):
            raise TypeError("prompt and document must be strings")
        if not isinstance(images, list) or not isinstance(videos, list):
            raise TypeError("images and videos must be lists")
        if not all(isinstance(name, str) for name in (*images, *videos)):
            raise TypeError("images and videos must be lists of file names")
        return prompt, images, videos, document

    cases = []
    for number, (prompt, images, videos, document) in read_jsonl(path, parse, LINE):
        loaded = tuple(load_image(path.parent / image) for image in images)
        labels = tuple(Path(name).name for name in (*images, *videos))
        clips = tuple(path.parent / video for video in videos)
        cases.append(Case(f"line {number}", prompt, loaded, labels, document, clips))
    if len(cases) > MAX_CASES:
        raise InputError(f"{path} has {len(cases)} cases; at most {MAX_CASES} are allowed.", "Split the file.")
    return cases
