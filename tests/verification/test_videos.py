"""`verify` with videos: correct ones, one shifted by a patch, and prompts that mix images and videos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samples import seal
from samples import vlpack as run_vlpack
from tiny import Tiny
from vlpack.builder import build
from vlpack.errors import InputError
from vlpack.preprocess import Prompt, VideoOptions
from vlpack.sample_images import picture
from vlpack.verification import answers as asking
from vlpack.verification.cases import Case, built_in
from vlpack.verification.result import Report
from vlpack.verification.run import verify

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("av")

TINY = Tiny(quiet=False)
FRAMES = [picture(64, 48, seed) for seed in range(5)]


@pytest.fixture(scope="module")
def source(checkpoint: Callable[[Tiny], Path]) -> Path:
    return checkpoint(TINY)


def check(source: Path, package: Path) -> Report:
    (case,) = (case for case in built_in(sees=True, videos=True) if case.videos)
    return verify(package, source, cases=[case], tokens=8, threads=1)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_video(precision: str, source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "package", precision=precision, threads=1)
    report = check(source, tmp_path / "package")
    assert report.findings == []
    (case,) = report.cases
    assert case.images == ["5 frames of 192 x 128"]
    assert case.maps == []
    assert {"vision features", "DeepStack 0", "input of vision block 2"} <= {stage.name for stage in case.stages}
    assert max(stage.graph.relative for stage in case.stages if stage.graph) < 1e-5
    if precision == "fp32":
        assert case.same_tokens == 8
        assert max(stage.total.relative for stage in case.stages) < 1e-5


def test_the_built_in_cases_contain_a_video(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "package", threads=1)
    names = [case.name for case in verify(tmp_path / "package", source, tokens=2, threads=1).cases]
    assert names == ["text", "long text", "one image", "two images", "video"]


def test_images_and_videos_in_any_order(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes all images before all videos; prompt and package have them in the order of the prompt."""
    build(source, tmp_path / "package", precision="fp32", threads=1)
    model_prompt = asking.Model.prompt

    def turns(self: Any, question: str, images: Any, videos: Any, **options: Any) -> Prompt:
        kinds = ["video", "image", "video", "image"]
        parts = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
        return model_prompt(self, [{"role": "user", "content": parts}], images, videos, **options)

    monkeypatch.setattr(asking.Model, "prompt", turns)
    images = (picture(64, 96, 3), picture(96, 32, 4))
    case = Case("turns", "What?", images, (), None, (FRAMES, FRAMES[1:3]), VideoOptions(fps=2))
    report = verify(tmp_path / "package", source, cases=[case], tokens=4, threads=1)
    assert report.findings == []
    (result,) = report.cases
    assert max(stage.total.relative for stage in result.stages) < 1e-5
    sizes = [(len(image.values), len(image.values[0])) for image in result.maps]
    assert sizes[0][0] > sizes[0][1]
    assert sizes[1][0] < sizes[1][1]


def off_by_one(patch: pytest.MonkeyPatch) -> None:
    """The graph places the patches of a frame a row lower than the model, as if the grid began at 1."""
    from vlpack.layers.vision import patch_positions

    def lower(op: Any, *arguments: Any) -> Any:
        places = patch_positions(op, *arguments)
        return places._replace(row=op.Mod(op.Add(places.row, 1), places.height))

    patch.setattr("vlpack.architectures.qwen3_vl.patch_positions", lower)


def test_a_grid_off_by_one_in_the_graph(source: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        off_by_one(patch)
        build(source, tmp_path / "package", precision="int4", threads=1)
    report = check(source, tmp_path / "package")
    assert report.findings[0].stage == "input of vision block 0"
    assert "video: " in report.findings[0].message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"shortest_edge": 4096, "longest_edge": 16384}}, "the video's grid is"),
        ({"image_mean": [0.1, 0.1, 0.1]}, "the video's pixels differ"),
    ],
)
def test_changed_video_settings(change: dict[str, Any], words: str, source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "package", threads=1)
    path = tmp_path / "package" / "video_preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    seal(tmp_path / "package")
    (finding,) = check(source, tmp_path / "package").findings
    assert finding.stage == "pixels"
    assert words in finding.message


def test_a_user_s_own_video(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import av

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=2)
        stream.width, stream.height = FRAMES[0].size
        for frame in [*FRAMES, *FRAMES]:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())
    build(source, tmp_path / "package", threads=1)
    options = ("--reference", source, "--tokens", 2, "--json")
    done = run_vlpack(capsys, "verify", tmp_path / "package", *options, "--video", path, "--prompt", "What happens?")
    (case,) = json.loads(done.out)["cases"]
    assert (done.code, case["images"]) == (0, ["clip.mp4"])
    lines = tmp_path / "cases.jsonl"
    lines.write_text('{"prompt": "Look.", "videos": ["clip.mp4"]}\n', encoding="utf-8")
    done = run_vlpack(capsys, "verify", tmp_path / "package", *options, "--cases", lines)
    assert (done.code, json.loads(done.out)["cases"][0]["images"]) == (0, ["clip.mp4"])


def test_a_package_without_videos(source: Path, tmp_path: Path) -> None:
    case = Case("clip", "What?", videos=(FRAMES,), video_options=VideoOptions(fps=1))
    for task in ("embedding", "generate"):
        build(source, tmp_path / task, task=task, part="text", threads=1)
        with pytest.raises(InputError, match=r"takes? no videos|does not take"):
            verify(tmp_path / task, source, cases=[case], threads=1)
