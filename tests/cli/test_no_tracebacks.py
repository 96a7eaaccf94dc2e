"""Errors are reported in a sentence, never as a traceback: huge numbers, unusual settings, too little memory."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlpack
from samples import DIGITS, IMAGES, READ, copy_digits, edit_json, seal
from samples import vlpack as run_vlpack
from vlpack.cli import app as cli
from vlpack.cli import console
from vlpack.errors import InputError, PackageError, VlpackError
from vlpack.preprocess import ImageProcessor
from vlpack.preprocess.video import VideoProcessor
from vlpack.preprocess.video_decode import open_clip

HUGE = 10**400


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlpack.build(DIGITS, tmp_path_factory.mktemp("whole") / "package", precision="int4").folder


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "package"))


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("config.json", ("text_config", "rms_norm_eps")),
        ("config.json", ("text_config", "rope_parameters", "rope_theta")),
        ("preprocessor_config.json", ("rescale_factor",)),
        ("preprocessor_config.json", ("image_mean",)),
        ("preprocessor_config.json", ("image_std",)),
        ("generation_config.json", ("temperature",)),
    ],
)
def test_numbers_beyond_floats(file: str, keys: tuple[str, ...], tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    edit_json(source / file, *keys, value=[HUGE] * 3 if keys[0].startswith("image_") else HUGE)
    with pytest.raises(VlpackError, match=keys[-1]):
        vlpack.build(source, tmp_path / "package")


@pytest.mark.parametrize("name", ["rescale_factor", "image_mean", "fps"])
def test_numbers_beyond_floats_in_video_settings(name: str, tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    for value in (HUGE, 1e308) if name == "fps" else (HUGE,):
        edit_json(source / "video_preprocessor_config.json", name, value=[value] * 3 if name == "image_mean" else value)
        with pytest.raises(VlpackError, match=name):
            VideoProcessor.from_folder(source)


@pytest.mark.parametrize(
    ("keys", "value", "match"),
    [
        (("search",), [1], "'search' must be an object"),
        (("search",), None, "'search' must be an object"),
        (("model", "decoder", "inputs"), ["inputs_embeds"], r"'decoder\.inputs' must be an object"),
        (("model", "decoder", "inputs"), -1, r"'decoder\.inputs' must be an object"),
        (("model", "embedding"), [1], "embedding|cannot be read"),
        (("model", "embedding"), {}, "cannot be read"),
        (("model", "vision", "filename"), ..., "cannot be read"),
    ],
)
def test_unusual_settings_of_a_package(keys: tuple[str, ...], value: Any, match: str, package: Path) -> None:
    edit_json(package / "genai_config.json", *keys, value=value)
    seal(package)
    with pytest.raises(PackageError, match=match):
        vlpack.load(package).generate(READ, [IMAGES / "02.png"], max_tokens=1)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("preprocessor_config.json", {"size": {"shortest_edge": 2**28, "longest_edge": 2**30}}),
        ("preprocessor_config.json", {"temporal_patch_size": 256}),
        ("video_preprocessor_config.json", {"temporal_patch_size": 256}),
        ("video_preprocessor_config.json", {"num_frames": 10**12, "fps": None}),
        ("video_preprocessor_config.json", {"min_frames": 10**12, "max_frames": 10**12, "fps": None}),
    ],
)
def test_settings_that_need_too_much_memory(file: str, changes: dict[str, Any], package: Path) -> None:
    for name, value in changes.items():
        edit_json(package / file, name, value=value)
    seal(package)
    kind = VideoProcessor if file.startswith("video") else ImageProcessor
    with pytest.raises(VlpackError, match="must be"):
        kind.from_folder(package)


def test_images_that_need_too_much_memory() -> None:
    images = [Image.new("RGB", (4000, 4000))] * 12
    processor = ImageProcessor(max_pixels=2**40)
    with pytest.raises(InputError, match=r"take 4\.6 GB as numbers.*\n.*smaller max_pixels"):
        processor(images)


def test_frames_that_are_not_resized_are_limited_too() -> None:
    processor = VideoProcessor(do_resize=False)
    with pytest.raises(InputError, match="more than"):
        processor.target_size(768, 1024, 1024)


def test_pictures_named_with_unusual_digits(tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "²1.png", "٣.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    with open_clip(str(tmp_path), 1.0) as clip:
        assert len(clip.times) == 4


@pytest.mark.parametrize("value", [None, 5, {"a": 1}.keys()])
@pytest.mark.parametrize("name", ["images", "videos"])
def test_arguments_that_are_not_lists(name: str, value: Any, whole: Path) -> None:
    model = vlpack.load(whole)
    for ask in (model.generate, model.prompt, model.chat().ask):
        with pytest.raises(InputError, match=f"{name} must be a list"):
            ask("a", **{name: value})
    if name == "images":
        with pytest.raises(InputError, match="images must be a list"):
            model.generate("a", value)


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (MemoryError(), "not enough memory"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many files are open"),
        (RuntimeError("can't start new thread"), "No thread can be started"),
        (ImportError("x.so: failed to map segment from shared object", path="x.so"), "memory to load a library"),
    ],
)
def test_operating_system_errors(
    error: Exception, match: str, whole: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    stdout = sys.stdout
    monkeypatch.setattr("vlpack.inspection.inspect", fail)
    try:
        done = run_vlpack(capfd, "inspect", whole)
        assert (done.code, match in done.err) == (2, True), done
        monkeypatch.setattr(console, "show_error", fail)  # show_error itself loads modules and needs memory
        if not isinstance(error, RuntimeError):
            done = run_vlpack(capfd, "inspect", whole)
            assert (done.code, match in done.err) == (2, True), done
    finally:
        sys.stdout = stdout


def test_other_errors_are_not_hidden(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("a mistake of vlpack's")

    monkeypatch.setattr("vlpack.inspection.inspect", fail)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    with pytest.raises(RuntimeError, match="a mistake of vlpack's"):
        cli.main(["inspect", str(whole)])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
@pytest.mark.parametrize("more", [2, 12, 30])
def test_too_little_memory(more: int, tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from vlpack import builder, inspection\n"
        "from vlpack.cli import app\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20,) * 2)\n"
        "app.main(sys.argv[2:])\n"
    )
    command = [sys.executable, "-c", program, str(more), "build", str(DIGITS), "-o", str(tmp_path / "package")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    # the tokenizers library, written in Rust, aborts with its own message if memory runs out
    assert done.returncode in (0, 2, -6), (done.returncode, done.stderr[-2000:])
    assert (tmp_path / "package").exists() == (done.returncode == 0)
