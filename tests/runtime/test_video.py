"""Videos from question to answer: prompt tokens, all logits and the greedy answer agree with transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from architectures.test_family import VISION_MEMBERS
from family import make_member
from parity import Reference
from preprocess.video_files import clip, pictures, write_video
from samples import DIGITS, vlpack
from tiny import FIRST_SPECIAL, IMAGE, VIDEO, Tiny
from vlpack import VideoOptions
from vlpack.builder import build
from vlpack.errors import InputError, VlpackError
from vlpack.preprocess import Prompt, PromptBuilder
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling

TOKENS = 32
TINY = Tiny(seed=1)
DEEP = Tiny(seed=3, patch_size=16, style="v4", deepstack=(2, 0))
QUESTION = "What happens?"
GOLDEN = json.loads((Path(__file__).parents[1] / "preprocess" / "golden_video.json").read_text(encoding="utf-8"))

BIKES, CARPHONE = clip("bikes.mp4"), clip("carphone_pristine.mp4")


def video(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **options}


def image(width: int = 96, height: int = 64) -> dict[str, Any]:
    return {"type": "image", "image": np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)}


CASES: dict[str, list[dict[str, Any]]] = {
    "one video": [video(BIKES)],
    "frames by number": [video(CARPHONE, num_frames=6)],
    "an odd number": [video(CARPHONE, num_frames=5, total_pixels=60_000)],
    "two frames": [video(CARPHONE, num_frames=2)],
    "pictures": [video(pictures(7), fps=3)],
    "video then image": [video(CARPHONE, fps=1), image()],
    "image then video": [image(), video(CARPHONE, fps=1)],
    "two videos": [video(CARPHONE, fps=1), video(BIKES, num_frames=7)],
    "two alike": [video(CARPHONE, num_frames=4), video(CARPHONE, num_frames=4)],
    "all of them": [image(64, 48), video(pictures(3), fps=0.7), image(), video(CARPHONE, num_frames=4), image(64, 48)],
}


def messages(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="session")
def model(built: Callable[..., Path]) -> Callable[[Tiny], Model]:
    made: dict[Tiny, Model] = {}

    def get(tiny: Tiny) -> Model:
        if tiny not in made:
            made[tiny] = Model(built(tiny), threads=1, vision_provider="runtime")
        return made[tiny]

    return get


def tensors(prompt: Prompt) -> dict[str, Any]:
    return {name: torch.tensor(array) for name, array in prompt.transformers_arrays(IMAGE, VIDEO).items()}


def generate(reference: Reference, inputs: Mapping[str, Any], count: int) -> list[int]:
    ids = inputs["input_ids"]
    out = reference.model.generate(
        **inputs, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.scores)[:, 0].topk(2).values
    margin = float((best[:, 0] - best[:, 1]).min())
    assert margin > 1e-4, f"top two logits {margin:.1g} apart: choose another seed"
    answer: list[int] = out.sequences[0, ids.shape[1] :].tolist()
    return answer


@pytest.mark.parametrize("tiny", [TINY, DEEP], ids=["tiny", "deepstack out of order"])
@pytest.mark.parametrize("name", CASES)
def test_answers(name: str, tiny: Tiny, model: Callable[[Tiny], Model], reference: Callable[[Tiny], Reference]) -> None:
    loaded, live = model(tiny), reference(tiny)
    prompt = loaded.prompt(messages(CASES[name]))
    inputs = tensors(prompt)
    generator = og.Generator(loaded._load_runtime(), og.GeneratorParams(loaded._load_runtime()))
    named = og.NamedTensors()
    for key, array in prompt.named_arrays().items():
        named[key] = array
    generator.set_inputs(named)
    logits = generator.get_logits()[0, -1]
    with torch.no_grad():
        live.model.model.rope_deltas = None
        wanted = live.model(**inputs).logits[0, -1].numpy()
        blind = live.model(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"] * 0}).logits[0, -1].numpy()
    assert np.linalg.norm(logits - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert np.linalg.norm(logits - blind) > 1e-2 * np.linalg.norm(wanted)  # the video matters
    live.model.model.rope_deltas = None
    tokens = generate(live, inputs, TOKENS)
    assert len(set(tokens)) > TOKENS // 4
    assert max(tokens) < FIRST_SPECIAL
    answer = loaded.generate(messages(CASES[name]), max_tokens=TOKENS, sampling=Sampling(temperature=0))
    assert answer.tokens == tokens


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder.from_folder(DIGITS, image_token_id=IMAGE, video_token_id=VIDEO)


@pytest.mark.parametrize(
    "case", [case for case in GOLDEN["cases"] if not case["settings"]], ids=lambda case: case["name"]
)
def test_golden_prompts(case: dict[str, Any], builder: PromptBuilder) -> None:
    """The prompt's tokens equal those of transformers' own processor, recorded for a clip and its question."""
    prompt = builder(messages([video(clip(case["clip"]), **case["options"])]), add_generation_prompt=False)
    assert GOLDEN["text"] == prompt.text
    assert prompt.transformers_arrays(IMAGE, VIDEO)["input_ids"][0].tolist() == case["input_ids"]


def test_tokens_are_those_of_transformers_processor(builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers' processor class checks for torchvision
    monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *arguments: None)
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(DIGITS),
        tokenizer=AutoTokenizer.from_pretrained(DIGITS),
        video_processor=Qwen3VLVideoProcessor.from_pretrained(DIGITS),
    )
    for parts in CASES.values():
        prompt = builder(messages(parts))
        arrays = prompt.transformers_arrays(IMAGE, VIDEO)
        metadata = [
            VideoMetadata(total_num_frames=1000, fps=rate, frames_indices=list(span.frames_indices))
            for span, rate in zip(prompt.videos, rates(parts), strict=True)
        ]
        inputs = {"video_grid_thw": torch.tensor(arrays["video_grid_thw"]), "video_metadata": metadata}
        videos = [processor.replace_video_token(inputs, number) for number in range(len(metadata))]
        grids = {"image_grid_thw": torch.tensor(arrays.get("image_grid_thw", np.zeros((0, 3), np.int64)))}
        images = [processor.replace_image_token(grids, number) for number in range(len(grids["image_grid_thw"]))]
        (text,), _ = processor.get_text_with_replacements([prompt.text], images, videos)
        assert processor.tokenizer(text)["input_ids"] == arrays["input_ids"][0].tolist()
        kinds = processor.create_mm_token_type_ids([arrays["input_ids"][0].tolist()])
        assert kinds[0] == arrays["mm_token_type_ids"][0].tolist()


def rates(parts: list[dict[str, Any]]) -> list[float]:
    known = {BIKES: 25.0, CARPHONE: 30000 / 1001}
    videos = [part for part in parts if part["type"] == "video"]
    return [part["fps"] if isinstance(part["video"], list) else known[part["video"]] for part in videos]


def test_a_prompt_describes_its_videos(builder: PromptBuilder) -> None:
    prompt = builder(messages(CASES["all of them"]))
    first, second = prompt.videos
    assert (first.first, first.grid_thw[0], first.frames_indices) == (1, 2, (0, 1, 2))
    assert first.timestamps == pytest.approx((0.5 / 0.7, 2 / 0.7))
    assert (second.first, second.grid_thw[0], second.frames_indices) == (4, 2, (0, 40, 79, 119))
    assert prompt.is_video.tolist() == [False, True, True, False, True, True, False]
    assert prompt.grids[prompt.is_video, 0].tolist() == [1, 1, 1, 1]
    assert prompt.num_video_tokens == prompt.num_image_tokens[[1, 2, 4, 5]].sum()
    assert "pixel_values" not in builder(messages(CASES["one video"])).transformers_arrays(IMAGE, VIDEO)
    assert builder(messages([image()])).videos == ()


def test_videos_given_separately_are_the_same(builder: PromptBuilder) -> None:
    inside = builder(messages([video(CARPHONE, num_frames=4), video(BIKES, fps=1)]))
    outside = builder(
        messages([{"type": "video", "num_frames": 4}, {"type": "video"}]),
        videos=[CARPHONE, BIKES],
        video_options=VideoOptions(fps=1),
    )
    assert np.array_equal(inside.input_ids, outside.input_ids)
    assert inside.pixel_values is not None
    assert outside.pixel_values is not None
    assert np.array_equal(inside.pixel_values, outside.pixel_values)


def test_videos_that_cannot_be_used(builder: PromptBuilder) -> None:
    for parts, options, message in (
        ([{"type": "video"}], {}, "1 video parts without a source, but 0 videos"),
        ([], {"videos": [BIKES]}, "0 video parts"),
        ([], {"video_options": VideoOptions(fps=1)}, "no effect: there are no videos"),
        ([video(BIKES, fps=1)], {"video_options": VideoOptions(fps=1)}, "no effect: every video part has options"),
        ([video(BIKES, path=BIKES)], {}, "more than one of video, path"),
        ([video(BIKES, nframes=3)], {}, "part 1 has the unknown field 'nframes'"),
        ([video(BIKES, fps=-1)], {}, "part 1: fps is -1"),
        ([video(pictures(1), fps=1)], {}, "1 frame is too short"),
        ([video(CARPHONE, num_frames=1)], {}, "1 frame is too short"),
        ([video("https://example.org/a.mp4")], {}, "not fetched"),
        ([video(BIKES), {"type": "text", "text": "<|video_pad|>"}], {}, "2 video placeholders .* for 1 videos"),
    ):
        with pytest.raises(InputError, match=message):
            builder(messages(parts), **options)
    text_only = PromptBuilder.from_folder(DIGITS, image_token_id=None)
    with pytest.raises(InputError, match="no vision part, so it takes no videos"):
        text_only(messages([video(BIKES)]))


def test_a_conversation_with_a_video_in_each_turn(
    model: Callable[[Tiny], Model], reference: Callable[[Tiny], Reference]
) -> None:
    conversation = [
        *messages([video(CARPHONE, num_frames=3)]),
        {"role": "assistant", "content": "A man speaks."},
        *messages([image(), video(BIKES, num_frames=4)]),
    ]
    reference(TINY).model.model.rope_deltas = None
    wanted = generate(reference(TINY), tensors(model(TINY).prompt(conversation)), 12)
    answer = model(TINY).generate(conversation, max_tokens=12, sampling=Sampling(temperature=0))
    assert answer.tokens == wanted


def test_stats_and_arguments(model: Callable[[Tiny], Model], tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", pictures(20), fps=10)
    answer = model(TINY).generate(QUESTION, [image()["image"]], [path], video_options=VideoOptions(num_frames=5))
    stats = answer.stats
    assert (stats.video_frames, stats.image_tokens) == (5, 24)
    assert stats.video_tokens == 3 * 12
    assert 0 < stats.video_seconds < (stats.preprocess_seconds or 0)
    prompt = model(TINY).prompt(QUESTION, videos=[path])
    for given in ({"videos": [path]}, {"video_options": VideoOptions(fps=1)}):
        with pytest.raises(InputError, match=f"{next(iter(given))} would have no effect"):
            model(TINY).generate(prompt, **given)
    with pytest.raises(InputError, match="must be a list"):
        model(TINY).generate(QUESTION, videos=str(path))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"4673 more than fit.*7500 of them are of videos.*\n.*fewer frames"):
        model(TINY).generate(QUESTION, videos=[BIKES], video_options=VideoOptions(fps=25, total_pixels=2**22))


def test_the_command(
    built: Callable[..., Path], model: Callable[[Tiny], Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = built(TINY)
    options = ["--max-tokens", "8", "--temperature", "0", "--threads", "1"]
    one = vlpack(capsys, "run", package, "--video", CARPHONE, "--fps", "1", "--stats", *options, QUESTION)
    assert one.code == 0
    assert " of 4 video frames)" in one.err.replace("\n", " ")
    assert "reading videos 0." in one.err
    answer = model(TINY).generate(messages([video(CARPHONE, fps=1)]), max_tokens=8, sampling=Sampling(temperature=0))
    assert one.out.strip() == answer.text.strip()
    for number, picture in enumerate(pictures(3)):
        (tmp_path / f"{number}.ppm").write_bytes(b"P6 64 48 255\n" + picture.tobytes())
    more = ["--video", tmp_path, "--video", CARPHONE, "--fps", "2", "--json"]
    two = vlpack(capsys, "run", package, *more, *options, QUESTION)
    assert two.code == 0
    assert json.loads(two.out)["stats"]["video_frames"] == 3 + 8
    for wrong, message in (
        (["--fps", "1"], "--fps has no effect without a video"),
        (["--video", CARPHONE, "--max-pixels", "5000"], "are for images"),
        (["--video", CARPHONE, "--fps", "1", "--num-frames", "2"], "exclude each other"),
        (["--video", tmp_path], "does not say how many"),
        (["--video", tmp_path, "--num-frames", "2", "--fps", "1"], "exclude"),
        (["--video", tmp_path / "no.mp4"], "There is no video file"),
        (["--video", DIGITS / "config.json"], "not a video"),
    ):
        told = vlpack(capsys, "run", package, *wrong, *options, QUESTION)
        assert told.code == 2
        assert message in told.err.replace("\n", " ")
        assert "Traceback" not in told.err


def test_video_settings_of_transformers_5_reach_the_package(checkpoint: Callable[[Tiny], Path], tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint(TINY), tmp_path / "source")
    settings = json.loads((source / "video_preprocessor_config.json").read_text(encoding="utf-8"))
    images = json.loads((source / "preprocessor_config.json").read_text(encoding="utf-8"))
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        (source / name).unlink()
    nested = {"image_processor": images, "video_processor": settings | {"fps": 1.0}}
    (source / "processor_config.json").write_text(json.dumps(nested), encoding="utf-8")
    build(source, tmp_path / "package", precision="fp32", threads=1)
    prompt = Model(tmp_path / "package", threads=1).prompt(QUESTION, videos=[BIKES])
    assert len(prompt.videos[0].frames_indices) == 10


def test_unusable_video_settings(checkpoint: Callable[[Tiny], Path], tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint(TINY), tmp_path / "source")
    settings = json.loads((source / "video_preprocessor_config.json").read_text(encoding="utf-8"))
    for change, message in (({"patch_size": 4}, "patch_size is 4"), ({"resample": 1}, "cannot be used.*resample")):
        (source / "video_preprocessor_config.json").write_text(json.dumps(settings | change), encoding="utf-8")
        builder = PromptBuilder.from_folder(source, image_token_id=IMAGE, video_token_id=VIDEO)
        assert builder(messages([image()])).has_images  # images do not depend on video settings
        with pytest.raises(VlpackError, match=message):
            builder(messages([video(BIKES)]))


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VLMoe", "Qwen3_5"])
def test_other_families(name: str, tmp_path: Path) -> None:
    member = next(member for member in VISION_MEMBERS if member.name == name)
    checkpoint = make_member(tmp_path / "checkpoint", member)
    build(checkpoint, tmp_path / "package", precision="fp32", threads=1)
    loaded = Model(tmp_path / "package", threads=1)
    if name.startswith("Qwen2"):  # their positions of videos are not those of single images
        with pytest.raises(InputError, match=r"Videos of Qwen2-VL and Qwen2\.5-VL are not supported"):
            loaded.generate(QUESTION, videos=[CARPHONE])
        other = PromptBuilder.from_folder(checkpoint, image_token_id=IMAGE, video_token_id=VIDEO)
        with pytest.raises(InputError, match=r"Videos of Qwen2-VL and Qwen2\.5-VL are not supported"):
            loaded.generate(other(messages([video(CARPHONE)])))
        return
    live = member.model.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = loaded.prompt(QUESTION, [image(64, 48)["image"]], [CARPHONE], video_options=VideoOptions(num_frames=4))
    inputs = tensors(prompt)
    out = live.generate(
        **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), do_sample=False, max_new_tokens=12,
        eos_token_id=None,
    )  # fmt: skip
    answer = loaded.generate(prompt, max_tokens=12, sampling=Sampling(temperature=0))
    assert answer.tokens == out[0, prompt.input_ids.shape[1] :].tolist()
