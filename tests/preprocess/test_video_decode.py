"""Decoding of videos: the right frames with the right times, no more than needed, and errors for damaged files."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlpack.errors import InputError
from vlpack.preprocess import open_clip
from vlpack.preprocess import video_decode as module
from vlpack.preprocess.video_decode import FileClip

from .video_files import CLIPS, clip, decode, pictures, turn, write_video


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the times of all frames that are decoded during the test."""
    times: list[int] = []
    decode_from = FileClip._decode

    def listening(self: FileClip, key: int | None) -> Iterator[Any]:
        for frame in decode_from(self, key):
            times.append(frame.pts)
            yield frame

    monkeypatch.setattr(FileClip, "_decode", listening)
    return times


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_decoding_everything(name: str) -> None:
    every = decode(clip(name))
    last = len(every) - 1
    for indices in ([0], [last], [5, 5, 6, 59, 60, 99, last], list(range(0, last, 7))):
        with open_clip(clip(name)) as video:
            assert len(video.times) == len(every)
            assert (video.height, video.width) == every[0].shape[:2]
            got = list(video.frames(indices))
        assert len(got) == len(indices)
        assert all(np.array_equal(frame, every[index]) for frame, index in zip(got, indices, strict=True))


def test_bytes_and_paths_are_the_same() -> None:
    path = clip("carphone_pristine.mp4")
    for source in (path, str(path), path.read_bytes()):
        with open_clip(source) as video:
            assert np.array_equal(next(video.frames([7])), decode(path)[7])


def test_times_of_a_constant_rate_follow_from_the_frame_numbers(tmp_path: Path) -> None:
    with open_clip(clip("carphone_pristine.mp4")) as video:
        assert video.fps == 30000 / 1001
        assert list(video.times) == [number / (30000 / 1001) for number in range(120)]
    # a container with a resolution of milliseconds
    path = write_video(tmp_path / "a.mkv", pictures(20), [round(1000 * n / 30) for n in range(20)], fps=30)
    with open_clip(path) as video:
        assert list(video.times) == [number / video.fps for number in range(20)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_times_of_a_variable_rate_are_the_container_s(suffix: str, tmp_path: Path) -> None:
    stamps = [0, 40, 80, 120, 1000, 1040, 5000, 5500, 6000, 6250]
    frames = pictures(len(stamps))
    path = write_video(tmp_path / f"a.{suffix}", frames, stamps)
    with open_clip(path) as video:
        assert list(video.times) == pytest.approx([stamp / 1000 for stamp in stamps], abs=2e-3)
        for frame, made in zip(video.frames(range(len(stamps))), frames, strict=True):
            assert abs(frame.mean() - made.mean()) < 4  # neighbouring frames differ by about 16


def test_times_begin_with_the_first_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", pictures(5), [7000 + 100 * n for n in range(5)])
    with open_clip(path) as video:
        assert list(video.times) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_frames_stored_out_of_order(tmp_path: Path) -> None:
    frames = pictures(40)
    path = write_video(tmp_path / "a.mp4", frames, options={"bf": "3", "x264-params": "open-gop=1:b-pyramid=2"})
    every = decode(path)
    with open_clip(path) as video:
        indices = [3, 11, 12, 13, 25, 39]
        for index, frame in zip(indices, video.frames(indices), strict=True):
            assert np.array_equal(frame, every[index])


@pytest.mark.parametrize("codec", ["mpeg4", "libvpx", "libvpx-vp9", "mjpeg"])
@pytest.mark.parametrize("suffix", ["avi", "mkv", "ts"])
def test_other_containers_and_codecs(codec: str, suffix: str, tmp_path: Path) -> None:
    if suffix == "ts" and codec != "mpeg4":
        pytest.skip("does not go into a transport stream")
    path = write_video(tmp_path / f"a.{suffix}", pictures(30), codec=codec, base=Fraction(1, 10), fps=10)
    every = decode(path)
    with open_clip(path) as video:
        assert len(video.times) == len(every) >= 29  # the last frame of a transport stream may be missing
        assert list(video.times)[:3] == pytest.approx([0, 0.1, 0.2])
        for index, frame in zip([0, 8, 13, 28], video.frames([0, 8, 13, 28]), strict=True):
            assert np.array_equal(frame, every[index])


def test_only_needed_frames_of_an_hour_are_decoded(tmp_path: Path, decoded: list[int]) -> None:
    frames = pictures(60, 32, 32)
    path = write_video(tmp_path / "a.mp4", [frames[n % 60] for n in range(7200)], fps=2, gop=20)
    with open_clip(path) as video:
        assert video.times[-1] == pytest.approx(3599.5)
        got = list(video.frames([0, 1800, 3601, 5399, 7199]))
    assert len(decoded) < 5 * (20 + 30)  # the decoder's threads work a few frames ahead
    every = decode(path)
    for frame, number in zip(got, [0, 1800, 3601, 5399, 7199], strict=True):
        assert np.array_equal(frame, every[number])


def test_frames_are_held_one_at_a_time(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    frames = pictures(8, 720, 1280)
    path = write_video(tmp_path / "a.mp4", frames * 25, fps=10)

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    with open_clip(path) as video:
        for _ in video.frames(range(0, 20)):
            pass
        before = peak()
        assert sum(1 for _ in video.frames(range(20, 200))) == 180
        assert peak() - before < 40e6  # all frames together would take 500 MB


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_are_turned_upright(degrees: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", pictures(12))
    flat = decode(path)
    turn(path, degrees)
    with open_clip(path) as video:
        assert (video.height, video.width) == ((48, 64) if degrees == 180 else (64, 48))
        turned = list(video.frames(range(12)))
    for frame, lying in zip(turned, flat, strict=True):
        assert np.array_equal(frame, np.rot90(lying, -degrees // 90))


@pytest.mark.parametrize("off", [-25, 10])
def test_seeking_that_reaches_a_wrong_frame(off: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", pictures(60), gop=20)
    every = decode(path)
    with open_clip(path) as video:
        assert isinstance(video, FileClip)
        container, went = video._container, []

        class Elsewhere:
            def seek(self, stamp: int, **options: Any) -> None:
                went.append(stamp)
                container.seek(max(stamp + 100 * off, 0), **options | {"backward": off < 0})

            demux = staticmethod(container.demux)

        monkeypatch.setattr(video, "_container", Elsewhere())
        for index, frame in zip([25, 31, 59], video.frames([25, 31, 59]), strict=True):
            assert np.array_equal(frame, every[index])
    assert went


@pytest.mark.parametrize("suffix", ["ts", "mpg", "h264"])
def test_containers_without_an_index(suffix: str, tmp_path: Path) -> None:
    codec = {"ts": "libx264", "mpg": "mpeg2video", "h264": "libx264"}[suffix]
    frames = [frame for frame in pictures(25, 96, 128) for _ in range(4)]
    path = write_video(tmp_path / f"a.{suffix}", frames, codec=codec, fps=25, base=Fraction(1, 25), options={"bf": "2"})
    every = decode(path)
    with open_clip(path) as video:
        indices = [0, 1, 30, 31, 50, 77, 98]
        assert len(video.times) == len(every)
        for index, frame in zip(indices, video.frames(indices), strict=True):
            assert np.array_equal(frame, every[index]), index


@pytest.mark.parametrize("kind", ["paths", "folder", "arrays", "array", "images"])
def test_folders_of_pictures(kind: str, tmp_path: Path) -> None:
    frames = pictures(12)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    source: Any = {
        "paths": [tmp_path / f"frame{number}.png" for number in range(12)],
        "folder": tmp_path,  # frame10 must come after frame9
        "arrays": frames,
        "array": np.stack(frames),
        "images": [Image.fromarray(frame) for frame in frames],
    }[kind]
    with open_clip(source, fps=4) as video:
        assert list(video.times) == [number / 4 for number in range(12)]
        assert all(np.array_equal(a, b) for a, b in zip(video.frames(range(12)), frames, strict=True))


def test_sources_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello " * 100)
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:5,\n{clip('bikes.mp4')}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.txt").write_text(f"ffconcat version 1.0\nfile '{clip('bikes.mp4')}'\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    os.mkfifo(tmp_path / "pipe")
    small, large = pictures(1)[0], pictures(1, 64, 64)[0]
    for source, fps, message in (
        (tmp_path / "nothing.mp4", None, "There is no video file"),
        ("https://example.org/a.mp4", None, "not fetched"),
        ("rtsp://127.0.0.1/a", None, "not fetched"),
        ("concat:a.mp4|b.mp4", None, "not fetched"),
        (tmp_path / "pipe", None, "not a regular file"),
        (tmp_path / "empty", 2, "has no images"),
        (tmp_path / "empty.mp4", None, "not a video"),
        (tmp_path / "text.mp4", None, "not a video"),
        (tmp_path / "picture.png", None, "not a video"),
        (tmp_path / "list.m3u8", None, "not a video"),
        (tmp_path / "list.txt", None, "not a video"),
        (b"RIFF", None, "not a video"),
        (7, None, "cannot be read from a int"),
        ([], 2, "has no frames"),
        ([small], None, "does not say how many.*\n.* with fps"),
        (np.zeros((2, 4, 4), np.uint8), 2, "must be uint8"),
        ([small, large], 2, "Frame 2 has 64x64 pixels"),
        ([small, b"x"], 2, "Frame 2: "),
    ):
        with pytest.raises(InputError, match=message), open_clip(source, fps) as video:  # type: ignore[arg-type]
            list(video.frames(range(len(video.times))))


def test_files_that_end_early(tmp_path: Path) -> None:
    whole = clip("bikes.mp4").read_bytes()
    path = write_video(tmp_path / "a.mp4", pictures(60), options={"movflags": "+faststart"})
    fast = path.read_bytes()  # a file whose index is at the beginning
    for data in (whole[:5000], whole[: len(whole) // 2], whole[:-100], fast[: len(fast) // 2], fast[:-200]):
        with pytest.raises(InputError, match=r"ends early|damaged"), open_clip(data) as video:
            list(video.frames(range(len(video.times))))


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx-vp9")])
def test_damaged_files_are_read_or_refused(suffix: str, codec: str, tmp_path: Path) -> None:
    """A damaged file gives either frames or an InputError, whatever the damage."""
    path = write_video(tmp_path / f"a.{suffix}", pictures(30), codec=codec, base=Fraction(1, 10))
    good = path.read_bytes()
    chance = random.Random(5)
    outcomes: set[Any] = set()
    for _ in range(150):
        data = bytearray(good)
        for _ in range(chance.choice([1, 3, 30])):
            place = chance.randrange(chance.choice([len(data), 1000]))  # most of the important data is at the beginning
            data[place] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
        try:
            with open_clip(bytes(data)) as video:
                count = len(video.times)
                outcomes.add(len(list(video.frames(sorted(chance.sample(range(count), min(5, count)))))))
        except InputError as error:
            outcomes.add("told" if "\n" not in error.message else error.message)
    assert outcomes <= {"told", 1, 2, 3, 4, 5}
    assert outcomes >= {"told", 5}


def test_frames_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", pictures(5, 128, 128))
    monkeypatch.setattr(module, "MAX_FRAME_PIXELS", 100 * 100)
    with pytest.raises(InputError, match="128x128 pixels; at most 10000"), open_clip(path):
        pass
    monkeypatch.setattr(module, "MAX_FRAME_PIXELS", 128 * 128)
    monkeypatch.setattr(module, "MAX_PACKETS", 4)
    with pytest.raises(InputError, match="more than 4 frames"), open_clip(path):
        pass
