"""Options that several verbs of the command line have, and what they become."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vlpack.errors import OptionError

Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Of the runtime. (default: all cores)")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

Package = Annotated[Path, typer.Argument(help="Folder of a package.")]
IMAGES = "Image file, URL, folder of images, pattern ('*.png'), or - for standard input; give it again for more."
Images = Annotated[list[str] | None, typer.Option("--image", metavar="IMAGE", help=IMAGES)]
Videos = Annotated[
    list[str] | None,
    typer.Option("--video", metavar="VIDEO", help="Video file, or folder of pictures; give it again for more."),
]
System = Annotated[str | None, typer.Option("--system", help="System prompt.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Of an answer at most.")]
MinPixels = Annotated[int | None, typer.Option("--min-pixels", help="Smallest image area, in pixels.")]
MaxPixels = Annotated[
    int | None, typer.Option("--max-pixels", help="Largest image area, in pixels; smaller is faster.")
]
PrivateUrls = Annotated[bool, typer.Option("--allow-private-urls", help="Let image URLs lead into this network.")]
Literal = Annotated[
    bool,
    typer.Option(
        "--literal",
        help="Take special tokens written in a text, such as <|im_end|>, as text, not as control tokens.",
    ),
]
VisionProvider = Annotated[
    str | None,
    typer.Option(
        "--vision-provider",
        help="Where images are looked at: cpu, or runtime as other languages do. (default: cpu in packages for it)",
    ),
]

Fps = Annotated[
    float | None,
    typer.Option("--fps", help="Frames a second to look at; how many a folder of pictures has. (default: the model's)"),
]
NumFrames = Annotated[
    int | None, typer.Option("--num-frames", help="So many frames of a video, instead of so many a second.")
]
MinFrames = Annotated[int | None, typer.Option("--min-frames", help="At least so many frames of a video.")]
MaxFrames = Annotated[int | None, typer.Option("--max-frames", help="At most so many frames of a video.")]
TotalPixels = Annotated[
    int | None,
    typer.Option("--total-pixels", help="Largest area of a video's frames together, in pixels; smaller is faster."),
]

Temperature = Annotated[
    float | None, typer.Option("--temperature", help="0 takes the likeliest token always. (default: the model's)")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Only the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Only the likeliest tokens whose probabilities sum to p.")]
RepetitionPenalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1 avoids repeating.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answer.")]


def check_video_options(options: dict[str, float | None], videos: Sequence[str] | None) -> None:
    """Raises an OptionError where there is an option for videos, and no video."""
    for name, value in options.items():
        if value is not None and not videos:
            raise OptionError(f"--{name.replace('_', '-')} has no effect without a video.", "Give one with --video.")


def special_tokens(literal: bool) -> str:
    """What ``--literal`` is in Python."""
    return "text" if literal else "control"
