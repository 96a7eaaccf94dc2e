"""A prompt as tensors, whatever it was made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class PromptVideo(NamedTuple):
    """A video of a prompt, which is a run of its grids.

    Attributes:
        first: index of its first row in `Prompt.image_grid_thw`; it has as many as temporal patches, all (1, H, W).
        grid_thw: (T, H, W) in patches, as transformers' video_grid_thw has it.
        timestamps: T times in seconds, as the model is told them.
        frames_indices: the frames that were taken, by their numbers in the video.
        seconds: that reading, decoding and resizing took.
    """

    first: int
    grid_thw: tuple[int, int, int]
    timestamps: tuple[float, ...]
    frames_indices: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready for the runtime.

    Attributes:
        input_ids: int32 [1, S], placeholders expanded; a video's are an image's too, as the runtime wants it.
        num_image_tokens: int64 [images], placeholders per image; [0] for text.
        pixel_values: float32 [patches, C*T*p*p], None for text.
        image_grid_thw: int64 [images, 3], None for text.
        text: the rendered chat template, placeholders not expanded.
        videos: which runs of those images are temporal patches of a video, in order.
    """

    input_ids: npt.NDArray[np.int32]
    num_image_tokens: npt.NDArray[np.int64]
    pixel_values: npt.NDArray[np.float32] | None
    image_grid_thw: npt.NDArray[np.int64] | None
    text: str
    videos: tuple[PromptVideo, ...] = ()

    @property
    def has_images(self) -> bool:
        """Whether any image or video is in the prompt."""
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

    @property
    def is_video(self) -> npt.NDArray[np.bool_]:
        """Which of the images are temporal patches of a video, bool [images]."""
        flags = np.zeros(len(self.grids), np.bool_)
        for video in self.videos:
            flags[video.first : video.first + video.grid_thw[0]] = True
        return flags

    @property
    def num_video_tokens(self) -> int:
        """How many placeholders are of videos."""
        return int(self.num_image_tokens[self.is_video].sum())

    def transformers_arrays(self, image_token_id: int, video_token_id: int) -> dict[str, npt.NDArray[Any]]:
        """The same prompt by the names, and in the form, that transformers' models take it.

        Args:
            image_token_id: of config.json.
            video_token_id: likewise.

        Returns:
            input_ids and mm_token_type_ids (0 text, 1 image, 2 video) int64 [1, S]; where there are any, pixel_values
            and image_grid_thw of the images, pixel_values_videos and video_grid_thw of the videos.
        """
        ids = self.input_ids.astype(np.int64)
        of_video = np.zeros(ids.shape, np.bool_)
        of_video[ids == image_token_id] = np.repeat(self.is_video, self.num_image_tokens)
        arrays: dict[str, npt.NDArray[Any]] = {"mm_token_type_ids": (ids == image_token_id) + of_video.astype(np.int64)}
        arrays["input_ids"] = np.where(of_video, video_token_id, ids)
        if self.pixel_values is not None:
            patch_of_video = np.repeat(self.is_video, self.grids.prod(axis=1))
            if not self.is_video.all():
                arrays["pixel_values"] = self.pixel_values[~patch_of_video]
                arrays["image_grid_thw"] = self.grids[~self.is_video]
            if self.videos:
                arrays["pixel_values_videos"] = self.pixel_values[patch_of_video]
                arrays["video_grid_thw"] = np.array([video.grid_thw for video in self.videos], np.int64)
        return arrays

    def named_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by the names that the runtime gives its inputs; without the image ones for text."""
        arrays: dict[str, npt.NDArray[Any]] = {"input_ids": self.input_ids}
        if self.pixel_values is not None and self.image_grid_thw is not None:
            arrays["pixel_values"] = self.pixel_values
            arrays["image_grid_thw"] = self.image_grid_thw
            arrays["num_image_tokens"] = self.num_image_tokens
        return arrays
