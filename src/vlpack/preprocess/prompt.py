"""Messages, images and videos to the tensors a prompt is made of: what Qwen3VLProcessor does, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlpack.errors import CheckpointError, InputError
from vlpack.preprocess.chat_template import ChatTemplate
from vlpack.preprocess.frames import VideoSource
from vlpack.preprocess.images import ImageProcessor, ProcessedImages
from vlpack.preprocess.inputs import Prompt, PromptVideo
from vlpack.preprocess.literal import CONTROL, TEXT, LiteralTexts, check_special_tokens
from vlpack.preprocess.load import ImageSource, load_image
from vlpack.preprocess.messages import Message, VideoPart, normalize_messages
from vlpack.preprocess.settings_folder import SettingsFolder
from vlpack.preprocess.tokenizer import Tokenizer
from vlpack.preprocess.video import ProcessedVideo, VideoOptions, VideoProcessor

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
"""What stands around every temporal patch of a video, as text; the chat template writes one more pair around all."""


def check_vision_start(tokenizer: Tokenizer, token_id: int | None) -> None:
    """The runtime counts positions of an image from the token before it, so that must be the one that prompts have.

    Raises:
        CheckpointError: ``token_id`` is another one.
    """
    if token_id != tokenizer.token_id(VISION_START):
        raise CheckpointError(
            f"vision_start_token_id is {token_id}, and {VISION_START} is {tokenizer.token_id(VISION_START)} in "
            f"{tokenizer.where}: images would stand at wrong positions.",
            "Take config.json and tokenizer.json from the same checkpoint.",
        )


class PromptBuilder:
    """Makes prompts for one checkpoint or package.

    Args:
        tokenizer: of the checkpoint.
        chat_template: of the checkpoint.
        image_processor: None if the package has no vision part; images are then refused.
        image_token_id: id of the placeholder (`image_token_id` of config.json); needed with an image_processor.
        video_token_id: id of the video placeholder, if any; needed with a video_processor.
        video_processor: None if no videos are taken.
        no_videos: why not, as a sentence.

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
        """Reads tokenizer, chat template, image and video settings of a checkpoint or package.

        Args:
            folder: with tokenizer.json, a chat template and preprocessor_config.json.
            image_token_id: from config.json; None for a text-only package, which needs no image settings.
            video_token_id: from config.json, if any.
            min_pixels: smallest image area, square pixels, instead of the file's.
            max_pixels: largest image area, square pixels, instead of the file's.
            no_videos: why videos are refused, as a sentence; None takes them, where there are settings for them. What
                is wrong with those is told when the first video comes.

        Raises:
            CheckpointError: a file is missing or damaged.
            OptionError: the pixel limits are impossible.
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
                no_videos = f"Videos cannot be taken. {error.message}"
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
            messages: see `normalize_messages`.
            images: for the image parts without a source of their own, in order. A PIL image is taken as it is
                (transparency onto white, no EXIF rotation), everything else goes through `load_image`; so it is in
                transformers. What an image processor made of one image is taken as that image.
            videos: for the video parts without a source of their own, in order; see `open_clip`. What a video processor
                made of one is taken as that video.
            video_options: how those videos are looked at whose parts do not say it themselves.
            add_generation_prompt: end with the header of the assistant's answer.
            tools: JSON schemas of functions the model may call.
            allow_private_urls: see `load_image`.
            special_tokens: what special tokens written in messages, tools and variables become. ``control``: the
                control tokens that they name, as in transformers. ``text``: plain text, for texts that come from
                strangers; see `vlpack.preprocess.literal`.
            **variables: whatever else the chat template understands.

        Raises:
            InputError: messages, images, videos or their number are not usable.
            OptionError: video_options do not fit the model's settings or a video, or special_tokens is something else.
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
        """One image, for prompts that show it again and again; arguments as for `load_image`.

        Raises:
            InputError: it is not usable, or the package takes no images.
        """
        self.check_takes(images=True)
        assert self.image_processor is not None, "checked"
        loaded = _load(source, allow_private_urls)
        return loaded if isinstance(loaded, ProcessedImages) else self.image_processor([loaded])

    def processed_video(self, source: VideoSource, options: VideoOptions | None = None) -> ProcessedVideo:
        """One video, likewise; arguments as for `open_clip`.

        Raises:
            InputError: it is not usable, or the package takes no videos.
            OptionError: options do not fit the model's settings or the video.
        """
        return self._process_videos([(source, options)])[0]

    def check_takes(self, *, images: bool = False, videos: bool = False) -> None:
        """Raises an InputError where the package does not take what there is."""
        if images and self.image_processor is None:
            raise InputError("The package has no vision part, so it takes no images.", hint="Send text only.")
        if videos and (self.video_processor is None or self.image_processor is None):
            raise InputError(self.no_videos, hint="Send text or single images.")

    def _encode(self, text: str, literal: LiteralTexts | None) -> npt.NDArray[np.int32]:
        """Token ids of a rendered template, int32 [S]."""
        pieces = text if literal is None else literal.pieces(text)
        return np.array(self.tokenizer.encode(pieces), dtype=np.int32)

    def _check_token(self, name: str, token_id: int) -> str:
        """A placeholder's text: a token that text is split at first, so that it expands the same as id and as text."""
        token = self.tokenizer.token(token_id) if self.tokenizer.is_added_token(token_id) else None
        if token is None or self.tokenizer.encode(token * 2) != [token_id] * 2:
            raise CheckpointError(
                f"{name} {token_id} is not a special token of {self.tokenizer.where}.",
                hint="Take config.json and tokenizer.json from the same checkpoint.",
            )
        return token

    def _processed(self, images: Sequence[Image.Image | ProcessedImages]) -> ProcessedImages:
        """One run of images; those that are processed already stay as they are."""
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
                raise CheckpointError(f"The video settings have {name} {for_videos}, those of images {for_images}.")
        return [
            source if isinstance(source, ProcessedVideo) else self.video_processor(source, options)
            for source, options in parts
        ]

    def _join(
        self, ids: npt.NDArray[np.int32], images: ProcessedImages, videos: Sequence[ProcessedVideo]
    ) -> tuple[ProcessedImages, tuple[PromptVideo, ...]]:
        """Images and the videos' temporal patches in the order of their placeholders, as one run of images."""
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
                # transformers' vision encoder and positions, too, take a video's patches one by one
                grids += [(1, *video.grid_thw[1:])] * video.grid_thw[0]
        grid = np.array(grids, np.int64)
        joined = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
        return ProcessedImages(joined, grid, grid.prod(axis=1) // self.image_processor.merge_size**2), tuple(spans)

    def _with_timestamps(self, text: str, videos: Sequence[ProcessedVideo]) -> str:
        """The text with every video placeholder replaced by its temporal patches, an image placeholder for each.

        Source: transformers/models/qwen3_vl/processing_qwen3_vl.py replace_video_token, with the other placeholder.
        """
        assert self.image_token_id is not None, "checked before"
        assert self.video_token_id is not None, "checked before"
        for token in (VISION_START, VISION_END):
            token_id = self.tokenizer.token_id(token)
            if token_id is None or not self.tokenizer.is_added_token(token_id):
                raise CheckpointError(f"{self.tokenizer.where} has no special token {token}, which videos need.")
        image = VISION_START + self._check_token("image_token_id", self.image_token_id) + VISION_END
        between = text.split(self._check_token("video_token_id", self.video_token_id))
        if len(between) != len(videos) + 1:  # a tokenizer that finds the token in other text, too
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
                    hint=f"Remove {token!r} from the texts of the messages, or take it as text (special_tokens='text', "
                    f"--literal); and check that {self.chat_template.where} writes one for each {kind} part.",
                )

    def _expand(self, ids: npt.NDArray[np.int32], processed: ProcessedImages) -> npt.NDArray[np.int32]:
        # transformers/models/qwen3_vl/processing_qwen3_vl.py replace_image_token: grid.prod() / merge² times.
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == self.image_token_id] = processed.num_image_tokens
        return np.repeat(ids, repeats)


def _fill(kind: str, sources: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """The sources in order, parts without one taking those that were given separately."""
    bare = sum(source is None for source in sources)
    if bare != len(given):
        raise InputError(
            f"The messages have {bare} {kind} parts without a source, and {len(given)} {kind}s are given.",
            hint=f'Add a part {{"type": "{kind}"}} for each {kind}, or put the {kind} into the part.',
        )
    rest = iter(given)
    return [next(rest) if source is None else source for source in sources]


def _fill_videos(
    parts: Sequence[VideoPart], given: Sequence[VideoSource | ProcessedVideo], options: VideoOptions | None
) -> list[tuple[VideoSource | ProcessedVideo, VideoOptions | None]]:
    sources = _fill("video", [part.source for part in parts], given)
    if options is not None and all(part.options for part in parts):
        what = "every video says itself how it is looked at" if parts else "there are no videos"
        raise InputError(f"video_options would have no effect: {what}.")
    return [(source, part.options or options) for source, part in zip(sources, parts, strict=True)]


def _load(source: ImageSource | ProcessedImages, allow_private_urls: bool) -> Image.Image | ProcessedImages:
    if isinstance(source, (Image.Image, ProcessedImages)):
        return source
    return load_image(source, allow_private_urls=allow_private_urls)
