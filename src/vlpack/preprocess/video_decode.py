"""Opens one video (a file, its bytes, or a folder or list of images) and decodes chosen frames.

A file is never decoded whole: listing its packets gives the time of each frame, and only what is needed is decoded,
starting at the nearest key frame. At most one decoded frame is kept in memory, whatever the video's length.
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

from vlpack.errors import InputError, option
from vlpack.preprocess.image_source import ImageSource, load_image

VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | Sequence[ImageSource] | npt.NDArray[np.uint8]"
"""The types of video that `open_clip` accepts: path of a video file or of a folder of images, bytes of a video file, or
frames as a list or array."""

MAX_FRAME_PIXELS = 2**26
"""Maximum pixels of a frame that is decoded: twice those of an 8K frame."""

MAX_PACKETS = 2**22
"""Maximum frames of a video file: 19 hours at 60 frames per second."""

_MAX_HIDDEN = 16  # packets in a row that may yield no frame

# Containers that are a single file. Playlists are left out: they would make the decoder open whatever they name.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf,m4v,h264,hevc"
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".avif", ".jp2")
_HINT = "Give a video file, a folder of images or a list of frames."


class Clip(Protocol):
    """An open video.

    Attributes:
        height: height of the upright frames in pixels.
        width: width of the upright frames in pixels.
        fps: average frames per second.
        times: time of each frame, in seconds from the first frame.
        sampled: whether the frames were already chosen by the user, so that all of them are used.
        name: name of the video in error messages.
    """

    height: int
    width: int
    fps: float
    times: Sequence[float]
    sampled: bool
    name: str

    def frames(self, indices: Iterable[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """Yields the frames with the given numbers, each uint8 [H, W, 3].

        Args:
            indices: numbers of frames, which never decrease.

        Raises:
            InputError: a frame is damaged.
        """
        ...


@contextlib.contextmanager
def open_clip(source: VideoSource, fps: float | None = None) -> Iterator[Clip]:
    """Opens a video; a context manager that closes it.

    Args:
        source: path of a video file; path of a folder of images, which are used in the natural order of their names (2
            before 10); bytes of a video file; or a list of frames, each of which may be anything that `load_image`
            accepts.
        fps: frames per second of a folder or list of images, for which it is required; ignored for a file.

    Raises:
        InputError: the video is missing, damaged, too large, of an unknown format, or has no frames.
    """
    pictures = _pictures(source)
    if pictures is not None:
        if fps is None:
            raise InputError(
                "A video given as images does not say how many of them are shown per second.",
                f"Give their number per second with {option('fps')}.",
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
    """The images of a video that is a folder, list or array; None if the video is a file."""
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
            raise InputError("Videos are not fetched from URLs.", "Download the video and give the path of the file.")
        raise InputError(f"There is no video file {path[:200]!r}.", _HINT)
    if not os.path.isdir(path):
        return None
    names = sorted(
        (name for name in os.listdir(path) if name.lower().endswith(_PICTURES) and not name.startswith(".")),
        key=_natural,
    )
    if not names:
        raise InputError(f"The folder {path} has no images ({', '.join(_PICTURES)}).", _HINT)
    return [os.path.join(path, name) for name in names]


_PARTS = re.compile(r"([0-9]+)")


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts 2.png before 10.png.

    Only ASCII digits count as numbers: ``str.isdigit`` is true for ², which ``int`` refuses.
    """
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
    """A video given as images, one per frame; an implementation of `Clip`."""

    sampled = True

    def __init__(self, pictures: Sequence[ImageSource], fps: float) -> None:
        if not len(pictures):
            raise InputError("The video has no frames.", _HINT)
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
        """Yields the frames with the given numbers, as `Clip.frames` specifies."""
        for index in indices:
            picture = self._load(index) if index else self._first
            if picture.size != self._first.size:
                raise InputError(
                    f"Frame {index + 1} has {picture.width}x{picture.height} pixels, but the first one has "
                    f"{self.width}x{self.height}.",
                    "All frames of a video must have the same size.",
                )
            yield np.asarray(picture)


class FileClip:
    """A video file decoded with PyAV; an implementation of `Clip`.

    Frames are rotated upright as the file specifies. As in transformers, the pixel aspect ratio is ignored.
    """

    sampled = False

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.name, self._file = name, file
        self._stack = contextlib.ExitStack()
        with self._told():
            self._open()
            self._list_packets()
            # In MPEG program streams most packet times are derived from earlier packets, and are wrong after seeking.
            self._seekable = bool(self._keys) and self._container.format.name != "mpeg"
            self._passed = 0  # number of decoded frames, where frames are found by counting
            self._at: Any = None  # the frame that was returned last
            self._ahead: Any = None  # a frame that was decoded beyond it
            self._from_the_beginning()
            first = next(self._upright([0]))
        self.height, self.width = first.shape[:2]
        self._shape = first.shape

    def _open(self) -> None:
        av, name = _av(), self.name
        self._stack.close()
        self._file.seek(0)
        # Without protocols, the decoder cannot open anything that the file names.
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
        self._container = self._stack.enter_context(av.open(self._file, mode="r", options=options))
        streams = self._container.streams.video
        if not streams:
            raise InputError(f"{name} has no video track.", _HINT)
        self._stream = streams[0]
        codec = self._stream.codec_context
        if codec is None:
            raise InputError(f"{name} uses a video codec that the installed PyAV cannot decode.", "Convert it first.")
        if codec.width * codec.height > MAX_FRAME_PIXELS:
            raise InputError(
                f"{name} has {codec.width}x{codec.height} pixels; at most {MAX_FRAME_PIXELS} are decoded.",
                "Scale it down first.",
            )
        self._stream.thread_type = "AUTO"
        codec.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # for files whose frames become larger later on

    def close(self) -> None:
        """Closes the decoder."""
        self._stack.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns errors of the decoder into an InputError that names the file."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # PyAV has a class for each FFmpeg error, and raises Python's own classes too
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if isinstance(error, IndexError):  # raised for a packet of a track that did not exist at the start
                reason = "its tracks change within the file"
            raise InputError(f"{self.name} is not a video that can be read, or is damaged: {reason}.", _HINT) from error

    def _list_packets(self) -> None:
        """Reads the time of every frame from the packets, without decoding anything."""
        stamps: list[int | None] = []
        keys: list[int] = []
        dropped = 0
        for packet in self._container.demux(self._stream):
            if packet.size == 0:  # end of the stream
                continue
            if packet.is_discard:  # cut off by the container's edit list
                dropped += 1
                continue
            stamps.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            if len(stamps) > MAX_PACKETS:
                raise InputError(f"{self.name} has more than {MAX_PACKETS} frames.", "Cut out the part that matters.")
        if len(stamps) + dropped < self._stream.frames:
            raise InputError(
                f"{self.name} ends early: it has {len(stamps) + dropped} of its {self._stream.frames} frames.",
                "Copy or download it again.",
            )
        if not stamps:
            raise InputError(f"{self.name} has no frames.", _HINT)
        known = [stamp for stamp in stamps if stamp is not None]
        # If times are missing (raw streams, some AVI files), frames are found by counting, as transformers always does.
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
        # At a constant rate, number / fps is exact where the container rounds, and is the time that transformers uses.
        constant = all(abs(time - count) <= 2e-3 for time, count in zip(shown, counted, strict=False))
        self.times: Sequence[float] = counted if constant or not shown else shown

    def frames(self, indices: Iterable[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """Yields the frames with the given numbers, as `Clip.frames` specifies."""
        with self._told():
            for frame in self._upright(indices):
                if frame.shape != self._shape:
                    raise InputError(
                        f"{self.name} has frames of different sizes.", "Convert it to a video of one frame size."
                    )
                yield frame

    def _upright(self, indices: Iterable[int]) -> Iterator[npt.NDArray[np.uint8]]:
        for index in indices:
            frame = self._by_time(self._stamps[index]) if self._stamps else self._by_number(index)
            # PyAV gives counterclockwise degrees, and rot90 rotates counterclockwise
            turns = round(frame.rotation / 90) % 4
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))

    def _by_time(self, stamp: int) -> Any:
        """Decodes the frame that is shown at a time stamp: the last frame that starts no later."""
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
            # Seeking does not work in this container: decode from the beginning, and do not seek again.
            self._seekable = False
            self._from_the_beginning()
            return self._by_time(stamp)
        shown = self._at or self._ahead
        # Some codecs yield no frame for a few packets; if many packets yield none, the file is damaged.
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
        """Continues decoding at the last key frame whose time is at most ``key``."""
        self._container.seek(key, stream=self._stream, backward=True)
        self._decoded, self._at, self._ahead = self._decode(key), None, None

    def _from_the_beginning(self) -> None:
        # Opens the file again, because not every container supports seeking.
        self._open()
        self._decoded, self._at, self._ahead = self._decode(None), None, None

    def _decode(self, key: int | None) -> Iterator[Any]:
        """Yields the frames from the current position on.

        Some containers seek to an arbitrary packet, and frames that are decoded without their key frame are wrong. So
        after seeking, packets before the first key frame are skipped.

        Args:
            key: time of the key frame that was sought, None without seeking. There are no frames if the first key frame
                is later, or is not one of those that were listed.
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
        raise InputError(f"Videos need PyAV, which cannot be loaded: {error}.", "Run pip install av.") from None
    return av
