"""Questions to a package: texts as messages, and checks of prompts that were made before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlpack.errors import InputError
from vlpack.preprocess import ImageSource, Message, Prompt, VideoSource

NO_VIDEOS = (
    "Videos of Qwen2-VL and Qwen2.5-VL are not supported: the runtime would give a video, and the text after it, other "
    "positions than the model expects."
)
"""The reason why videos are refused for models other than those of `VIDEO_TYPES`."""

VIDEO_TYPES = ("qwen3_vl", "qwen3_5", "qwen3_5_moe")
"""The runtime's types of models that take videos. In these models, every temporal patch has the positions of a single
image, which the runtime computes correctly."""


def as_messages(
    messages: str | Sequence[Message], images: Sequence[ImageSource], videos: Sequence[VideoSource]
) -> Sequence[Message]:
    """Turns a question into a conversation of one message, with images and videos before the text.

    A conversation is returned unchanged.

    Args:
        messages: a question, or a conversation.
        images: images of the question.
        videos: videos of the question.
    """
    if not isinstance(messages, str):
        return messages
    parts = [*({"type": "image"} for _ in images), *({"type": "video"} for _ in videos)]
    if not parts:  # the chat templates of text models take no parts
        return [{"role": "user", "content": messages}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": messages}]}]


def check_prompt(prompt: Prompt, given: dict[str, Any], model: dict[str, Any]) -> None:
    """Checks that a prompt that is already made suits the package, and that no options for making it are given.

    Args:
        prompt: the prompt.
        given: options for making a prompt, by name.
        model: ``model`` section of the package's genai_config.json.

    Raises:
        InputError: the prompt or an option cannot be used.
    """
    for what, value in given.items():
        if value:
            raise InputError(
                f"The prompt is already made, so {what} would have no effect.", f"Give {what} to Model.prompt."
            )
    if prompt.has_images and "vision" not in model:
        raise InputError("The prompt has images, but the package has no vision part.", "Send text only.")
    if prompt.videos and model.get("type") not in VIDEO_TYPES:
        raise InputError(NO_VIDEOS, "Send single images.")
    if prompt.input_ids.max(initial=0) >= model["vocab_size"]:
        raise InputError(
            "The prompt has tokens that the package does not know.", "Make it with this model's `prompt` method."
        )
