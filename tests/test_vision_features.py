"""The error of an int8 package's image features against fp32, on the trained checkpoint and its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tiny import EXAMPLE, IMAGE
from vlpack.builder import build
from vlpack.ort.graph_edits import call
from vlpack.ort.session import cpu_session
from vlpack.preprocess import PromptBuilder
from vlpack.shipped import examples_folder

MEDIAN, LARGEST = 0.004, 0.01
"""Largest relative errors of all features of an image, including those of DeepStack."""


def features(folder: Path, prompts: PromptBuilder) -> list[np.ndarray]:
    session = cpu_session(folder / "vision.onnx", 1)
    found = []
    for path in sorted((examples_folder() / "digits-images").glob("*.png")):
        content = [{"type": "image"}, {"type": "text", "text": "Read the digits."}]
        prompt = prompts([{"role": "user", "content": content}], [Image.open(path).convert("RGB")])
        ((pixels, grid),) = prompt.images()
        found.append(call(session, {"pixel_values": pixels, "image_grid_thw": grid})["image_features"])
    return found


def test_features_in_int8(tmp_path: Path) -> None:
    build(EXAMPLE, tmp_path / "fp32", precision="fp32")
    build(EXAMPLE, tmp_path / "int8", precision="int8")
    prompts = PromptBuilder.from_folder(tmp_path / "fp32", image_token_id=IMAGE)
    exact, rounded = (features(tmp_path / name, prompts) for name in ("fp32", "int8"))
    assert len(exact) == 24
    errors = [np.linalg.norm(y - x) / np.linalg.norm(x) for x, y in zip(exact, rounded, strict=True)]
    print(f"median {np.median(errors):.4f}, largest {max(errors):.4f}")
    assert 0 < np.median(errors) <= MEDIAN
    assert max(errors) <= LARGEST
