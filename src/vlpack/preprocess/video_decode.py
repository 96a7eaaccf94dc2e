"""Opens one video (a file, its bytes, or a folder or list of pictures) and hands out the frames that are asked for.

A file is never decoded whole: its packets are listed first, which tells when each frame is shown, and only what is
needed is decoded, from the nearest key frame on. One decoded frame is held at a time, whatever the video's length.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlpack.errors import InputError
from vlpack.preprocess.image_source import ImageSource, load_image

VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | Sequence[ImageSource] | npt.NDArray[np.uint8]"
"""What `open_clip` takes: a video file or folder of pictures, a file's bytes, or frames as a list or array."""

MAX_FRAME_PIXELS = 2**26
"""Most pixels of a frame that is decoded: twice an 8K frame's."""

MAX_PACKETS = 2**22
"""Most frames that a file may have: 19 hours at 60 a second."""

_MAX_HIDDEN = 16  # packets in a row that need not become frames

# Containers that are one file. Playlists are none: they would make the decoder open whatever they name.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf,m4v,h264,hevc"
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".avif", ".jp2")
_HINT = "Give a video file, a folder of pictures or a list of frames."


class Clip(Protocol):
    """A video that is open.

    Attributes:
        height: of its frames as they are shown, pixels.
        width: likewise.
        fps: frames a second, on average.
        times: when each frame is shown, in seconds from the first one's; as many as there are frames.
        sampled: whether somebody has chosen these frames already, so that none are left out.
        name: for messages.
    """

    height: int
    width: int
    fps: float
    times: Sequence[float]
    sampled: bool
    name: str

    def frames(self, indices: Iterable[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """The frames of these numbers, which never decrease, each uint8 [H, W, 3]; InputError for a damaged one."""
        ...


@contextlib.contextmanager
def open_clip(source: VideoSource, fps: float | None = None) -> Iterator[Clip]:
    """Opens a video.

    Args:
        source: path of a video file or of a folder of pictures (taken in the order of their names, numbers in them
            counted as numbers), the bytes of a video file, or a list of frames, each anything that `load_image` takes.
        fps: how many frames a second a folder or list has, which must be given for one; a file tells itself.

    Raises:
        InputError: it is not there, damaged, too large, of an unknown format, or has no picture.
    """
    pictures = _pictures(source)
    if pictures is not None:
        if fps is None:
            raise InputError(
                "Frames that come as pictures do not tell when they were taken.", "Give fps: frames a second."
            )
        yield PictureClip(pictures, fps)
        return
    with contextlib.ExitStack() as stack:
        if isinstance(source, (bytes, bytearray, memoryview)):
            file: IO[bytes] = io.BytesIO(source)
            name = f"the {len(source)} bytes given"
        else:
            name = os.fspath(source)  # type: ignore[arg-type]
            file = stack.enter_context(_open_file(name))
        clip = FileClip(file, name)
        stack.callback(clip.close)
        yield clip


def _pictures(source: VideoSource) -> Sequence[ImageSource] | None:
    """The frames of a folder, list or array; None for a file."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 4:
            raise InputError(
                f"A video as an array must be uint8 [frames, H, W, 3], not {source.dtype} {list(source.shape)}.", _HINT
            )
        return list(source)
    if isinstance(source, (list, tuple)):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return None
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"A video cannot be read from a {type(source).__name__}.", _HINT)
    path = os.fspath(source)
    if "\0" in path or not os.path.lexists(path):
        if re.match(r"[a-z]{2,}:", path, re.IGNORECASE):
            raise InputError("Videos are not fetched from URLs.", "Download it, and give the file's path.")
        raise InputError(f"There is no video file {path[:200]!r}.", _HINT)
    if not os.path.isdir(path):
        return None
    names = sorted(
        (name for name in os.listdir(path) if name.lower().endswith(_PICTURES) and not name.startswith(".")),
        key=_natural,
    )
    if not names:
        raise InputError(f"{path} has no pictures ({', '.join(_PICTURES)}).", _HINT)
    return [os.path.join(path, name) for name in names]


_PARTS = re.compile(r"([0-9]+)")


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts 2.png before 10.png. Only ASCII digits are numbers: ² is a digit for Python, and not one for ``int``."""
    parts = [(bool(_PARTS.fullmatch(part)), part) for part in _PARTS.split(name)]
    return [(number, int(part) if number else 0, part) for number, part in parts]


def _open_file(path: str) -> IO[bytes]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or device could block or never end
            raise InputError(f"{path} is not a regular file.", _HINT)
        return Path(path).open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


class PictureClip:
    """Frames that are pictures already; `Clip` says what it has."""

    sampled = True

    def __init__(self, pictures: Sequence[ImageSource], fps: float) -> None:
        if not len(pictures):
            raise InputError("A video without frames.", _HINT)
        self._pictures = pictures
        self._first = self._load(0)
        self.height, self.width = self._first.height, self._first.width
        self.fps, self.name = fps, f"the {len(pictures)} frames"
        self.times: Sequence[float] = [number / fps for number in range(len(pictures))]

    def _load(self, number: int) -> Image.Image:
        try:
            return load_image(self._pictures[number])
        except InputError as error:
            raise InputError(f"Frame {number + 1}: {error.message}", error.hint) from error

    def frames(self, indices: Iterable[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """See `Clip`."""
        for index in indices:
            picture = self._load(index) if index else self._first
            if picture.size != self._first.size:
                raise InputError(
                    f"Frame {index + 1} has {picture.width}x{picture.height} pixels, the first one "
                    f"{self.width}x{self.height}.",
                    "All frames of a video must have one size.",
                )
            yield np.asarray(picture)


class FileClip:
    """A video file in PyAV; `Clip` says what it has.

    Frames are turned upright as the file asks; a pixel's shape is not heeded, as in transformers.
    """

    sampled = False

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.name, self._file = name, file
        self._stack = contextlib.ExitStack()
        with self._told():
            self._open()
            self._list_packets()
            # in MPEG program streams most packets' times are made up from those before, and wrong after seeking
            self._seekable = bool(self._keys) and self._container.format.name != "mpeg"
            self._passed = 0  # frames, where they are counted
            self._at: Any = None  # the frame that was asked for last
            self._ahead: Any = None  # one that was decoded beyond it
            self._from_the_beginning()
            first = next(self._upright([0]))
        self.height, self.width = first.shape[:2]
        self._shape = first.shape

    def _open(self) -> None:
        av, name = _av(), self.name
        self._stack.close()
        self._file.seek(0)
        # No protocols: whatever else a file might name, it does not get opened.
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
        self._container = self._stack.enter_context(av.open(self._file, mode="r", options=options))
        streams = self._container.streams.video
        if not streams:
            raise InputError(f"{name} has no video track.", _HINT)
        self._stream = streams[0]
        codec = self._stream.codec_context
        if codec is None:
            raise InputError(f"{name} is of a kind of video that cannot be decoded here.", _HINT)
        if codec.width * codec.height > MAX_FRAME_PIXELS:
            raise InputError(
                f"{name} has {codec.width}x{codec.height} pixels; at most {MAX_FRAME_PIXELS} are decoded.",
                "Scale it down first.",
            )
        self._stream.thread_type = "AUTO"
        codec.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # where frames grow on the way

    def close(self) -> None:
        """Let go of the file."""
        self._stack.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the decoder as sentences."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # PyAV has an error for each of FFmpeg's, and its own for what a file lacks
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if isinstance(error, IndexError):  # PyAV's for a packet of a track that was not there at the beginning
                reason = "its tracks change on the way"
            raise InputError(f"{self.name} is not a video that can be read, or is damaged: {reason}.", _HINT) from error

    def _list_packets(self) -> None:
        """When frames are shown: from their packets, so that nothing has to be decoded."""
        stamps: list[int | None] = []
        keys: list[int] = []
        dropped = 0
        for packet in self._container.demux(self._stream):
            if packet.size == 0:  # the end
                continue
            if packet.is_discard:  # cut away by the container's edit list
                dropped += 1
                continue
            stamps.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            if len(stamps) > MAX_PACKETS:
                raise InputError(f"{self.name} has more than {MAX_PACKETS} frames.", "Cut out the part that matters.")
        if len(stamps) + dropped < self._stream.frames:
            raise InputError(
                f"{self.name} ends early: {len(stamps) + dropped} of its {self._stream.frames} frames are there.",
                "Copy or download it again.",
            )
        if not stamps:
            raise InputError(f"{self.name} has no frames.", _HINT)
        known = [stamp for stamp in stamps if stamp is not None]
        # Without every time (raw streams, some AVI) frames are counted, as transformers counts always.
        self._stamps = sorted(known) if len(set(known)) == len(stamps) else []
        self._keys = sorted(keys)
        self._count = len(stamps)
        base = self._stream.time_base
        rate = self._stream.average_rate
        shown = (
            [(stamp - self._stamps[0]) * base.numerator / base.denominator for stamp in self._stamps] if base else []
        )
        if rate is None and shown and shown[-1] > 0:
            self.fps = (len(shown) - 1) / shown[-1]
        else:
            self.fps = float(rate or self._stream.guessed_rate or 25)
        counted = [number / self.fps for number in range(self._count)]
        # At a constant rate the number says it exactly where the container rounds, and as transformers says it.
        constant = all(abs(time - count) <= 2e-3 for time, count in zip(shown, counted, strict=False))
        self.times: Sequence[float] = counted if constant or not shown else shown

    def frames(self, indices: Iterable[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """See `Clip`."""
        with self._told():
            for frame in self._upright(indices):
                if frame.shape != self._shape:
                    raise InputError(f"{self.name} changes the size of its frames on the way.", "Convert it first.")
                yield frame

    def _upright(self, indices: Iterable[int]) -> Iterator[npt.NDArray[np.uint8]]:
        for index in indices:
            frame = self._by_time(self._stamps[index]) if self._stamps else self._by_number(index)
            # counterclockwise degrees, as numpy turns
            turns = round(frame.rotation / 90) % 4
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))

    def _by_time(self, stamp: int) -> Any:
        """The frame that is shown at a time: the last one that begins no later."""
        if self._at is None or self._at.pts < stamp:
            key = self._keys[bisect.bisect_right(self._keys, stamp) - 1] if self._keys else self._stamps[0]
            if self._seekable and (self._at is None or self._at.pts < key <= stamp):
                self._seek(key)
        while self._at is None or self._at.pts < stamp:
            self._ahead = self._ahead or next((frame for frame in self._decoded if frame.pts is not None), None)
            if self._ahead is None or self._ahead.pts > stamp:
                break
            self._at, self._ahead = self._ahead, None
        if self._at is None and self._seekable:
            # the container cannot be sought in as it should: from the beginning, and never again
            self._seekable = False
            self._from_the_beginning()
            return self._by_time(stamp)
        shown = self._at or self._ahead
        # Packets need not become frames (some codecs hide a few); where many do not, the file is damaged.
        if shown is None or self._number(stamp) - self._number(shown.pts) > _MAX_HIDDEN:
            raise InputError(f"{self.name} is damaged: its frame {self._number(stamp) + 1} cannot be decoded.")
        return shown

    def _number(self, stamp: int) -> int:
        return bisect.bisect_left(self._stamps, stamp)

    def _by_number(self, index: int) -> Any:
        while self._passed <= index:
            self._at, self._passed = next(self._decoded, None), self._passed + 1
            if self._at is None:
                raise InputError(f"{self.name} is damaged: its frame {index + 1} cannot be decoded.")
        return self._at

    def _seek(self, key: int) -> None:
        """Go on with a key frame, at this time or before."""
        self._container.seek(key, stream=self._stream, backward=True)
        self._decoded, self._at, self._ahead = self._decode(key), None, None

    def _from_the_beginning(self) -> None:
        # by opening the file again: not every container can be sought in
        self._open()
        self._decoded, self._at, self._ahead = self._decode(None), None, None

    def _decode(self, key: int | None) -> Iterator[Any]:
        """The frames from here on; after seeking, from the first key frame on, and none if that is beyond ``key``.

        Seeking may end anywhere in some containers, and what is decoded without its key frame is not the picture.
        """
        for packet in self._container.demux(self._stream):
            if key is not None:
                if not packet.is_keyframe or packet.pts is None:
                    continue
                if packet.pts > key or packet.pts not in self._keys:
                    return
                key = None
            yield from packet.decode()


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError(f"Videos need PyAV, which cannot be loaded: {error}.", "pip install av") from None
    return av
