"""The image processor: turns images into the patches of a Qwen vision encoder, bit for bit as transformers does.

The steps per image are those of transformers' PIL image processor: composite transparency onto white, resize with PIL
on uint8, rescale in float64 and round to float32, normalize in float32, cut into patches in merge-block order, and
repeat the single frame `temporal_patch_size` times.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlpack.checkpoint.config import is_finite
from vlpack.errors import CheckpointError, InputError, OptionError, option
from vlpack.preprocess.settings_folder import SettingsFolder, given_settings

MAX_ASPECT_RATIO = 200
"""Maximum ratio of the longest to the shortest edge, as in the Qwen processors."""

_MAX_FACTOR = 4096  # pixels per merge-block edge; with _MAX_MIN_PIXELS it bounds what a hostile config can allocate
_MAX_MIN_PIXELS = 2**24  # Qwen3-VL's largest area
MAX_TEMPORAL_PATCH = 16
"""Maximum frames per temporal patch; all models have 2. The bound is needed because a package's settings are untrusted
and every image takes 3 · 4 · temporal_patch_size bytes per pixel."""

MAX_PIXEL_VALUES = 2**30
"""Maximum float32 values of all images of a prompt together (4 GiB): the largest image that is decoded, with two frames
per patch."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(
    height: int,
    width: int,
    factor: int = 28,
    min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 1280,
    *,
    rounded: Callable[[float], int] = round,
) -> tuple[int, int]:
    """The size to which an image is resized: multiples of `factor`, area within the limits, aspect ratio kept.

    The formula is that of transformers/models/qwen2_vl/image_processing_pil_qwen2_vl.py. Halves round to even, as
    Python's `round` does; onnxruntime-genai's own processor rounds them away from zero and so chooses other sizes.

    Args:
        height: height of the image in pixels, at least 1.
        width: width of the image in pixels, at least 1.
        factor: pixels along an edge of a merge block, patch_size * merge_size.
        min_pixels: smallest area, in square pixels.
        max_pixels: largest area, in square pixels.
        rounded: rounding function; another one is given only to find out where another program's sizes differ.

    Returns:
        (height, width) in pixels.

    Raises:
        InputError: the image is empty, or its aspect ratio is above `MAX_ASPECT_RATIO`.
    """
    if height < 1 or width < 1:
        raise InputError(f"An image of {width}x{height} pixels is empty.")
    long_edge, short_edge = max(height, width), min(height, width)
    if long_edge / short_edge > MAX_ASPECT_RATIO:
        raise InputError(
            f"An image of {width}x{height} pixels has an aspect ratio of {long_edge / short_edge:.1f}; "
            f"the model accepts at most {MAX_ASPECT_RATIO}.",
            hint="Crop or pad the image.",
        )
    area = height * width
    new_height, new_width = rounded(height / factor) * factor, rounded(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / area)
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


class ProcessedImages(NamedTuple):
    """The vision encoder's inputs for all images of a prompt together.

    Attributes:
        pixel_values: float32 [patches, C*T*p*p], the patches of all images, image after image.
        image_grid_thw: int64 [images, 3], patches of each image along time, height and width, before merging.
        num_image_tokens: int64 [images], placeholder tokens of each image in the prompt, after merging.
    """

    pixel_values: npt.NDArray[np.float32]
    image_grid_thw: npt.NDArray[np.int64]
    num_image_tokens: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageProcessor:
    """The image processor of a Qwen-VL model, with the field names and defaults of transformers' Qwen2VLImageProcessor.

    `min_pixels` and `max_pixels` (square pixels after resizing) are `size.shortest_edge` and `size.longest_edge` in
    configurations of transformers 5. `resample` is a PIL.Image.Resampling number.

    Raises:
        OptionError: a field is out of range.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, ...] = _CLIP_MEAN
    image_std: tuple[float, ...] = _CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC
    do_convert_rgb: bool = True
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            _require(_is_int(getattr(self, name)) and getattr(self, name) > 0, name, "a positive integer", self)
        for name in ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"):
            _require(isinstance(getattr(self, name), bool), name, "true or false", self)
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            numbers = isinstance(values, tuple) and len(values) == 3 and all(map(is_finite, values))
            _require(numbers, name, "three finite numbers", self)
        _require(all(value > 0 for value in self.image_std), "image_std", "positive", self)
        _require(is_finite(self.rescale_factor) and self.rescale_factor > 0, "rescale_factor", "positive", self)
        known_filters = list(map(int, Image.Resampling))
        _require(self.resample in known_filters, "resample", f"one of {known_filters}", self)
        _require(self.min_pixels <= self.max_pixels, "min_pixels", f"at most max_pixels ({self.max_pixels})", self)
        _require(self.min_pixels <= _MAX_MIN_PIXELS, "min_pixels", f"at most {_MAX_MIN_PIXELS}", self)
        _require(self.temporal_patch_size <= MAX_TEMPORAL_PATCH, "temporal_patch_size", "at most 16", self)
        _require(self.factor <= _MAX_FACTOR, "patch_size", f"at most {_MAX_FACTOR} / merge_size", self)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str] | SettingsFolder) -> ImageProcessor:
        """Reads the image settings of a checkpoint or package.

        As in transformers, `image_processor` inside processor_config.json wins over preprocessor_config.json. A
        processor_config.json without it (the onnxruntime-extensions file of a built package) is ignored.

        Raises:
            CheckpointError: neither file has the settings, or a setting is out of range.
        """
        root, nested, flat = SettingsFolder.of(folder), "processor_config.json", "preprocessor_config.json"
        if root.has(nested) and isinstance(config := root.json(nested).get("image_processor"), dict):
            return cls._from_config(config, f"image_processor in {root / nested}")
        if root.has(flat):
            return cls._from_config(root.json(flat), str(root / flat))
        raise CheckpointError(
            f"{folder} has no image settings: neither preprocessor_config.json nor a processor_config.json with "
            "an 'image_processor' object.",
            hint="Copy preprocessor_config.json from the model's page on the Hugging Face Hub.",
        )

    @classmethod
    def _from_config(cls, config: dict[str, Any], where: str) -> ImageProcessor:
        values = given_settings(cls, config, ("min_pixels", "max_pixels"))
        size = config.get("size")
        if size is None:
            size = {"shortest_edge": cls.min_pixels, "longest_edge": cls.max_pixels}
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            # Files of transformers 4 have the top-level keys, which override a `size` beside them.
            values[name] = config.get(name)
            if values[name] is None:
                values[name] = size.get(edge) if isinstance(size, dict) else None
            if values[name] is None:
                raise CheckpointError(f"{where} has neither '{name}' nor size.{edge} (square pixels).")
        try:
            return cls(**values)
        except OptionError as error:
            raise CheckpointError(f"{where}: {error.message}") from error

    def with_pixel_limits(self, min_pixels: int | None = None, max_pixels: int | None = None) -> ImageProcessor:
        """A copy with other area limits, in square pixels; None keeps the present limit.

        Raises:
            OptionError: a limit is out of range, or the limits exclude each other.
        """
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None and not (_is_int(value) and value > 0):
                raise OptionError(f"{option(name)} must be a positive integer, not {value!r}.")
        if min_pixels is None and max_pixels is not None and max_pixels < self.min_pixels:
            raise OptionError(
                f"{option('max_pixels')} is {max_pixels}; the model's own {option('min_pixels')} is {self.min_pixels}.",
                f"Raise it to at least that, or lower {option('min_pixels')} too.",
            )
        if max_pixels is None and min_pixels is not None and min_pixels > self.max_pixels:
            raise OptionError(
                f"{option('min_pixels')} is {min_pixels}; the model's own {option('max_pixels')} is {self.max_pixels}.",
                f"Lower it to at most that, or raise {option('max_pixels')} too.",
            )
        return dataclasses.replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
        )

    @property
    def factor(self) -> int:
        """Edge length, in pixels, of the square of the image that becomes one token."""
        return self.patch_size * self.merge_size

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """The size of an image after resizing, (height, width) in pixels, from its size before.

        Raises:
            InputError: the image is empty or too elongated, or, with do_resize off, not a multiple of `factor`.
        """
        if self.do_resize:
            return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        if height < 1 or width < 1 or height % self.factor or width % self.factor:
            raise InputError(
                f"An image of {width}x{height} pixels is not a multiple of {self.factor}, and do_resize is off.",
                hint="Resize the image or set do_resize to true.",
            )
        return height, width

    def __call__(self, images: Sequence[Image.Image]) -> ProcessedImages:
        """Converts images to patches.

        Args:
            images: PIL images of any mode. EXIF rotation is not applied here but by `load_image`.

        Returns:
            Arrays that cover all images in order; empty arrays for no images.

        Raises:
            InputError: an image is empty, too elongated, damaged or, with do_convert_rgb off, not RGB; or the images
                take more than `MAX_PIXEL_VALUES` values together.
        """
        patch = self.patch_size
        sizes = [self.target_size(image.height, image.width) for image in images]
        grids = np.array([(1, h // patch, w // patch) for h, w in sizes], dtype=np.int64).reshape(-1, 3)
        patches_per_image = grids.prod(axis=1)
        values = int(patches_per_image.sum()) * 3 * self.temporal_patch_size * patch * patch
        if values > MAX_PIXEL_VALUES:
            raise InputError(
                f"The images take {4 * values / 1e9:.1f} GB as numbers; at most {4 * MAX_PIXEL_VALUES / 1e9:.1f} GB "
                "are accepted.",
                f"Give smaller or fewer images, or a smaller {option('max_pixels')}.",
            )
        # Filled image by image, so that only one resized uint8 image is in memory beside the result.
        pixels = np.empty((int(patches_per_image.sum()), 3, self.temporal_patch_size, patch * patch), dtype=np.float32)
        level_values = self._level_values()
        start = 0
        for number, image in enumerate(images, start=1):
            (height, width), count = sizes[number - 1], int(patches_per_image[number - 1])
            try:
                rgb = self._to_rgb(image)
                if self.do_resize:
                    rgb = rgb.resize((width, height), resample=self.resample)
            except (OSError, SyntaxError, ValueError) as error:  # PIL decodes lazily, so damage is found here
                raise InputError(f"Image {number} of {len(images)} cannot be decoded: {error}.") from error
            self._write_patches(np.asarray(rgb), level_values, pixels[start : start + count])
            start += count
        return ProcessedImages(
            pixel_values=pixels.reshape(len(pixels), math.prod(pixels.shape[1:])),  # [patches, C*T*p*p]
            image_grid_thw=grids,
            num_image_tokens=patches_per_image // self.merge_size**2,
        )

    def _to_rgb(self, image: Image.Image) -> Image.Image:
        # As convert_to_rgb in transformers/image_transforms.py: what may be transparent is composited onto white.
        if not self.do_convert_rgb:
            if image.mode != "RGB":
                raise InputError(f"The image has mode {image.mode} and do_convert_rgb is off; pass an RGB image.")
            return image
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, rgba).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")

    def _level_values(self) -> npt.NDArray[np.float32]:
        """Lookup table that rescales and normalizes: float32 [3, 256], the value of each uint8 level per channel."""
        levels = np.arange(256, dtype=np.float64)
        if self.do_rescale:
            levels = levels * self.rescale_factor
        # transformers rounds to float32 and then normalizes in float32; the same order gives the same bits.
        values = np.tile(levels.astype(np.float32), (3, 1))
        if self.do_normalize:
            mean = np.array(self.image_mean, dtype=np.float32)[:, None]
            std = np.array(self.image_std, dtype=np.float32)[:, None]
            values = (values - mean) / std
        return values

    def _write_patches(
        self, rgb: npt.NDArray[np.uint8], level_values: npt.NDArray[np.float32], out: npt.NDArray[np.float32]
    ) -> None:
        """Writes an image, uint8 [H, W, 3], into `out` [patches, 3, T, p*p] in merge-block order.

        The merge_size² patches of a merge block follow each other.
        """
        patch, merge = self.patch_size, self.merge_size
        rows, columns = rgb.shape[0] // self.factor, rgb.shape[1] // self.factor
        blocks = rgb.reshape(rows, merge, patch, columns, merge, patch, 3)
        blocks = blocks.transpose(0, 6, 3, 1, 4, 2, 5)  # [rows, 3, columns, merge, merge, p, p]
        out = out.reshape(rows, columns * merge * merge, 3, self.temporal_patch_size, patch * patch)
        for row in range(rows):  # row by row saves memory: numpy widens uint8 indices to 64 bits
            for channel in range(3):
                values = level_values[channel][blocks[row, channel]]  # [columns, merge, merge, p, p]
                out[row, :, channel] = values.reshape(-1, 1, patch * patch)  # broadcast: the same frame T times


def check_pixel_limits(folder: Path, sees: bool, min_pixels: int | None, max_pixels: int | None) -> None:
    """Raises an OptionError if pixel limits are given for a package without a vision encoder."""
    if not sees and (min_pixels is not None or max_pixels is not None):
        raise OptionError(
            f"{option('min_pixels')} and {option('max_pixels')} have no effect: {folder} has no vision encoder."
        )


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, name: str, wanted: str, processor: ImageProcessor) -> None:
    if not condition:
        raise OptionError(f"{name} must be {wanted}, not {getattr(processor, name)!r}.")
