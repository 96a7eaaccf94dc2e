"""Measures the effect of wrong image_mean and image_std on vision features and answers of the shipped checkpoint.

The features are those of the 24 shipped images in fp32. The error is the relative L2 distance from those with the
correct settings for each image: its median and maximum, for the merged features and for the worst DeepStack level.

Usage: python benchmarks/normalization.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

import vlpack
from vlpack.demo import QUESTIONS
from vlpack.shipped import examples_folder

RIGHT = "0.5 and 0.5 (Qwen3-VL's)"
SETTINGS = {
    RIGHT: ([0.5] * 3, [0.5] * 3),
    "CLIP's (Qwen2-VL's and Qwen2.5-VL's)": (
        [0.48145466, 0.4578275, 0.40821073],
        [0.26862954, 0.26130258, 0.27577711],
    ),
    "ImageNet's": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "none: 0 and 1": ([0.0] * 3, [1.0] * 3),
}


def measure(folder: Path, name: str) -> tuple[list[np.ndarray], list[str], int]:
    """Features of each image, [levels, tokens · H]; all answers; and the number of correct answers."""
    source = shutil.copytree(examples_folder() / "digits-qwen3-vl", folder / "checkpoint")
    path = source / "preprocessor_config.json"
    mean, std = SETTINGS[name]
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": mean, "image_std": std}))
    model = vlpack.load(vlpack.build(source, folder / "package", precision="fp32").folder)
    vision = ort.InferenceSession(folder / "package" / "vision.onnx", providers=["CPUExecutionProvider"])
    hidden_size = model.config["model"]["decoder"]["hidden_size"]
    images = examples_folder() / "digits-images"
    features, answers, right = [], [], 0
    for image, truth in json.loads((images / "answers.json").read_text()).items():
        arrays = model.prompt("", [images / image]).named_arrays()
        (found,) = vision.run(None, {key: arrays[key] for key in ("pixel_values", "image_grid_thw")})
        features.append(found.reshape(len(found), -1, hidden_size).swapaxes(0, 1).reshape(-1, len(found) * hidden_size))
        for key, question in QUESTIONS.items():
            sampling = vlpack.Sampling(temperature=0)
            answers.append(model.generate(question, [images / image], max_tokens=16, sampling=sampling).text)
            right += answers[-1].split() == truth[key].split()
    return features, answers, right


def main() -> None:
    expected: list[np.ndarray] = []
    for name in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            features, answers, right = measure(Path(folder), name)
        expected = expected or features
        errors = np.array(
            [
                np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
                for found, wanted in zip(features, expected, strict=True)
            ]
        )  # [images, 1 + levels]
        level = 1 + int(np.median(errors[:, 1:], axis=0).argmax())
        print(
            f"{name}: merged {np.median(errors[:, 0]):.2f} / {errors[:, 0].max():.2f}, "
            f"level {level} {np.median(errors[:, level]):.2f} / {errors[:, level].max():.2f}, "
            f"{right} of {len(answers)} right"
        )


if __name__ == "__main__":
    main()
