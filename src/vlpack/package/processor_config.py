"""``processor_config.json``: the runtime's own image processor, for callers in C#, C++ and Java.

It is near transformers', not equal to it (docs/runtime-contract.md of the project, README.md of every package say
where); Python callers get transformers' pixels from `vlpack.preprocess`.
"""

from __future__ import annotations

from typing import Any

from vlpack.architectures.base import Architecture, VisionFacts
from vlpack.errors import CheckpointError
from vlpack.preprocess import ImageProcessor


def processor_config(architecture: Architecture, processor: ImageProcessor) -> dict[str, Any]:
    """The steps of onnxruntime-extensions, with the checkpoint's numbers.

    Raises:
        CheckpointError: the image settings are not for this vision encoder.
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
        # required by the step, and without effect beside smart_resize
        "width": 16 * patch * merge,
        "height": 16 * patch * merge,
    }
    normalize = {
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        # without the family's flag the layout of the patches is another one
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
    """The image settings make the patches that the vision encoder takes.

    Raises:
        CheckpointError: they do not.
    """
    for name, found, wanted in (
        ("patch_size", processor.patch_size, facts.patch_size),
        ("temporal_patch_size", processor.temporal_patch_size, facts.temporal_patch_size),
        ("merge_size", processor.merge_size, facts.spatial_merge_size),
    ):
        if found != wanted:
            raise CheckpointError(
                f"The checkpoint's image settings have {name} {found}, its config.json has {wanted}.",
                "Take preprocessor_config.json and config.json from the same checkpoint.",
            )
