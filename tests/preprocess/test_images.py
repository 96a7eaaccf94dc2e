"""The image processor compared with transformers' PIL image processor: equal grids and bit-identical pixel values."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlpack.errors import CheckpointError, InputError, OptionError
from vlpack.preprocess import ImageProcessor, ProcessedImages, load_image, smart_resize

from .image_files import noise, write_all

pytest.importorskip("transformers")

from transformers.image_utils import load_image as reference_load_image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference_module

QWEN3 = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 65536, "longest_edge": 1048576},
}
CLIP = {
    "size": {"shortest_edge": 3136, "longest_edge": 200704}
}  # patch size, mean and std are the defaults, 14 and CLIP's
SIZES = [
    (1280, 720), (400, 400), (1920, 1080), (64, 64), (32, 32), (5, 7), (1, 1), (1, 150), (150, 1), (2, 399), (333, 217),
    (16, 3000), (48, 48), (80, 80), (112, 112), (3000, 2000), (999, 1001), (47, 49), (1023, 1025), (720, 1280),
]  # fmt: skip


NAMES = [
    "q10.jpg", "q50.jpg", "q75.jpg", "q95.jpg", "q100.jpg", "progressive.jpg", "gray.jpg", "cmyk.jpg",
    "exif1.jpg", "exif2.jpg", "exif3.jpg", "exif4.jpg", "exif5.jpg", "exif6.jpg", "exif7.jpg", "exif8.jpg",
    "exif6.png", "rgb.png", "rgba.png", "l.png", "la.png", "1bit.png", "palette.png", "palette-transparent.png",
    "palette-alpha.png", "rgb-transparent.png", "16bit.png", "16bit.tiff", "cmyk.tiff", "frames.gif",
    "transparent.gif", "lossy.webp", "alpha.webp", "frames.webp", "frames.png", "rgb.bmp", "rgb.ppm",
]  # fmt: skip


def write_config(folder: Path, config: dict, name: str = "preprocessor_config.json") -> Path:
    (folder / name).write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("images"))


def both(config: dict, ours: list[Image.Image], theirs: list[Image.Image]) -> tuple[ProcessedImages, Any]:
    with tempfile.TemporaryDirectory() as folder:
        processor = ImageProcessor.from_folder(write_config(Path(folder), config))
        reference = reference_module.Qwen2VLImageProcessorPil.from_pretrained(folder)
    return processor(ours), reference(images=theirs, return_tensors="np")


def assert_equal(result: ProcessedImages, expected: dict) -> None:
    np.testing.assert_array_equal(result.image_grid_thw, expected["image_grid_thw"])
    assert result.image_grid_thw.dtype == np.int64
    assert result.pixel_values.dtype == np.float32
    assert result.pixel_values.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(result.pixel_values, expected["pixel_values"])


@pytest.mark.parametrize("config", [QWEN3, CLIP], ids=["qwen3", "clip"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_sizes(config: dict, size: tuple[int, int]) -> None:
    image = noise(*size)
    result, expected = both(config, [image], [image])
    assert_equal(result, expected)
    assert result.num_image_tokens.tolist() == [int(expected["image_grid_thw"].prod()) // 4]


def test_known_grids_round_halves_to_even() -> None:
    processor = ImageProcessor(patch_size=16, min_pixels=65536, max_pixels=16777216)
    result = processor([noise(1280, 720), noise(400, 400)])
    assert result.image_grid_thw.tolist() == [[1, 44, 80], [1, 24, 24]]


@pytest.mark.parametrize("name", NAMES)
def test_formats(files: dict[str, Path], name: str) -> None:
    ours, theirs = load_image(files[name]), reference_load_image(str(files[name]))
    assert ours.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert_equal(*both(CLIP, [ours], [theirs]))


@pytest.mark.parametrize("name", NAMES)
def test_pil_images_of_any_mode_composite_onto_white(files: dict[str, Path], name: str) -> None:
    with Image.open(files[name]) as ours, Image.open(files[name]) as theirs:
        assert_equal(*both(CLIP, [ours], [theirs]))


def test_every_file_is_tested(files: dict[str, Path]) -> None:
    assert set(files) == set(NAMES)


def test_alpha_is_dropped_in_files_and_composited_in_pil_images(files: dict[str, Path]) -> None:
    processor = ImageProcessor()
    with Image.open(files["rgba.png"]) as image:
        assert (
            np.abs(processor([image]).pixel_values - processor([load_image(files["rgba.png"])]).pixel_values).max() > 1
        )


def test_several_images_of_several_sizes() -> None:
    images = [noise(100, 90), noise(33, 300), noise(640, 480), noise(100, 90, seed=3)]
    result, expected = both(QWEN3, images, images)
    assert_equal(result, expected)
    assert len(result.num_image_tokens) == 4
    assert result.num_image_tokens.sum() * 4 == len(result.pixel_values)


def test_no_images_give_empty_arrays() -> None:
    result = ImageProcessor()([])
    assert result.pixel_values.shape == (0, 3 * 2 * 14 * 14)
    assert result.image_grid_thw.shape == (0, 3)
    assert result.num_image_tokens.shape == (0,)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_pixels": 784, "max_pixels": 50176},
        {"min_pixels": 784, "max_pixels": 50176, "size": {"shortest_edge": 1, "longest_edge": 2}},
        {"size": {"shortest_edge": 100_000, "longest_edge": 120_000}},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False},
        {"rescale_factor": 0.00784313, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.7]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"merge_size": 1, "temporal_patch_size": 1},
        {"merge_size": 3, "patch_size": 8, "temporal_patch_size": 4, "do_resize": True},
        {"resample": 2},
    ],
    ids=str,
)
def test_settings(changes: dict) -> None:
    image = noise(336, 224)
    assert_equal(*both({**CLIP, **changes}, [image], [image]))


def test_null_stands_for_the_default(tmp_path: Path) -> None:
    folder = write_config(
        tmp_path, {**CLIP, "image_mean": None, "resample": None, "do_rescale": None, "min_pixels": None}
    )
    assert ImageProcessor.from_folder(folder) == ImageProcessor(max_pixels=200704)


def test_v5_processor_config(tmp_path: Path) -> None:
    write_config(tmp_path, {"image_processor": QWEN3, "processor_class": "Qwen3VLProcessor"}, "processor_config.json")
    assert ImageProcessor.from_folder(tmp_path).max_pixels == 1048576
    write_config(tmp_path, CLIP)  # the nested settings win, as in transformers
    reference = reference_module.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert ImageProcessor.from_folder(tmp_path).patch_size == reference.patch_size == 16


def test_runtime_processor_config_is_not_mistaken_for_settings(tmp_path: Path) -> None:
    write_config(tmp_path, {"processor": {"name": "qwen", "transforms": []}}, "processor_config.json")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_folder(tmp_path)
    write_config(tmp_path, QWEN3)
    assert ImageProcessor.from_folder(tmp_path).patch_size == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 0},
        {"patch_size": "16"},
        {"patch_size": 1e9},
        {"patch_size": 10**6},
        {"merge_size": True},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_mean": [0.5, float("nan"), 0.5]},
        {"image_mean": "clip"},
        {"rescale_factor": 0},
        {"size": {"shortest_edge": 100, "longest_edge": 10}},
        {"size": {"height": 100, "width": 10}},
        {"size": 224},
        {"min_pixels": 10**12, "max_pixels": 10**13},
        {"do_resize": "yes"},
        {"resample": 77},
        {"temporal_patch_size": 10**9},
    ],
    ids=str,
)
def test_bad_settings_name_the_file(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_folder(write_config(tmp_path, {**QWEN3, **changes}))


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", '"x"', "[" * 100_000])
def test_damaged_settings_name_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_folder(tmp_path)


def test_pixel_limits_can_be_overridden() -> None:
    processor = ImageProcessor().with_pixel_limits(max_pixels=28 * 28 * 4)
    assert processor.min_pixels == 56 * 56
    assert processor([noise(500, 500)]).num_image_tokens.tolist() == [4]
    with pytest.raises(OptionError, match="min_pixels"):
        ImageProcessor().with_pixel_limits(max_pixels=100)


def test_unusable_images() -> None:
    with pytest.raises(InputError, match="1x201"):
        ImageProcessor()([noise(1, 201)])
    with pytest.raises(InputError, match="empty"):
        ImageProcessor()([Image.new("RGB", (0, 5))])
    with pytest.raises(InputError, match="multiple of 28"):
        ImageProcessor(do_resize=False)([noise(57, 56)])
    with pytest.raises(InputError, match="mode L"):
        ImageProcessor(do_convert_rgb=False)([noise(56, 56, "L")])


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    factor=st.sampled_from([14, 28, 32, 48]),
    min_pixels=st.integers(1, 10**6),
    spread=st.integers(0, 10**7),
)
def test_smart_resize(height: int, width: int, factor: int, min_pixels: int, spread: int) -> None:
    arguments = (height, width, factor, min_pixels, min_pixels + spread)
    try:
        expected = reference_module.smart_resize(*arguments)
    except ValueError:
        with pytest.raises(InputError, match="aspect ratio"):
            smart_resize(*arguments)
    else:
        assert smart_resize(*arguments) == expected
        assert all(edge % factor == 0 for edge in expected)
