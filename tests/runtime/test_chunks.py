"""Chunked prefill gives the same logits and tokens, even if a chunk ends within an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from family import Member, make_member
from parity import relative
from samples import DIGITS, IMAGES, READ
from vlpack.builder import build
from vlpack.export.genai_config import CHUNK_SIZE
from vlpack.runtime.genai_model import make_generator
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling
from vlpack.sample_images import picture

pytest.importorskip("torch")
pytest.importorskip("transformers")

LONG = "The river rose in the night, and by morning the lower fields stood under water. " * 40
VISION = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 64}
MEMBERS = {
    "Qwen3": Member("chunks qwen3", "Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "Qwen2.5-VL": Member(
        "chunks qwen2.5",
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        VISION | {"fullatt_block_indexes": [1]},
    ),
}


def logits_and_tokens(model: Model, prompt: Any, chunk_size: int) -> tuple[np.ndarray, list[int]]:
    length = prompt.input_ids.shape[1] + 6
    options = {"max_length": length, "min_length": length, "do_sample": False, "chunk_size": chunk_size}
    generator = make_generator(model._load_runtime(), prompt.named_arrays(), options)
    generator.generate_next_token()
    logits = generator.get_logits().reshape(-1).copy()
    for _ in range(5):
        generator.generate_next_token()
    return logits, [int(token) for token in generator.get_sequence(0)[-6:]]


def check(model: Model, prompt: Any) -> None:
    length = prompt.input_ids.shape[1]
    wanted, tokens = logits_and_tokens(model, prompt, length)
    assert np.abs(wanted).max() > 0.1
    for chunk_size in (5, 16, length - 1):
        logits, others = logits_and_tokens(model, prompt, chunk_size)
        assert relative(logits, wanted) < 1e-5
        assert others == tokens


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("images", [(), ("00.png",), ("01.png", "02.png")])
def test_digits(precision: str, images: tuple[str, ...], tmp_path: Path) -> None:
    """Image features and DeepStack features are cut at the same places as the tokens."""
    build(DIGITS, tmp_path / "package", precision=precision)
    model = Model(tmp_path / "package", threads=1, vision_provider="runtime")
    check(model, model.prompt(READ, [IMAGES / image for image in images]))


def test_the_text_part(tmp_path: Path) -> None:
    build(DIGITS, tmp_path / "package", part="text", precision="fp32")
    model = Model(tmp_path / "package", threads=1)
    check(model, model.prompt("Count to ten, and then back again."))


@pytest.mark.parametrize("name", MEMBERS)
def test_other_families(name: str, tmp_path: Path) -> None:
    member = MEMBERS[name]
    build(make_member(tmp_path / "checkpoint", member), tmp_path / "package", precision="fp32")
    model = Model(tmp_path / "package", threads=1, vision_provider="runtime" if member.vision else None)
    images = [picture(64, 48, 1), picture(40, 72, 2)] if member.vision else []
    check(model, model.prompt("What is this?", images))


def test_the_chunk_size_of_packages(tmp_path: Path) -> None:
    """A prompt of several chunks gets the same answer as with a single chunk."""
    build(DIGITS, tmp_path / "package", precision="fp32")
    config = json.loads((tmp_path / "package" / "genai_config.json").read_text(encoding="utf-8"))
    assert config["search"]["chunk_size"] == CHUNK_SIZE
    model = Model(tmp_path / "package", threads=1)
    prompt = model.prompt(LONG)
    assert prompt.input_ids.shape[1] > 2 * CHUNK_SIZE
    answer = model.generate(prompt, max_tokens=6, sampling=Sampling(temperature=0)).tokens
    _, tokens = logits_and_tokens(model, prompt, prompt.input_ids.shape[1])
    assert answer == tokens[: len(answer)]
    build(DIGITS, tmp_path / "other", execution_provider="cuda")
    config = json.loads((tmp_path / "other" / "genai_config.json").read_text(encoding="utf-8"))
    assert "chunk_size" not in config["search"]
