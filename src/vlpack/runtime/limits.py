"""The error for a prompt that does not fit a model's context."""

from __future__ import annotations

from itertools import accumulate

from vlpack.errors import InputError, option
from vlpack.preprocess import Prompt


def too_long(subject: str, prompt: Prompt, room: int) -> InputError:
    """The error for a prompt with too many tokens; it says how much images or videos contribute.

    Args:
        subject: name of the prompt in the error.
        prompt: prompt with more than ``room`` tokens.
        room: number of tokens that fit the context.
    """
    length = prompt.input_ids.shape[1]
    excess, sizes = length - room, [int(size) for size in prompt.num_image_tokens]
    said = f"{subject} has {length} tokens, {excess} more than fit the model's context."
    if not sizes:
        return InputError(said, "Shorten the text.")
    if prompt.videos:
        said += f" {prompt.num_video_tokens} of them are of videos, {sum(sizes) - prompt.num_video_tokens} of images."
        return InputError(said, f"Take fewer frames, or make them smaller with {option('total_pixels')}.")
    images = "Its image takes" if len(sizes) == 1 else f"Its {len(sizes)} images take"
    said += f" {images} {sum(sizes)} of them"
    enough = next((count for count, freed in enumerate(accumulate(reversed(sizes)), 1) if freed >= excess), None)
    if enough is None:
        return InputError(f"{said}, but without images it would not fit either.", "Shorten the text.")
    last = "it" if len(sizes) == 1 else "the last" if enough == 1 else f"the last {enough}"
    return InputError(
        f"{said}; without {last} it would fit.", f"Leave images out, or make them smaller with {option('max_pixels')}."
    )
