"""What is asked in a verification: built-in prompts and pictures, or the user's own."""

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
DOCUMENT = "Paris is the capital and the largest city of France."
"""What a reranker scores where a case has no document of its own."""
LINE = '{"prompt": "What is this?", "images": ["a.png"]}'
"""Of a file of cases."""


@dataclass(frozen=True)
class Case:
    """A prompt with its images and videos, which stand before its text.

    Args:
        name: for people.
        prompt: the question.
        images: already decoded.
        labels: of the images and videos: their file names, or sizes.
        document: for a reranker, whose query the prompt is and whose images are the document's; `DOCUMENT` by default.
        videos: files, folders or lists of frames.
        video_options: how they are looked at; the frames a second of pictures.
    """

    name: str
    prompt: str
    images: tuple[Image.Image, ...] = ()
    labels: tuple[str, ...] = ()
    document: str | None = None
    videos: tuple[VideoSource, ...] = ()
    video_options: VideoOptions | None = None


def built_in(*, sees: bool, videos: bool = False) -> list[Case]:
    """Text, short and long; where the model ``sees``, one image and two unequal ones; a video where it takes any."""
    long = "The river rose in the night, and by morning the lower fields stood under water. " * 6
    cases = [
        Case("text", "What is the capital of France?"),
        Case("long text", f"{long}\nSummarize this in one sentence."),
    ]
    if sees:
        one, wide, tall = picture(320, 224, 1), picture(416, 128, 2), picture(160, 288, 3)
        cases.append(Case("one image", "What is the total on this receipt?", (one,), ("320 x 224",)))
        cases.append(Case("two images", "What differs between these?", (wide, tall), ("416 x 128", "160 x 288")))
    if videos:  # an odd number of frames, the last of which is repeated
        frames = [picture(192, 128, seed) for seed in range(5)]
        options = VideoOptions(fps=2)
        cases.append(
            Case("video", "What happens?", (), ("5 frames of 192 x 128",), videos=(frames,), video_options=options)
        )
    return cases


def own(prompts: Sequence[str], images: Sequence[str], videos: Sequence[str] = ()) -> list[Case]:
    """The user's prompts, each with all of the user's images and videos.

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


def from_file(path: Path) -> list[Case]:
    """Cases of a JSONL file: an object a line, with ``prompt`` and perhaps ``images`` and ``videos``.

    Both are lists of paths, from the file's folder.

    Where a reranker is verified, ``document`` may say what it scores.

    Raises:
        InputError: the file cannot be read, or a line is something else.
    """

    def parse(entry: Any) -> tuple[str, list[str], list[str], str | None]:
        prompt, document = entry["prompt"], entry.get("document")
        images, videos = entry.get("images", []), entry.get("videos", [])
        if not isinstance(prompt, str) or not isinstance(document, str | None):
            raise TypeError("prompt and document must be texts")
        if not isinstance(images, list) or not isinstance(videos, list):
            raise TypeError("the images must be a list, and the videos")
        if not all(isinstance(name, str) for name in (*images, *videos)):
            raise TypeError("images and videos are file names")
        return prompt, images, videos, document

    cases = []
    for number, (prompt, images, videos, document) in read_jsonl(path, parse, LINE):
        loaded = tuple(load_image(path.parent / image) for image in images)
        labels = tuple(Path(name).name for name in (*images, *videos))
        clips = tuple(path.parent / video for video in videos)
        cases.append(Case(f"line {number}", prompt, loaded, labels, document, clips))
    if len(cases) > MAX_CASES:
        raise InputError(f"{path} has {len(cases)} cases; {MAX_CASES} are the most.")
    return cases
