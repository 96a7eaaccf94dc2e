"""Writes ``processor_config.json``, settings of onnxruntime-genai's image processor for callers in C#, C++ and Java.

That processor's pixels differ slightly from transformers' (docs/runtime-contract.md of the project and the README.md of
every package describe where). Python callers get exactly transformers' pixels from `vlpack.preprocess`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from vlpack.architectures.base import Architecture
from vlpack.architectures.hparams import VisionFacts
from vlpack.errors import CheckpointError
from vlpack.preprocess import ImageProcessor, smart_resize

_SIZES = ((1280, 720), (1920, 1080), (1024, 768), (640, 480), (800, 600), (854, 480), (600, 400), (400, 400))
_EDGES = sorted(
    {edge for size in _SIZES for edge in size} | {240, 320, 360, 576, 900, 960, 1050, 1200, 1440, 1600, 1680}
)
"""Edge lengths of common photographs and screens, in pixels."""


def processor_config(architecture: Architecture, processor: ImageProcessor) -> dict[str, Any]:
    """The processing steps of onnxruntime-extensions, with the checkpoint's image settings, as JSON data.

    Raises:
        CheckpointError: the image settings do not fit the vision encoder.
    """
    merge, patch = processor.merge_size, processor.patch_size
    assert architecture.vision is not None, "a package with a vision graph has a vision encoder"
    check_processor(architecture.vision, processor)
    resize = {
        "smart_resize": 1,
        "min_pixels": processor.min_pixels,
        "max_pixels": processor.max_pixels,
        "patch_size": patch,
        "merge_size": merge,
        # required, but without effect together with smart_resize
        "width": 16 * patch * merge,
        "height": 16 * patch * merge,
    }
    normalize = {
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        # the model family's flag selects the layout of the patches
        architecture.normalize_flag: 1,
    }
    patches = {"patch_size": patch, "temporal_patch_size": processor.temporal_patch_size, "merge_size": merge}
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("decode_image", "DecodeImage", {"color_space": "RGB"}),
        ("convert_to_rgb", "ConvertRGB", {}),
        ("resize", "Resize", resize),
        ("rescale", "Rescale", {"rescale_factor": processor.rescale_factor}),
        ("normalize", "Normalize", normalize),
        ("patch_image", "PatchImage", patches),
    ]
    transforms = [
        {"operation": {"name": name, "domain": "com.microsoft.extensions", "type": kind, **({"attrs": a} if a else {})}}
        for name, kind, a in steps
    ]
    return {"processor": {"name": f"{architecture.genai_type}_image_processor", "transforms": transforms}}


def check_processor(facts: VisionFacts, processor: ImageProcessor) -> None:
    """Checks that the image settings produce patches of the sizes that the vision encoder takes.

    Raises:
        CheckpointError: a size differs.
    """
    for name, found, wanted in (
        ("patch_size", processor.patch_size, facts.patch_size),
        ("temporal_patch_size", processor.temporal_patch_size, facts.temporal_patch_size),
        ("merge_size", processor.merge_size, facts.spatial_merge_size),
    ):
        if found != wanted:
            raise CheckpointError(
                f"The checkpoint's image settings have {name} {found}, but its config.json has {wanted}.",
                "Take preprocessor_config.json and config.json from the same checkpoint.",
            )


class GridDifference(NamedTuple):
    """An image size for which the runtime's processor and transformers take different patch grids.

    Attributes:
        width: width of the image in pixels.
        height: height of the image in pixels.
        runtime: patches along height and width in the runtime's processor.
        transformers: patches along height and width in transformers.
        factor: edge length in pixels of a block; resized edges are whole numbers of blocks.
    """

    width: int
    height: int
    runtime: tuple[int, int]
    transformers: tuple[int, int]
    factor: int

    @property
    def edges(self) -> list[int]:
        """The shortest and some common edge lengths, in pixels, that transformers and the runtime round differently."""
        first = [2 * blocks * self.factor + self.factor // 2 for blocks in range(1, 5)]
        return sorted({*first, *(edge for edge in _EDGES if edge % (2 * self.factor) == self.factor // 2)})


def grid_difference(processor: ImageProcessor) -> GridDifference | None:
    """The first image size (common ones first) that the two processors round differently, or None."""
    factor, patch = processor.factor, processor.patch_size
    limits = (factor, processor.min_pixels, processor.max_pixels)
    # an even number of blocks and a half: Python rounds it down (to even), the runtime up
    made = [(2 * blocks * factor + factor // 2,) * 2 for blocks in range(1, 33)]
    for width, height in (*_SIZES, *made):
        theirs = smart_resize(height, width, *limits)
        runtime = smart_resize(height, width, *limits, rounded=lambda value: math.floor(value + 0.5))
        if runtime != theirs:
            grids = [(size[0] // patch, size[1] // patch) for size in (runtime, theirs)]
            return GridDifference(width, height, grids[0], grids[1], factor)
    return None
