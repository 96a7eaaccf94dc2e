"""The video processor: turns a video into patches and timestamps, bit for bit as transformers' for Qwen3-VL.

The steps per video: choose frames, resize all of them to one size that keeps the whole video within a budget of pixels,
normalize, and join every `temporal_patch_size` frames to a temporal patch. The last frame is repeated to fill the last
patch.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlpack.checkpoint.config import is_finite
from vlpack.errors import CheckpointError, InputError, OptionError, option
from vlpack.preprocess.images import MAX_ASPECT_RATIO, MAX_TEMPORAL_PATCH
from vlpack.preprocess.settings_folder import SettingsFolder, given_settings
from vlpack.preprocess.torch_resize import FILTERS, resize_frame
from vlpack.preprocess.video_decode import Clip, VideoSource, open_clip

MAX_FRAMES = 2**14
"""Maximum number of frames that are taken from one video."""

MAX_VIDEO_PIXELS = 2**28
"""Maximum pixels of all frames together after resizing: 3 GiB as float32, ten times Qwen3-VL's own limit."""


def video_size(
    num_frames: int, height: int, width: int, temporal_factor: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size to which the frames of a video are resized: multiples of `factor`, the whole video within the limits.

    The formula is ``smart_resize`` in transformers/models/qwen3_vl/video_processing_qwen3_vl.py.

    Args:
        num_frames: number of chosen frames.
        height: height of a frame in pixels.
        width: width of a frame in pixels.
        temporal_factor: frames per temporal patch, temporal_patch_size.
        factor: pixels along an edge of a merge block, patch_size * merge_size.
        min_pixels: smallest area of all frames together, in square pixels.
        max_pixels: largest area of all frames together, in square pixels.

    Returns:
        (height, width) in pixels.

    Raises:
        InputError: the frames' aspect ratio is above `MAX_ASPECT_RATIO`, or there are fewer frames than a temporal
            patch has, which transformers refuses too.
    """
    if num_frames < temporal_factor:
        raise InputError(
            f"A video of {num_frames} frame{'s' * (num_frames > 1)} is too short; the model takes at least "
            f"{temporal_factor}.",
            "Take more frames, or send a single one as an image.",
        )
    if height < factor or width < factor:
        grow = max(factor / height, factor / width)
        height, width = int(height * grow), int(width * grow)
    long_edge, short_edge = max(height, width), min(height, width)
    if long_edge / short_edge > MAX_ASPECT_RATIO:
        raise InputError(
            f"Frames of {width}x{height} pixels have an aspect ratio of {long_edge / short_edge:.1f}; the model "
            f"accepts at most {MAX_ASPECT_RATIO}.",
            "Crop or pad the video.",
        )
    counted = round(num_frames / temporal_factor) * temporal_factor
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    volume = num_frames * height * width
    if counted * new_height * new_width > max_pixels:
        shrink = math.sqrt(volume / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif counted * new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / volume)
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@dataclass(frozen=True)
class VideoOptions:
    """Which frames of a video are used, and their size. None keeps the model's own setting.

    Attributes:
        fps: frames per second to take from a video file. For a folder or list of images, all of which are used, it is
            the number of images per second.
        num_frames: number of evenly spaced frames to take, instead of a number per second.
        min_frames: minimum number of frames to take, as far as the video has them.
        max_frames: maximum number of frames to take.
        total_pixels: largest area of all frames together after resizing, in square pixels. A frame is never smaller
            than one token.

    Raises:
        OptionError: a value is out of range, or num_frames is given together with fps, min_frames or max_frames.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    total_pixels: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "min_frames", "max_frames", "total_pixels"):
            value, limit = getattr(self, name), MAX_VIDEO_PIXELS if name == "total_pixels" else MAX_FRAMES
            if value is not None and not (type(value) is int and 1 <= value <= limit):
                raise OptionError(f"{option(name)} is {value!r}; it must be a whole number from 1 to {limit}.")
        if self.fps is not None and not (is_finite(self.fps) and 0 < self.fps <= 1000):
            raise OptionError(f"{option('fps')} is {self.fps!r}; it must be above 0 and at most 1000.")
        if self.min_frames is not None and self.max_frames is not None and self.min_frames > self.max_frames:
            raise OptionError(
                f"{option('min_frames')} is {self.min_frames}, more than {option('max_frames')}, which is "
                f"{self.max_frames}."
            )
        if self.num_frames is not None:
            for name in ("fps", "min_frames", "max_frames"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f"{option('num_frames')} and {option(name)} exclude each other.", "Give only one of them."
                    )


class ProcessedVideo(NamedTuple):
    """A video as patches and timestamps, ready for the model.

    Attributes:
        pixel_values: float32 [T*H*W, C*t*p*p]: T temporal patches of t frames, each divided into H*W patches.
        grid_thw: (T, H, W) in patches, before merging.
        timestamps: T times in seconds from the start of the video, each the middle of a temporal patch's frames.
        frames_indices: numbers of the frames that were taken from the video.
        seconds: seconds spent on reading, decoding and resizing.
    """

    pixel_values: npt.NDArray[np.float32]
    grid_thw: tuple[int, int, int]
    timestamps: tuple[float, ...]
    frames_indices: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class VideoProcessor:
    """The video processor of Qwen3-VL, with the field names and defaults of transformers' Qwen3VLVideoProcessor.

    `min_pixels` and `max_pixels` are `size.shortest_edge` and `size.longest_edge` of the configuration: square pixels
    of all frames together after resizing.

    Raises:
        OptionError: a field is out of range.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 32 * 32 * 768
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_sample_frames: bool = True
    fps: float | None = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768

    def __post_init__(self) -> None:
        sizes = ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels")
        for name in (*sizes, "min_frames", "max_frames", "max_video_tokens"):
            self._require(type(getattr(self, name)) is int and getattr(self, name) > 0, name, "a positive integer")
        for field in dataclasses.fields(self):
            if field.type == "bool":
                self._require(type(getattr(self, field.name)) is bool, field.name, "true or false")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            good = isinstance(values, tuple) and len(values) == 3 and all(map(is_finite, values))
            self._require(good, name, "three finite numbers")
        self._require(all(value > 0 for value in self.image_std), "image_std", "positive")
        self._require(is_finite(self.rescale_factor) and self.rescale_factor > 0, "rescale_factor", "positive")
        self._require(self.resample in FILTERS, "resample", f"one of {FILTERS} (the supported filters)")
        rate = self.fps is None or (is_finite(self.fps) and 0 < self.fps <= 1000)
        self._require(rate, "fps", "above 0 and at most 1000, or null")
        whole = self.num_frames is None or (type(self.num_frames) is int and 0 < self.num_frames <= MAX_FRAMES)
        self._require(whole, "num_frames", f"a positive integer up to {MAX_FRAMES}, or null")
        self._require(self.min_frames <= MAX_FRAMES, "min_frames", f"at most {MAX_FRAMES}")
        self._require(self.min_pixels <= MAX_VIDEO_PIXELS, "min_pixels", f"at most {MAX_VIDEO_PIXELS}")
        self._require(self.temporal_patch_size <= MAX_TEMPORAL_PATCH, "temporal_patch_size", "at most 16")
        self._require(self.factor <= 4096, "patch_size", "at most 4096 / merge_size")

    def _require(self, condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise OptionError(f"{name} must be {wanted}, not {getattr(self, name)!r}.")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str] | SettingsFolder) -> VideoProcessor:
        """Reads the video settings of a checkpoint or package.

        The places are tried in transformers' order: `video_processor` inside processor_config.json,
        video_preprocessor_config.json, preprocessor_config.json (which older checkpoints use for images and videos).

        Raises:
            CheckpointError: there are no video settings, or a setting is out of range.
        """
        root, nested = SettingsFolder.of(folder), "processor_config.json"
        if root.has(nested) and isinstance(config := root.json(nested).get("video_processor"), dict):
            return cls._from_config(config, f"video_processor in {root / nested}")
        for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
            if root.has(name):
                return cls._from_config(root.json(name), str(root / name))
        raise CheckpointError(
            f"{folder} has no video settings: no video_preprocessor_config.json.",
            "Copy it from the model's page on the Hugging Face Hub.",
        )

    @classmethod
    def _from_config(cls, config: dict[str, Any], where: str) -> VideoProcessor:
        values = given_settings(cls, config, ("min_pixels", "max_pixels"))
        for name in ("fps", "num_frames"):
            if name in config:
                values[name] = config[name]  # for these two, null means that frames are not chosen by it
        if values.get("num_frames") is not None and "fps" not in config:
            values["fps"] = None
        size = config.get("size")
        if size is not None:
            for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
                if not isinstance(size, dict) or size.get(edge) is None:
                    raise CheckpointError(f"{where} has no size.{edge} (square pixels).")
                values[name] = size[edge]
        try:
            return cls(**values)
        except OptionError as error:
            raise CheckpointError(f"{where}: {error.message}") from error

    def with_options(self, options: VideoOptions) -> VideoProcessor:
        """A copy with a user's options in place of the model's settings.

        Raises:
            OptionError: total_pixels is below the model's smallest area.
        """
        changes = {
            name: value
            for name in ("fps", "num_frames", "min_frames", "max_frames")
            if (value := getattr(options, name)) is not None
        }
        if options.fps is not None:
            changes["num_frames"] = None
        if options.num_frames is not None:
            changes["fps"] = None
        if options.total_pixels is not None:
            if options.total_pixels < self.min_pixels:
                raise OptionError(
                    f"{option('total_pixels')} is {options.total_pixels}; the model's minimum is {self.min_pixels}."
                )
            changes["max_pixels"] = options.total_pixels
        return dataclasses.replace(self, **changes)

    @property
    def factor(self) -> int:
        """Edge length, in pixels, of the square of a frame that becomes one token."""
        return self.patch_size * self.merge_size

    def sample(self, total: int, fps: float) -> list[int]:
        """Chooses the frames of a video: their numbers in ascending order, possibly with repetitions.

        Source: ``Qwen3VLVideoProcessor.sample_frames`` in transformers.

        Args:
            total: number of frames of the video.
            fps: frames per second of the video.
        """
        if not self.do_sample_frames:
            return list(range(total))
        count = self.num_frames
        if count is None and self.fps is not None:
            count = int(total / fps * self.fps)
            count = min(max(count, self.min_frames), self.max_frames, total)
        if count is None:
            count = min(max(total, self.min_frames), self.max_frames)
        return [int(index) for index in np.linspace(0, total - 1, count).round()]

    def target_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """The size of a video's frames after resizing, (height, width) in pixels.

        Args:
            num_frames: number of chosen frames.
            height: height of a frame in pixels.
            width: width of a frame in pixels.

        Raises:
            InputError: the frames are too elongated, too few or too large, or, with do_resize off, not multiples of
                `factor`.
        """
        most = self.max_pixels
        if self.cap_pixels_per_frame:
            frame = min(self.max_video_tokens * self.factor**2, self.max_pixels // num_frames)
            most = max(frame, int(self.min_pixels * 1.05)) * num_frames
        size = height, width
        if self.do_resize:
            size = video_size(num_frames, height, width, self.temporal_patch_size, self.factor, self.min_pixels, most)
        elif height % self.factor or width % self.factor:
            raise InputError(
                f"Frames of {width}x{height} pixels are not multiples of {self.factor}, and do_resize is off."
            )
        if num_frames * size[0] * size[1] > MAX_VIDEO_PIXELS:
            raise InputError(
                f"{num_frames} frames of {size[1]}x{size[0]} pixels have more than {MAX_VIDEO_PIXELS} pixels together.",
                f"Take fewer frames, or limit their size with {option('total_pixels')}.",
            )
        return size

    def __call__(self, source: VideoSource, options: VideoOptions | None = None) -> ProcessedVideo:
        """Reads a video and converts it.

        Args:
            source: video as `open_clip` accepts it.
            options: frame and size options; None for the processor's own settings.

        Raises:
            InputError: the video cannot be used.
            OptionError: the options do not fit the processor's settings or this kind of video.
        """
        started = time.perf_counter()
        options = options or VideoOptions()
        chosen = self.with_options(options)
        with open_clip(source, options.fps) as clip:
            if clip.sampled:
                for name in ("num_frames", "min_frames", "max_frames"):
                    if getattr(options, name) is not None:
                        raise OptionError(f"{option(name)} has no effect on {clip.name}: all of them are used.")
                indices = list(range(len(clip.times)))
            else:
                indices = chosen.sample(len(clip.times), clip.fps)
            if len(indices) > MAX_FRAMES:
                raise InputError(f"{clip.name}: {len(indices)} frames are too many; at most {MAX_FRAMES} are accepted.")
            pixels, grid = chosen._patches(clip, indices)
            stamps = chosen._timestamps([clip.times[index] for index in indices])
        return ProcessedVideo(pixels, grid, stamps, tuple(indices), time.perf_counter() - started)

    def _timestamps(self, times: list[float]) -> tuple[float, ...]:
        # As _calculate_timestamps in transformers/models/qwen3_vl/processing_qwen3_vl.py.
        size = self.temporal_patch_size
        times = times + times[-1:] * (-len(times) % size)
        return tuple((times[first] + times[first + size - 1]) / 2 for first in range(0, len(times), size))

    def _patches(self, clip: Clip, indices: list[int]) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
        """The patches, float32 [T*H*W, C*t*p*p], and the grid (T, H, W) of the chosen frames.

        Frames are processed one by one, so that only one is in memory beside the result.
        """
        height, width = self.target_size(len(indices), clip.height, clip.width)
        patch, merge, depth = self.patch_size, self.merge_size, self.temporal_patch_size
        grid = (math.ceil(len(indices) / depth), height // patch, width // patch)
        rows, columns = height // self.factor, width // self.factor
        out = np.empty((grid[0], rows, columns, merge, merge, 3, depth, patch, patch), np.float32)
        level_values = self._level_values()
        for number, frame in enumerate(clip.frames(indices)):
            sized = resize_frame(frame, height, width, self.resample) if self.do_resize else frame
            blocks = sized.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(6, 0, 3, 1, 4, 2, 5)
            last = number == len(indices) - 1
            for channel in range(3):
                values = level_values[channel][blocks[channel]]  # [rows, columns, merge, merge, p, p]
                for place in range(number % depth, depth if last else number % depth + 1):
                    out[number // depth, :, :, :, :, channel, place] = values
        return out.reshape(math.prod(grid), -1), grid

    def _level_values(self) -> npt.NDArray[np.float32]:
        """Lookup table that rescales and normalizes: float32 [3, 256], the value of each uint8 level per channel.

        If both are done, mean and deviation are rescaled instead of the pixels, all in float32, as in
        transformers/image_processing_backends.py. The image processor rescales the pixels, which rounds differently.
        """
        levels = np.tile(np.arange(256, dtype=np.float32), (3, 1))
        mean = np.array(self.image_mean, np.float32)[:, None]
        std = np.array(self.image_std, np.float32)[:, None]
        if self.do_rescale and self.do_normalize:
            scale = np.float32(1.0 / self.rescale_factor)
            levels = (levels - mean * scale) / (std * scale)
        elif self.do_normalize:
            levels = (levels - mean) / std
        elif self.do_rescale:
            levels = levels * np.float32(self.rescale_factor)
        return levels
