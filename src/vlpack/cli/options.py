"""Options that several commands share, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlpack.checkpoint.files import parse_json, read_json
from vlpack.errors import CheckpointError, InputError, OptionError

Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Number of threads. (default: all cores)")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

Mmproj = Annotated[
    Path | None,
    typer.Option(
        "--mmproj",
        metavar="FILE",
        help="GGUF file with the vision encoder of the model in another GGUF file. (default: the one in a folder, if "
        "a folder is given)",
    ),
]

Package = Annotated[
    str,
    typer.Argument(help="Folder of a package, or Hub id of a checkpoint, whose package is built once and kept."),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--precision",
        help="Of the package of a Hub id: fp32, fp16, int8 or int4. (default: int8, or the bits of a quantized "
        "checkpoint)",
    ),
]
Update = Annotated[
    bool, typer.Option("--update", help="Ask the Hub whether a Hub id has a newer commit, and build that.")
]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Download and build the package of a Hub id without asking.")]
IMAGES = "Image file, URL, folder of images, pattern ('*.png'), or - for standard input; repeat the option for more."
"""The part of a help text that says which values ``--image`` takes."""
Images = Annotated[list[str] | None, typer.Option("--image", metavar="IMAGE", help=IMAGES)]
Videos = Annotated[
    list[str] | None,
    typer.Option("--video", metavar="VIDEO", help="Video file or folder of images; repeat the option for more."),
]
System = Annotated[str | None, typer.Option("--system", help="System prompt.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Maximum number of tokens of an answer.")]
MinPixels = Annotated[int | None, typer.Option("--min-pixels", help="Smallest image area, in pixels.")]
MaxPixels = Annotated[
    int | None, typer.Option("--max-pixels", help="Largest image area, in pixels; smaller is faster.")
]
PrivateUrls = Annotated[
    bool, typer.Option("--allow-private-urls", help="Allow image URLs of this machine and its private network.")
]
Literal = Annotated[
    bool,
    typer.Option(
        "--literal",
        help="Treat special tokens that are written in a text, such as <|im_end|>, as text, not as control tokens.",
    ),
]
VisionProvider = Annotated[
    str | None,
    typer.Option(
        "--vision-provider",
        help="Where images are encoded: cpu (by vlpack) or runtime (by onnxruntime-genai). (default: cpu for packages "
        "for the CPU)",
    ),
]

Fps = Annotated[
    float | None,
    typer.Option(
        "--fps",
        help="Frames per second to take from a video; for a folder of images, how many of them are shown per second. "
        "(default: the model's)",
    ),
]
NumFrames = Annotated[
    int | None, typer.Option("--num-frames", help="Number of frames to take from a video, instead of a rate.")
]
MinFrames = Annotated[int | None, typer.Option("--min-frames", help="Minimum number of frames to take from a video.")]
MaxFrames = Annotated[int | None, typer.Option("--max-frames", help="Maximum number of frames to take from a video.")]
TotalPixels = Annotated[
    int | None,
    typer.Option(
        "--total-pixels", help="Largest area of all frames of a video together, in pixels; smaller is faster."
    ),
]

Temperature = Annotated[
    float | None,
    typer.Option("--temperature", help="Randomness; 0 always takes the most likely token. (default: the model's)"),
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Number of most likely tokens to choose from.")]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Probability that the tokens to choose from have together, up to 1.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1, makes repetitions less likely.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Random seed; the same seed gives the same answer.")]

Schema = Annotated[
    str | None,
    typer.Option("--schema", metavar="FILE|JSON", help="The answer is JSON that matches this JSON schema."),
]
Regex = Annotated[
    str | None,
    typer.Option("--regex", metavar="PATTERN", help="The whole answer matches this pattern (syntax of Rust's regex)."),
]
Choices = Annotated[
    list[str] | None,
    typer.Option("--choice", metavar="TEXT", help="Text that the answer may be; repeat the option for each of them."),
]


def json_schema(given: str) -> dict[str, Any]:
    """A JSON schema that was given as JSON, or as the name of a file.

    Raises:
        InputError: it is neither, or the file cannot be read.
    """
    path = Path(given)
    try:
        if given.lstrip().startswith("{"):
            return parse_json(given.encode(errors="surrogateescape"), "--schema", strict=True)
        return read_json(path, path, strict=True)
    except CheckpointError as error:
        raise InputError(error.message, "Give --schema a JSON schema, or a file with one.") from None


def check_video_options(options: dict[str, float | None], videos: Sequence[str] | None) -> None:
    """Raises an OptionError if an option for videos is given without a video."""
    for name, value in options.items():
        if value is not None and not videos:
            raise OptionError(f"--{name.replace('_', '-')} has no effect without a video.", "Give one with --video.")


def special_tokens(literal: bool) -> str:
    """The value of the keyword argument ``special_tokens`` that ``--literal`` stands for."""
    return "text" if literal else "control"
