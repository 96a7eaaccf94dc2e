"""Messages and images to the tensors a prompt is made of: what Qwen3VLProcessor does, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlpack.errors import CheckpointError, InputError
from vlpack.preprocess.chat_template import ChatTemplate
from vlpack.preprocess.images import ImageProcessor, ProcessedImages
from vlpack.preprocess.load import ImageSource, load_image
from vlpack.preprocess.messages import Message, normalize_messages
from vlpack.preprocess.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready for the runtime.

    Attributes:
        input_ids: int32 [1, S], image placeholders expanded.
        num_image_tokens: int64 [images], placeholders per image; [0] for text.
        pixel_values: float32 [patches, C*T*p*p], None for text.
        image_grid_thw: int64 [images, 3], None for text.
        text: the rendered chat template, placeholders not expanded.
    """

    input_ids: npt.NDArray[np.int32]
    num_image_tokens: npt.NDArray[np.int64]
    pixel_values: npt.NDArray[np.float32] | None
    image_grid_thw: npt.NDArray[np.int64] | None
    text: str

    @property
    def has_images(self) -> bool:
        """Whether any image is in the prompt."""
        return self.pixel_values is not None

    @property
    def grids(self) -> npt.NDArray[np.int64]:
        """`image_grid_thw`, int64 [images, 3]; no rows for text."""
        return np.zeros((0, 3), np.int64) if self.image_grid_thw is None else self.image_grid_thw

    def images(self) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
        """Each image's pixels [patches, C*T*p*p] and grid [1, 3]: unequal ones go through a vision graph one by one."""
        end = 0
        for grid in self.grids:
            start, end = end, end + int(grid.prod())
            assert self.pixel_values is not None, "a grid has pixels"
            yield self.pixel_values[start:end], grid[None]

    def named_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by the names that the runtime gives its inputs; without the image ones for text."""
        arrays: dict[str, npt.NDArray[Any]] = {"input_ids": self.input_ids}
        if self.pixel_values is not None and self.image_grid_thw is not None:
            arrays["pixel_values"] = self.pixel_values
            arrays["image_grid_thw"] = self.image_grid_thw
            arrays["num_image_tokens"] = self.num_image_tokens
        return arrays


class PromptBuilder:
    """Makes prompts for one checkpoint or package.

    Args:
        tokenizer: of the checkpoint.
        chat_template: of the checkpoint.
        image_processor: None if the package has no vision part; images are then refused.
        image_token_id: id of the placeholder (`image_token_id` of config.json); needed with an image_processor.
        video_token_id: id of the video placeholder, if any: it must not appear in a prompt.

    Raises:
        CheckpointError: the tokenizer does not know image_token_id as a token of its own.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        image_processor: ImageProcessor | None = None,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
    ) -> None:
        if image_processor is not None and image_token_id is None:
            raise CheckpointError("An image processor needs the image_token_id of config.json.")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        if image_token_id is not None:
            # Only tokens that text is split at first expand the same as ids and, as in transformers, as text.
            token = tokenizer.token(image_token_id) if tokenizer.is_added_token(image_token_id) else None
            if token is None or tokenizer.encode(token * 2) != [image_token_id] * 2:
                raise CheckpointError(
                    f"image_token_id {image_token_id} is not a special token of {tokenizer.where}.",
                    hint="Take config.json and tokenizer.json from the same checkpoint.",
                )

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        image_token_id: int | None,
        video_token_id: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> PromptBuilder:
        """Reads tokenizer, chat template and image settings of a checkpoint or package.

        Args:
            folder: with tokenizer.json, a chat template and preprocessor_config.json.
            image_token_id: from config.json; None for a text-only package, which needs no image settings.
            video_token_id: from config.json, if any.
            min_pixels: smallest image area, square pixels, instead of the file's.
            max_pixels: largest image area, square pixels, instead of the file's.

        Raises:
            CheckpointError: a file is missing or damaged.
            OptionError: the pixel limits are impossible.
        """
        images = None
        if image_token_id is not None:
            images = ImageProcessor.from_folder(folder).with_pixel_limits(min_pixels, max_pixels)
        return cls(
            Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder), images, image_token_id, video_token_id
        )

    def __call__(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageSource] = (),
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        allow_private_urls: bool = False,
        **variables: Any,
    ) -> Prompt:
        """Makes the prompt of a conversation.

        Args:
            messages: see `normalize_messages`.
            images: for the image parts without a source of their own, in order. A PIL image is taken as it is
                (transparency onto white, no EXIF rotation), everything else goes through `load_image`; so it is in
                transformers.
            add_generation_prompt: end with the header of the assistant's answer.
            tools: JSON schemas of functions the model may call.
            allow_private_urls: see `load_image`.
            **variables: whatever else the chat template understands.

        Raises:
            InputError: messages, images or their number are not usable.
        """
        normalized, sources = normalize_messages(messages)
        loaded = [_load(source, allow_private_urls) for source in _fill(sources, images)]
        if loaded and self.image_processor is None:
            raise InputError("The package has no vision part, so it takes no images.", hint="Send text only.")
        text = self.chat_template.render(
            normalized, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )
        ids = np.array(self.tokenizer.encode(text), dtype=np.int32)  # [S before expansion]
        self._check_placeholders(ids, len(loaded))
        if self.image_processor is None or not loaded:
            return Prompt(ids[None], np.zeros(0, dtype=np.int64), None, None, text)
        processed = self.image_processor(loaded)
        return Prompt(
            self._expand(ids, processed)[None],
            processed.num_image_tokens,
            processed.pixel_values,
            processed.image_grid_thw,
            text,
        )

    def _check_placeholders(self, ids: npt.NDArray[np.int32], images: int) -> None:
        for kind, token_id, wanted in (("image", self.image_token_id, images), ("video", self.video_token_id, 0)):
            found = 0 if token_id is None else int(np.count_nonzero(ids == token_id))
            if found != wanted:
                token = None if token_id is None else self.tokenizer.token(token_id)
                raise InputError(
                    f"The prompt has {found} {kind} placeholders {token!r} for {wanted} {kind}s.",
                    hint=f"Remove {token!r} from the texts of the messages, and check that "
                    f"{self.chat_template.where} writes one for each {kind} part.",
                )

    def _expand(self, ids: npt.NDArray[np.int32], processed: ProcessedImages) -> npt.NDArray[np.int32]:
        # transformers/models/qwen3_vl/processing_qwen3_vl.py replace_image_token: grid.prod() / merge² times.
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == self.image_token_id] = processed.num_image_tokens
        return np.repeat(ids, repeats)


def _fill(sources: Sequence[ImageSource | None], images: Sequence[ImageSource]) -> list[ImageSource]:
    """The sources in order, parts without one taking the separately given images."""
    bare = sum(source is None for source in sources)
    if bare != len(images):
        raise InputError(
            f"The messages have {bare} image parts without a source, and {len(images)} images are given.",
            hint='Add a part {"type": "image"} for each image, or put the image into the part.',
        )
    rest = iter(images)
    return [next(rest) if source is None else source for source in sources]


def _load(source: ImageSource, allow_private_urls: bool) -> Image.Image:
    return source if isinstance(source, Image.Image) else load_image(source, allow_private_urls=allow_private_urls)
