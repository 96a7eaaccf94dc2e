"""The images that ``--image`` names: files, URLs, folders, patterns, and ``-`` for standard input."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlpack.errors import InputError, OptionError
from vlpack.preprocess import ImageSource, load_image
from vlpack.preprocess.image_source import MAX_ENCODED_BYTES, file_endings

STANDARD_INPUT = "-"


class NamedImage(NamedTuple):
    """An image and the name by which messages call it."""

    name: str
    source: ImageSource


def named_images(given: Sequence[str] | None, question: str | None = "") -> list[NamedImage]:
    """The images that the values of ``--image`` name, in order; those of a folder or a pattern are sorted by name.

    Args:
        given: files, URLs, folders (for all images directly in the folder), patterns such as ``*.png`` that the shell
            has not replaced, and ``-`` for an image on standard input.
        question: the question, or None if it has yet to be read from standard input.

    Raises:
        InputError: a folder or pattern has no image, or standard input is empty or too large.
        OptionError: standard input is needed twice.
    """
    given = given or []
    if given.count(STANDARD_INPUT) > 1:
        raise OptionError("--image - is given twice.", "Standard input can provide only one image.")
    if STANDARD_INPUT in given and question is None:
        raise OptionError("Standard input is the image.", 'Give the question as an argument: --image - "question"')
    images: list[NamedImage] = []
    for name in given:
        if name == STANDARD_INPUT:
            images.append(NamedImage(name, _standard_input()))
        else:
            images += [NamedImage(path, path) for path in image_files(name)]
    return images


def image_files(name: str) -> list[str]:
    """The image files that one value of ``--image`` names; a file or URL names itself.

    Raises:
        InputError: the folder has no images, or no file matches the pattern.
    """
    if re.match(r"(https?://|data:)", name, re.IGNORECASE):
        return [name]
    place = os.path.expanduser(name)
    if os.path.isdir(place):
        try:
            found = sorted(entry.path for entry in os.scandir(place) if entry.is_file())
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error.strerror}.") from None
        pictures = [path for path in found if os.path.splitext(path)[1].lower() in file_endings()]
        if not pictures:
            raise InputError(
                f"The folder {name} has no images.",
                "Images are files whose names end in .png, .jpg, .webp …",
            )
        return pictures
    if not os.path.lexists(place) and glob.has_magic(place):
        files = sorted(path for path in glob.glob(place, recursive=True) if os.path.isfile(path))
        if not files:
            raise InputError(f"No file matches the pattern {name}.", "A pattern may contain *, ?, [a-z] and **.")
        return files
    return [name]


def check_question(question: str, given: Sequence[str] | None) -> None:
    """Raises an OptionError if a question or another text is really an image file, given after the first image."""
    if (
        given
        and os.path.splitext(question)[1].lower() in file_endings()
        and os.path.isfile(os.path.expanduser(question))
    ):
        raise OptionError(f"{question} is given as a text, but it is an image file.", REPEAT)


def check_drawing(file: Path, images: Sequence[ImageSource]) -> None:
    """Raises an OptionError if ``--draw`` has no image to draw on, or its file's name ends in no known format."""
    if not images:
        raise OptionError("--draw has no effect without an image.", "Give one with --image.")
    if file.suffix.lower() not in file_endings():
        raise OptionError(f"--draw {file}: the name must end in .png, .jpg or .webp.")
    if not file.absolute().parent.is_dir():
        raise OptionError(f"--draw {file}: there is no folder {file.absolute().parent}.")


def draw_answer(text: str, source: ImageSource, file: Path, allow_private_urls: bool) -> None:
    """Writes an image with the boxes and points that an answer names.

    Raises:
        InputError: it names none, or the file cannot be written.
    """
    from vlpack.runtime.marks import draw_marks, marks_of

    marks = marks_of(text)
    if not marks:
        raise InputError(
            f"The answer names no boxes or points, so {file} was not written.",
            'Ask for them: "Locate every … and output the coordinates in JSON format."',
        )
    try:
        draw_marks(load_image(source, allow_private_urls=allow_private_urls), marks).save(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be written: {error}.") from None


REPEAT = "Write --image before each image (--image a.png --image b.png), or give a folder or a pattern once."
"""The hint for several images after one ``--image``."""


def _standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise OptionError("There is no image on standard input.", 'vlpack run PACKAGE --image - "question" < a.png')
    data = sys.stdin.buffer.read(MAX_ENCODED_BYTES + 1)
    if not data:
        raise InputError("Standard input is empty; it should be an image.")
    if len(data) > MAX_ENCODED_BYTES:
        raise InputError(f"The image on standard input has more than {MAX_ENCODED_BYTES} bytes.")
    return data
