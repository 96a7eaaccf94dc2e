"""Images are encoded once, in a session that is created with the first image and can be interrupted."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import vlpack
from samples import DIGITS, IMAGES, READ
from vlpack.errors import OptionError, PackageError
from vlpack.preprocess import Prompt
from vlpack.runtime import vision as vision_encoder
from vlpack.runtime.genai_model import append
from vlpack.runtime.vision import VisionEncoder, features_port


class Session:
    """A stand-in for an onnxruntime session; its features are the grid's height times the mean of the pixels."""

    def __init__(self) -> None:
        self.calls = 0

    def run(self, names: None, inputs: dict[str, Any], options: Any) -> list[np.ndarray]:
        self.calls += 1
        tokens = inputs["image_grid_thw"].prod() // 4
        return [np.full((tokens, 8), inputs["pixel_values"].mean() * inputs["image_grid_thw"][0, 1], np.float32)]


def prompt(*images: tuple[int, int, float]) -> Prompt:
    """A prompt of uniform images, given by their height and width in patches and their pixel value."""
    grids = np.array([(1, height, width) for height, width, _ in images], np.int64)
    pixels = [np.full((height * width, 12), value, np.float32) for height, width, value in images]
    tokens = grids.prod(axis=1) // 4
    return Prompt(np.zeros((1, int(tokens.sum())), np.int32), tokens, np.concatenate(pixels), grids, "")


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def encoder(session: Session) -> VisionEncoder:
    return VisionEncoder(Path("vision.onnx"), 8, np.float32, 2, 1, lambda graph, threads: session)


def test_an_image_is_encoded_once(encoder: VisionEncoder, session: Session) -> None:
    first = encoder.features(prompt((2, 4, 1.0), (4, 2, 1.0), (2, 4, 3.0)))
    assert first[:, 0].tolist() == [2, 2, 4, 4, 6, 6]  # images with equal pixels differ by their grids
    assert session.calls == 3
    assert encoder.features(prompt((2, 4, 3.0), (2, 2, 1.0))).tolist() == [[6] * 8, [6] * 8, [2] * 8]
    assert session.calls == 4
    encoder.forget()
    encoder.features(prompt((2, 4, 3.0)))
    assert session.calls == 5


def test_only_recent_features_are_kept(
    encoder: VisionEncoder, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_encoder, "KEPT_BYTES", 3 * 2 * 8 * 4)
    for value in (1.0, 2.0, 3.0, 1.0, 4.0):  # 4 replaces 2, the least recently used
        encoder.features(prompt((2, 4, value)))
    assert session.calls == 4
    encoder.features(prompt((2, 4, 1.0)))
    assert session.calls == 4
    encoder.features(prompt((2, 4, 2.0)))
    assert session.calls == 5
    assert encoder.features(prompt((40, 40, 1.0))).shape == (400, 8)  # the features of one image are always kept
    encoder.features(prompt((40, 40, 1.0)))
    assert session.calls == 6


def test_the_stand_in_graph_passes_features_on(encoder: VisionEncoder) -> None:
    arrays = encoder.runtime_arrays(prompt((2, 4, 1.0), (4, 4, 5.0)))
    assert arrays["pixel_values"].shape == (8 + 16, 2)  # as many rows as patches
    given = {name: arrays[name] for name in ("pixel_values", "image_grid_thw")}
    (features,) = ort.InferenceSession(encoder.stand_in).run(None, given)
    assert features.tolist() == [[2] * 8] * 2 + [[20] * 8] * 4


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_control_c_stops_the_encoder() -> None:
    class Slow(Session):
        def run(self, names: None, inputs: dict[str, Any], options: Any) -> list[np.ndarray]:
            end = time.monotonic() + 20
            while not options.terminate and time.monotonic() < end:
                time.sleep(0.01)
            raise RuntimeError("terminated")

    slow = VisionEncoder(Path("vision.onnx"), 8, np.float32, 2, 1, lambda graph, threads: Slow())
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    started = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        slow.features(prompt((2, 4, 1.0)))
    assert time.monotonic() - started < 5


def test_failures_become_package_errors(encoder: VisionEncoder, session: Session, tmp_path: Path) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("bad allocation")

    session.run = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(PackageError, match=r"fails at vision\.onnx: bad allocation"):
        encoder.features(prompt((2, 4, 1.0)))
    broken = VisionEncoder(Path("vision.onnx"), 8, np.float32, 2, 1, fail)
    with pytest.raises(PackageError, match=r"cannot load vision\.onnx: bad allocation"):
        broken.load()
    (tmp_path / "embedding.onnx").write_bytes(b"no graph")
    with pytest.raises(PackageError, match="cannot be read"):
        features_port(tmp_path / "embedding.onnx")


def test_the_vision_provider_is_chosen(tmp_path: Path) -> None:
    folder = vlpack.build(DIGITS, tmp_path / "package", precision="fp32").folder
    own, inside = vlpack.load(folder), vlpack.load(folder, vision_provider="runtime")
    assert own.vision is not None
    assert inside.vision is None
    images = [IMAGES / "00.png", IMAGES / "01.png"]
    greedy = vlpack.Sampling(temperature=0)
    assert own.generate(READ, images, sampling=greedy).tokens == inside.generate(READ, images, sampling=greedy).tokens
    with pytest.raises(OptionError, match="Unknown vision_provider 'gpu'"):
        vlpack.load(folder, vision_provider="gpu")
    text = vlpack.build(DIGITS, tmp_path / "text", part="text").folder
    with pytest.raises(OptionError, match="has no vision encoder"):
        vlpack.load(text, vision_provider="cpu")
    other = vlpack.build(DIGITS, tmp_path / "other", execution_provider="cuda").folder
    with pytest.raises(OptionError, match="cannot be used with"):
        vlpack.load(other, vision_provider="cpu")


@pytest.mark.parametrize(("options", "sizes"), [({"chunk_size": 4}, [4, 4, 2]), ({}, [10])])
def test_feature_tokens_in_chunks(options: dict[str, int], sizes: list[int]) -> None:
    class Generator:
        def __init__(self) -> None:
            self.shown: list[np.ndarray] = []

        def append_tokens(self, ids: np.ndarray) -> None:
            self.shown.append(ids)

    generator = Generator()
    ids = np.arange(10, dtype=np.int32)[None]
    append(generator, ids, options)
    assert [part.size for part in generator.shown] == sizes
    assert np.array_equal(np.concatenate(generator.shown, axis=1), ids)
