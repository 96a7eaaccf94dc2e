"""The tensors of a prompt: token ids and the patches of its images and videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class PromptVideo(NamedTuple):
    """A video of a prompt. Its T temporal patches are T consecutive images of the prompt.

    Attributes:
        first: row of its first temporal patch in `Prompt.image_grid_thw`; each of its T rows is (1, H, W).
        grid_thw: (T, H, W) in patches, as in transformers' video_grid_thw.
        timestamps: the T times in seconds that are written into the prompt.
        frames_indices: numbers of the frames that were taken from the video.
        seconds: seconds spent on reading, decoding and resizing.
    """

    first: int
    grid_thw: tuple[int, int, int]
    timestamps: tuple[float, ...]
    frames_indices: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Prompt:
    """A prompt as tensors, ready for the runtime.

    Attributes:
        input_ids: int32 [1, S] with expanded placeholders. Videos have image placeholders too, as the runtime expects.
        num_image_tokens: int64 [images], placeholder tokens of each image; of shape [0] for text alone.
        pixel_values: float32 [patches, C*T*p*p]; None for text alone.
        image_grid_thw: int64 [images, 3]; None for text alone.
        text: the rendered chat template, with placeholders not expanded.
        videos: the videos in order; each names the images that are its temporal patches.
    """

    input_ids: npt.NDArray[np.int32]
    num_image_tokens: npt.NDArray[np.int64]
    pixel_values: npt.NDArray[np.float32] | None
    image_grid_thw: npt.NDArray[np.int64] | None
    text: str
    videos: tuple[PromptVideo, ...] = ()

    @property
    def has_images(self) -> bool:
        """Whether the prompt has any image or video."""
        return self.pixel_values is not None

    @property
    def grids(self) -> npt.NDArray[np.int64]:
        """The rows of `image_grid_thw`, int64 [images, 3]; an array without rows for text alone."""
        return np.zeros((0, 3), np.int64) if self.image_grid_thw is None else self.image_grid_thw

    def images(self) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
        """Yields the pixels [patches, C*T*p*p] and the grid [1, 3] of each image.

        A vision graph takes images of unequal sizes one by one.
        """
        end = 0
        for grid in self.grids:
            start, end = end, end + int(grid.prod())
            assert self.pixel_values is not None, "a grid has pixels"
            yield self.pixel_values[start:end], grid[None]

    @property
    def is_video(self) -> npt.NDArray[np.bool_]:
        """Mask of the images that are temporal patches of a video: bool [images]."""
        flags = np.zeros(len(self.grids), np.bool_)
        for video in self.videos:
            flags[video.first : video.first + video.grid_thw[0]] = True
        return flags

    @property
    def num_video_tokens(self) -> int:
        """Number of placeholder tokens that stand for videos."""
        return int(self.num_image_tokens[self.is_video].sum())

    def transformers_arrays(self, image_token_id: int, video_token_id: int) -> dict[str, npt.NDArray[Any]]:
        """The keyword arguments by which a transformers model takes this prompt.

        Args:
            image_token_id: token id of the image placeholder, from config.json.
            video_token_id: token id of the video placeholder, from config.json.

        Returns:
            input_ids and mm_token_type_ids (0 text, 1 image, 2 video), int64 [1, S]; with images also pixel_values and
            image_grid_thw; with videos also pixel_values_videos and video_grid_thw.
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
        """The arrays under the names of onnxruntime-genai's inputs; for text alone only input_ids."""
        arrays: dict[str, npt.NDArray[Any]] = {"input_ids": self.input_ids}
        if self.pixel_values is not None and self.image_grid_thw is not None:
            arrays["pixel_values"] = self.pixel_values
            arrays["image_grid_thw"] = self.image_grid_thw
            arrays["num_image_tokens"] = self.num_image_tokens
        return arrays
