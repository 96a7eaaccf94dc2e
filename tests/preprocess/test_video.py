"""The video processor compared with transformers: sampling, sizes, patches, timestamps and pixels.

transformers' video processor resizes and normalizes with torchvision, which no other test needs. So these two steps are
replaced by the calls of torch that torchvision makes for uint8 tensors (`live_pixels`). The golden values of
`golden_video.json` were recorded by `record_video.py` with transformers and torchvision unchanged.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlpack.errors import CheckpointError, InputError, OptionError
from vlpack.preprocess import VideoOptions, VideoProcessor
from vlpack.preprocess.torch_resize import resize_frame
from vlpack.preprocess.video import video_size

from .video_files import CLIPS, clip, decode, pictures, write_video

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor  # noqa: E402
from transformers.models.qwen3_vl.video_processing_qwen3_vl import (  # noqa: E402
    Qwen3VLVideoProcessor,
    smart_resize,
)
from transformers.video_utils import VideoMetadata  # noqa: E402

DIGITS = Path(__file__).parents[2] / "examples" / "digits-qwen3-vl"
GOLDEN = json.loads((Path(__file__).parent / "golden_video.json").read_text(encoding="utf-8"))
REAL = {"shortest_edge": 4096, "longest_edge": 25165824}  # the limits of the published Qwen3-VL checkpoints


def both(tmp_path: Path, **changes: Any) -> tuple[VideoProcessor, Qwen3VLVideoProcessor]:
    """vlpack's and transformers' video processor, made from the same settings file."""
    config = json.loads((DIGITS / "video_preprocessor_config.json").read_text(encoding="utf-8")) | changes
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    return VideoProcessor.from_folder(tmp_path), Qwen3VLVideoProcessor.from_pretrained(tmp_path)


def live_pixels(live: Qwen3VLVideoProcessor, frames: list[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """transformers' pixel_values_videos for these frames, and its row of video_grid_thw."""
    video: Any = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
    factor, depth = live.patch_size * live.merge_size, live.temporal_patch_size
    height, width = video.shape[2:]
    size = smart_resize(
        len(frames), height, width, depth, factor, live.size["shortest_edge"], live.size["longest_edge"]
    )
    resized = torch.nn.functional.interpolate(video, size=size, mode="bicubic", antialias=True)
    mean = torch.tensor(live.image_mean) * (1.0 / live.rescale_factor)
    std = torch.tensor(live.image_std) * (1.0 / live.rescale_factor)
    normal = (resized.to(torch.float32) - mean[:, None, None]) / std[:, None, None]
    patches, *grid = live.patchify(normal[None], live.patch_size, live.merge_size, depth)
    return patches[0].numpy(), grid


@pytest.mark.parametrize("options", [{}, {"fps": 1.0}, {"fps": 3.7, "max_frames": 9}, {"num_frames": 5}])
@pytest.mark.parametrize("size", [None, REAL])
@pytest.mark.parametrize("name", CLIPS)
def test_clips(name: str, size: Any, options: dict[str, Any], tmp_path: Path) -> None:
    mine, live = both(tmp_path, **({"size": size} if size else {}))
    got = mine(clip(name), VideoOptions(**options))
    frames = decode(clip(name))
    metadata = VideoMetadata(total_num_frames=len(frames), fps=30000 / 1001 if name.startswith("car") else 25.0)
    live.max_frames = options.get("max_frames", live.max_frames)
    indices = live.sample_frames(metadata, num_frames=options.get("num_frames"), fps=options.get("fps"))
    assert list(got.frames_indices) == indices.tolist()
    pixels, grid = live_pixels(live, [frames[index] for index in indices])
    assert list(got.grid_thw) == grid
    assert got.pixel_values.dtype == np.float32
    assert np.array_equal(got.pixel_values, pixels)
    # transformers' method, which does not use self
    processor: Any = Qwen3VLProcessor
    assert list(got.timestamps) == processor._calculate_timestamps(None, indices, metadata.fps, 2)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_values(case: dict[str, Any], tmp_path: Path) -> None:
    mine, _ = both(tmp_path, **case["settings"])
    got = mine(clip(case["clip"]), VideoOptions(**case["options"]))
    assert list(got.frames_indices) == case["frames_indices"]
    assert list(got.grid_thw) == case["video_grid_thw"]
    assert [f"{stamp:.1f}" for stamp in got.timestamps] == case["timestamps"]
    assert got.pixel_values[:: len(got.pixel_values) // 3, 77].tolist() == case["some_pixels"]
    assert hashlib.sha256(got.pixel_values.tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_frames(count: int, tmp_path: Path) -> None:
    mine, live = both(tmp_path)
    frames = pictures(count)
    got = mine(frames, VideoOptions(fps=2))
    pixels, grid = live_pixels(live, frames)  # the last of an odd number of frames is repeated
    assert list(got.grid_thw) == grid == [(count + 1) // 2, *grid[1:]]
    assert np.array_equal(got.pixel_values, pixels)
    assert got.frames_indices == tuple(range(count))
    assert got.timestamps[0] == 0.25


def test_a_single_frame_is_refused_as_in_transformers(tmp_path: Path) -> None:
    mine, live = both(tmp_path)
    with pytest.raises(ValueError, match="must be larger than temporal_factor"):
        live_pixels(live, pictures(1))
    with pytest.raises(InputError, match="1 frame is too short; the model takes at least 2"):
        mine(pictures(1), VideoOptions(fps=2))


def test_the_last_frame_of_an_odd_number_is_repeated(tmp_path: Path) -> None:
    mine, _ = both(tmp_path)
    frames = pictures(5)
    odd, even = mine(frames, VideoOptions(fps=1)), mine([*frames, frames[-1]], VideoOptions(fps=1))
    assert np.array_equal(odd.pixel_values, even.pixel_values)
    assert odd.timestamps == (0.5, 2.5, 4.0)


def test_timestamps_of_a_variable_rate(tmp_path: Path) -> None:
    mine, _ = both(tmp_path)
    path = write_video(tmp_path / "a.mp4", pictures(8), [0, 40, 80, 120, 5000, 5040, 9000, 9500])
    got = mine(path, VideoOptions(num_frames=8))
    assert got.timestamps == pytest.approx((0.02, 0.1, 5.02, 9.25), abs=2e-3)


sizes = st.integers(1, 3000)


@settings(max_examples=400, deadline=None)
@given(st.integers(2, 900), sizes, sizes, st.sampled_from([16, 28, 32]), st.floats(0.001, 1.1), st.floats(0.5, 2))
def test_sizes(frames: int, height: int, width: int, factor: int, low: float, high: float) -> None:
    volume = frames * height * width  # limits near the volume, where rounding of every factor matters
    arguments = (frames, height, width, 2, factor, int(volume * low) + 1, int(volume * high) + 1)
    try:
        wanted = smart_resize(*arguments)
    except ValueError:
        with pytest.raises(InputError, match="aspect ratio"):
            video_size(*arguments)
    else:
        assert video_size(*arguments) == wanted


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 100_000),
    st.floats(0.5, 240),
    st.one_of(st.tuples(st.floats(0.01, 60), st.none()), st.tuples(st.none(), st.integers(1, 900))),
    st.integers(1, 20),
    st.integers(20, 800),
)
def test_sampling(total: int, rate: float, chosen: Any, least: int, most: int) -> None:
    fps, count = chosen
    live = Qwen3VLVideoProcessor(min_frames=least, max_frames=most)
    wanted = live.sample_frames(VideoMetadata(total_num_frames=total, fps=rate), num_frames=count, fps=fps)
    mine = VideoProcessor(fps=fps, num_frames=count, min_frames=least, max_frames=most)
    assert mine.sample(total, rate) == wanted.tolist()


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resizing_equals_torch(mode: str) -> None:
    random = np.random.default_rng(3)
    for height, width, to in (
        (144, 176, (160, 192)),
        (720, 1280, (352, 640)),
        (33, 47, (64, 96)),
        (1, 5, (32, 32)),
        (64, 64, (64, 96)),
        (64, 64, (64, 64)),
        (900, 3, (32, 96)),
        (9, 2500, (32, 1024)),
    ):
        frame = random.integers(0, 256, (height, width, 3), np.uint8)
        frame[: height // 2] = np.where(
            frame[: height // 2] > 127, 255, 0
        )  # sharp edges, where resizing over- and undershoots
        tensor = torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous()
        wanted = torch.nn.functional.interpolate(tensor, size=to, mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(resize_frame(frame, *to, {"bicubic": 3, "bilinear": 2}[mode]), wanted)


@pytest.mark.parametrize(
    "changes",
    [{"do_normalize": False}, {"do_rescale": False}, {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}],
)
def test_rounding_of_grey_levels(changes: dict[str, Any], tmp_path: Path) -> None:
    mine, live = both(tmp_path, **changes)
    level = torch.arange(256, dtype=torch.uint8)
    mean, std = torch.tensor(live.image_mean)[:, None], torch.tensor(live.image_std)[:, None]
    if not live.do_normalize:
        wanted = (level * live.rescale_factor).expand(3, 256)
    elif not live.do_rescale:
        wanted = (level.float() - mean) / std
    else:
        wanted = (level.float() - mean * (1 / live.rescale_factor)) / (std * (1 / live.rescale_factor))
    assert np.array_equal(mine._level_values(), wanted.numpy())


def test_cap_pixels_per_frame(tmp_path: Path) -> None:
    mine, live = both(tmp_path, cap_pixels_per_frame=True, max_video_tokens=20, size=REAL)
    got = mine(clip("bikes.mp4"))
    frames, patches = len(got.frames_indices), live.get_num_of_video_patches(len(got.frames_indices), 272, 640)
    assert len(got.pixel_values) == patches
    assert patches < frames / 2 * 20 * 4


def test_files_that_settings_are_read_from(tmp_path: Path) -> None:
    def write(name: str, value: Any) -> None:
        (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")

    with pytest.raises(CheckpointError, match="no video settings"):
        VideoProcessor.from_folder(tmp_path)
    write("preprocessor_config.json", {"patch_size": 8})
    assert VideoProcessor.from_folder(tmp_path).patch_size == 8
    write("video_preprocessor_config.json", {"patch_size": 12, "fps": None, "cap_pixels_per_frame": None})
    assert VideoProcessor.from_folder(tmp_path) == VideoProcessor(patch_size=12, fps=None)
    write("processor_config.json", {"video_processor": {"patch_size": 14, "num_frames": 7}})
    assert VideoProcessor.from_folder(tmp_path) == VideoProcessor(patch_size=14, num_frames=7, fps=None)
    for key, value in (
        ("patch_size", 0),
        ("size", {"shortest_edge": 4}),
        ("size", 5),
        ("fps", "two"),
        ("resample", 1),
        ("image_std", [0, 1, 1]),
        ("do_resize", "yes"),
        ("max_frames", -1),
    ):
        write("processor_config.json", {"video_processor": {key: value}})
        with pytest.raises(CheckpointError, match=key):
            VideoProcessor.from_folder(tmp_path)


def test_options(tmp_path: Path) -> None:
    mine, _ = both(tmp_path)
    path = clip("bikes.mp4")  # ten seconds
    assert len(mine(path).frames_indices) == 20
    assert len(mine(path, VideoOptions(fps=1)).frames_indices) == 10
    assert len(mine(path, VideoOptions(fps=0.1)).frames_indices) == 4
    assert len(mine(path, VideoOptions(fps=0.1, min_frames=6)).frames_indices) == 6
    assert len(mine(path, VideoOptions(max_frames=7)).frames_indices) == 7
    assert mine(path, VideoOptions(num_frames=3)).frames_indices == (0, 124, 249)
    small = mine(path, VideoOptions(total_pixels=100_000))
    assert small.grid_thw[0] == 10
    assert len(small.pixel_values) * 256 * 2 <= 100_000
    for wrong in ({"fps": 0}, {"fps": float("nan")}, {"num_frames": 0}, {"num_frames": 2.5}, {"max_frames": 10**6}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            VideoOptions(**wrong)
    with pytest.raises(OptionError, match="exclude"):
        VideoOptions(fps=1, num_frames=2)
    with pytest.raises(OptionError, match="model's minimum is 1024"):
        mine(path, VideoOptions(total_pixels=10))
    assert len(mine(path, VideoOptions(max_frames=2)).frames_indices) == 2  # fewer than the model's own minimum
    with pytest.raises(OptionError, match="min_frames is 9"):
        VideoOptions(min_frames=9, max_frames=5)
    with pytest.raises(OptionError, match="no effect on the 4 frames"):
        mine(pictures(4), VideoOptions(fps=2, max_frames=2))


def test_videos_that_are_too_large(tmp_path: Path) -> None:
    mine, _ = both(tmp_path, size={"shortest_edge": 2**28, "longest_edge": 2**40}, do_resize=True)
    with pytest.raises(InputError, match="pixels together"):
        mine(pictures(3, 100, 90), VideoOptions(fps=1))
    mine, _ = both(tmp_path, do_resize=False)
    with pytest.raises(InputError, match="not multiples of 32"):
        mine(pictures(2), VideoOptions(fps=1))
    with pytest.raises(InputError, match="aspect ratio"):
        VideoProcessor()(pictures(2, 32, 9000), VideoOptions(fps=1))
