"""Builds the tensors of a prompt from messages, images and videos, as transformers' Qwen3VLProcessor does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlpack.errors import CheckpointError, InputError, option
from vlpack.preprocess.chat_template import ChatTemplate
from vlpack.preprocess.image_source import ImageSource, load_image
from vlpack.preprocess.images import ImageProcessor, ProcessedImages
from vlpack.preprocess.literal import CONTROL, TEXT, LiteralTexts, check_special_tokens
from vlpack.preprocess.messages import Message, VideoPart, normalize_messages
from vlpack.preprocess.prompt import Prompt, PromptVideo
from vlpack.preprocess.settings_folder import SettingsFolder
from vlpack.preprocess.tokenizer import Tokenizer
from vlpack.preprocess.video import ProcessedVideo, VideoOptions, VideoProcessor
from vlpack.preprocess.video_decode import VideoSource

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
"""The special tokens before and after every temporal patch of a video. The chat template writes one more pair around
the whole video."""


def check_vision_start(tokenizer: Tokenizer, token_id: int | None) -> None:
    """Checks that vision_start_token_id of the configuration is the tokenizer's id of `VISION_START`.

    The runtime computes the positions of an image from the place of this token before it.

    Args:
        tokenizer: tokenizer of the checkpoint or package.
        token_id: vision_start_token_id of the configuration.

    Raises:
        CheckpointError: the ids differ.
    """
    if token_id != tokenizer.token_id(VISION_START):
        raise CheckpointError(
            f"vision_start_token_id is {token_id}, but {VISION_START} is {tokenizer.token_id(VISION_START)} in "
            f"{tokenizer.where}: images would get wrong positions.",
            "Take config.json and tokenizer.json from the same checkpoint.",
        )


class PromptBuilder:
    """Builds prompts for one checkpoint or package.

    Args:
        tokenizer: tokenizer of the checkpoint.
        chat_template: chat template of the checkpoint.
        image_processor: image processor; None for a package without a vision part, for which images are refused.
        image_token_id: id of the image placeholder (`image_token_id` of config.json); required with an image_processor.
        video_token_id: id of the video placeholder, if any; required with a video_processor.
        video_processor: video processor; None if videos are refused.
        no_videos: reason why videos are refused, as a sentence.

    Raises:
        CheckpointError: image_token_id is not a special token of the tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        image_processor: ImageProcessor | None = None,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        video_processor: VideoProcessor | None = None,
        no_videos: str = "The package takes no videos.",
    ) -> None:
        if image_processor is not None and image_token_id is None:
            raise CheckpointError("An image processor needs the image_token_id of config.json.")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.video_processor, self.no_videos = video_processor, no_videos
        if image_token_id is not None:
            self._check_token("image_token_id", image_token_id)

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str] | SettingsFolder,
        *,
        image_token_id: int | None,
        video_token_id: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        no_videos: str | None = None,
    ) -> PromptBuilder:
        """Reads the tokenizer, chat template, image settings and video settings of a checkpoint or package.

        Args:
            folder: folder with tokenizer.json, a chat template and preprocessor_config.json.
            image_token_id: id of the image placeholder, from config.json; None for a text-only package, which needs no
                image settings.
            video_token_id: id of the video placeholder, from config.json, if any.
            min_pixels: smallest image area in square pixels; None for the file's.
            max_pixels: largest image area in square pixels; None for the file's.
            no_videos: reason why videos are refused, as a sentence; None accepts videos if the folder has settings for
                them. An error in those settings is reported when the first video is used.

        Raises:
            CheckpointError: a file is missing or damaged.
            OptionError: the pixel limits are out of range or exclude each other.
        """
        images = videos = None
        if image_token_id is None:
            no_videos = "The package has no vision part, so it takes no videos."
        else:
            images = ImageProcessor.from_folder(folder).with_pixel_limits(min_pixels, max_pixels)
            if video_token_id is None:
                no_videos = no_videos or "The package has no token for videos, so it takes none."
        if no_videos is None:
            try:
                videos = VideoProcessor.from_folder(folder)
            except CheckpointError as error:
                no_videos = f"Videos cannot be used. {error.message}"
        template = ChatTemplate.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder)
        return cls(tokenizer, template, images, image_token_id, video_token_id, videos, no_videos or "")

    def __call__(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageSource | ProcessedImages] = (),
        videos: Sequence[VideoSource | ProcessedVideo] = (),
        *,
        video_options: VideoOptions | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        allow_private_urls: bool = False,
        special_tokens: str = CONTROL,
        **variables: Any,
    ) -> Prompt:
        """Makes the prompt of a conversation.

        Args:
            messages: conversation in one of the forms that `normalize_messages` accepts.
            images: images for the image parts without a source, in order. As in transformers, a PIL image is used
                without EXIF rotation and with transparency composited onto white; any other source goes through
                `load_image`. An image that an `ImageProcessor` has already processed is used as it is.
            videos: videos for the video parts without a source, in order, as `open_clip` accepts them. A video that a
                `VideoProcessor` has already processed is used as it is.
            video_options: frame and size options for the videos whose parts have none.
            add_generation_prompt: whether to end with the header of the assistant's answer.
            tools: JSON schemas of the functions that the model may call.
            allow_private_urls: whether image URLs may lead to this machine or its private network.
            special_tokens: what special tokens written in messages, tools and variables become: ``control`` tokens, as
                in transformers, or plain ``text``, for texts from untrusted people; see `vlpack.preprocess.literal`.
            **variables: other variables that the chat template understands.

        Raises:
            InputError: messages, images or videos cannot be used, or their numbers do not match.
            OptionError: the video options do not fit the model's settings or a video, or special_tokens is another
                value.
        """
        check_special_tokens(special_tokens)
        conversation = normalize_messages(messages)
        loaded = [_load(source, allow_private_urls) for source in _fill("image", conversation.images, images)]
        parts = _fill_videos(conversation.videos, videos, video_options)
        self.check_takes(images=bool(loaded), videos=bool(parts))
        told, literal = conversation.messages, None
        if special_tokens == TEXT:
            literal = LiteralTexts(self.tokenizer, told, tools, variables)
            told, tools, variables = literal.messages(told), literal.broken(tools), literal.broken(variables)
        marked = self.chat_template.render(told, add_generation_prompt=add_generation_prompt, tools=tools, **variables)
        text = marked if literal is None else "".join(literal.pieces(marked))
        ids = self._encode(marked, literal)  # [S before expansion]
        self._check_placeholders(ids, len(loaded), len(parts))
        if self.image_processor is None or not (loaded or parts):
            return Prompt(ids[None], np.zeros(0, dtype=np.int64), None, None, text)
        processed = self._processed(loaded)
        spans: tuple[PromptVideo, ...] = ()
        if parts:
            clips = self._process_videos(parts)
            processed, spans = self._join(ids, processed, clips)
            ids = self._encode(self._with_timestamps(marked, clips), literal)
        return Prompt(
            self._expand(ids, processed)[None],
            processed.num_image_tokens,
            processed.pixel_values,
            processed.image_grid_thw,
            text,
            spans,
        )

    def processed_image(self, source: ImageSource, allow_private_urls: bool = False) -> ProcessedImages:
        """Processes one image once, so that many prompts can use it. The arguments are those of `load_image`.

        Raises:
            InputError: the image cannot be used, or the package takes no images.
        """
        self.check_takes(images=True)
        assert self.image_processor is not None, "checked"
        loaded = _load(source, allow_private_urls)
        return loaded if isinstance(loaded, ProcessedImages) else self.image_processor([loaded])

    def processed_video(self, source: VideoSource, options: VideoOptions | None = None) -> ProcessedVideo:
        """Processes one video once, so that many prompts can use it.

        Args:
            source: video as `open_clip` accepts it.
            options: frame and size options; None for the model's settings.

        Raises:
            InputError: the video cannot be used, or the package takes no videos.
            OptionError: the options do not fit the model's settings or the video.
        """
        return self._process_videos([(source, options)])[0]

    def check_takes(self, *, images: bool = False, videos: bool = False) -> None:
        """Raises an InputError if there are images or videos and the package does not take them."""
        if images and self.image_processor is None:
            raise InputError("The package has no vision part, so it takes no images.", hint="Send text only.")
        if videos and (self.video_processor is None or self.image_processor is None):
            raise InputError(self.no_videos, hint="Send text or single images.")

    def _encode(self, text: str, literal: LiteralTexts | None) -> npt.NDArray[np.int32]:
        """The token ids of a rendered template, int32 [S]."""
        pieces = text if literal is None else literal.pieces(text)
        return np.array(self.tokenizer.encode(pieces), dtype=np.int32)

    def _check_token(self, name: str, token_id: int) -> str:
        """The text of a placeholder token, which must be a special token.

        The tokenizer splits text at special tokens first, so that repeating the text and repeating the id are the same.

        Raises:
            CheckpointError: the id is not that of a special token.
        """
        token = self.tokenizer.token(token_id) if self.tokenizer.is_added_token(token_id) else None
        if token is None or self.tokenizer.encode(token * 2) != [token_id] * 2:
            raise CheckpointError(
                f"{name} {token_id} is not a special token of {self.tokenizer.where}.",
                hint="Take config.json and tokenizer.json from the same checkpoint.",
            )
        return token

    def _processed(self, images: Sequence[Image.Image | ProcessedImages]) -> ProcessedImages:
        """Processes the images and joins them in order; images that are already processed stay as they are."""
        assert self.image_processor is not None, "checked before"
        bare = [image for image in images if not isinstance(image, ProcessedImages)]
        if len(bare) == len(images):
            return self.image_processor(bare)
        done = [image if isinstance(image, ProcessedImages) else self.image_processor([image]) for image in images]
        return ProcessedImages(*(np.concatenate(arrays) for arrays in zip(*done, strict=True)))

    def _process_videos(
        self, parts: Sequence[tuple[VideoSource | ProcessedVideo, VideoOptions | None]]
    ) -> list[ProcessedVideo]:
        self.check_takes(videos=True)
        assert self.video_processor is not None, "checked"
        assert self.image_processor is not None, "checked"
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            for_videos, for_images = getattr(self.video_processor, name), getattr(self.image_processor, name)
            if for_videos != for_images:
                raise CheckpointError(
                    f"{name} is {for_videos} in the video settings and {for_images} in the image settings; "
                    "they must be equal."
                )
        return [
            source if isinstance(source, ProcessedVideo) else self.video_processor(source, options)
            for source, options in parts
        ]

    def _join(
        self, ids: npt.NDArray[np.int32], images: ProcessedImages, videos: Sequence[ProcessedVideo]
    ) -> tuple[ProcessedImages, tuple[PromptVideo, ...]]:
        """Joins images and the temporal patches of videos in the order of their placeholders in ``ids``."""
        assert self.image_processor is not None, "checked before"
        pixels: list[npt.NDArray[np.float32]] = []
        grids: list[tuple[int, int, int]] = []
        spans: list[PromptVideo] = []
        image = end = 0
        for token in ids[(ids == self.image_token_id) | (ids == self.video_token_id)]:
            if token == self.image_token_id:
                frames, height, width = (int(side) for side in images.image_grid_thw[image])
                start, end, image = end, end + frames * height * width, image + 1
                pixels.append(images.pixel_values[start:end])
                grids.append((frames, height, width))
            else:
                video = videos[len(spans)]
                spans.append(PromptVideo(len(grids), video.grid_thw, *video[2:]))
                pixels.append(video.pixel_values)
                # transformers' vision encoder and positions also treat each temporal patch as an image of its own
                grids += [(1, *video.grid_thw[1:])] * video.grid_thw[0]
        grid = np.array(grids, np.int64)
        joined = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
        return ProcessedImages(joined, grid, grid.prod(axis=1) // self.image_processor.merge_size**2), tuple(spans)

    def _with_timestamps(self, text: str, videos: Sequence[ProcessedVideo]) -> str:
        """The text with every video placeholder replaced by a timestamp and an image placeholder per temporal patch.

        Source: replace_video_token in transformers/models/qwen3_vl/processing_qwen3_vl.py, which writes video
        placeholders; the runtime knows only image placeholders.
        """
        assert self.image_token_id is not None, "checked before"
        assert self.video_token_id is not None, "checked before"
        for token in (VISION_START, VISION_END):
            token_id = self.tokenizer.token_id(token)
            if token_id is None or not self.tokenizer.is_added_token(token_id):
                raise CheckpointError(f"{self.tokenizer.where} lacks the special token {token}, which videos need.")
        image = VISION_START + self._check_token("image_token_id", self.image_token_id) + VISION_END
        between = text.split(self._check_token("video_token_id", self.video_token_id))
        if len(between) != len(videos) + 1:  # the tokenizer also produces the token from other text
            raise InputError(f"The prompt has {len(between) - 1} video placeholders for {len(videos)} videos.")
        pieces = [between[0]]
        for video, after in zip(videos, between[1:], strict=True):
            pieces += [f"<{stamp:.1f} seconds>{image}" for stamp in video.timestamps] + [after]
        return "".join(pieces)

    def _check_placeholders(self, ids: npt.NDArray[np.int32], images: int, videos: int) -> None:
        for kind, token_id, wanted in (("image", self.image_token_id, images), ("video", self.video_token_id, videos)):
            found = 0 if token_id is None else int(np.count_nonzero(ids == token_id))
            if found != wanted:
                token = None if token_id is None else self.tokenizer.token(token_id)
                raise InputError(
                    f"The prompt has {found} {kind} placeholders {token!r} for {wanted} {kind}s.",
                    hint=f"Remove {token!r} from the texts of the messages, or give {option('special_tokens', 'text')} "
                    f"to encode it as text; and check that {self.chat_template.where} writes one for each {kind} part.",
                )

    def _expand(self, ids: npt.NDArray[np.int32], processed: ProcessedImages) -> npt.NDArray[np.int32]:
        # As replace_image_token in transformers/models/qwen3_vl/processing_qwen3_vl.py: grid.prod() / merge² copies.
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == self.image_token_id] = processed.num_image_tokens
        return np.repeat(ids, repeats)


def _fill(kind: str, sources: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """The sources of all parts in order; parts without a source get the separately given ones."""
    bare = sum(source is None for source in sources)
    if bare != len(given):
        raise InputError(
            f"The messages have {bare} {kind} parts without a source, but {len(given)} {kind}s are given.",
            hint=f'Add a part {{"type": "{kind}"}} for each {kind}, or put the {kind} into the part.',
        )
    rest = iter(given)
    return [next(rest) if source is None else source for source in sources]


def _fill_videos(
    parts: Sequence[VideoPart], given: Sequence[VideoSource | ProcessedVideo], options: VideoOptions | None
) -> list[tuple[VideoSource | ProcessedVideo, VideoOptions | None]]:
    sources = _fill("video", [part.source for part in parts], given)
    if options is not None and all(part.options for part in parts):
        what = "every video part has options of its own" if parts else "there are no videos"
        raise InputError(f"video_options would have no effect: {what}.")
    return [(source, part.options or options) for source, part in zip(sources, parts, strict=True)]


def _load(source: ImageSource | ProcessedImages, allow_private_urls: bool) -> Image.Image | ProcessedImages:
    if isinstance(source, (Image.Image, ProcessedImages)):
        return source
    return load_image(source, allow_private_urls=allow_private_urls)
