"""Packages in the stock runtime, from question to answer: the same greedy tokens as transformers' generate."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnxruntime_genai as og
import pytest

from tiny import FIRST_SPECIAL, Tiny
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling

TOKENS = 40
TINY = Tiny(seed=1)

SIZES: dict[str, list[tuple[int, int]]] = {
    "text": [],
    "one image": [(96, 64)],
    "two equal": [(64, 48), (64, 48)],
    "two unequal": [(96, 64), (32, 80)],
    "two turned": [(96, 64), (64, 96)],
    "three": [(64, 64), (64, 64), (32, 80)],
    "one row": [(512, 16)],
    "one column": [(16, 512)],
    "one token": [(16, 16)],
    "300 tokens": [(320, 240)],
    "resized": [(101, 67)],
}
"""Width and height in pixels of a prompt's images; a token covers 16 × 16."""

TINIES = {
    "v5": TINY,
    "v4": TINY.but(style="v4", seed=2),
    "untied": TINY.but(tied=False),
    "bias": TINY.but(attention_bias=True, style="v4"),
    "no deepstack": TINY.but(deepstack=()),
    "one level": TINY.but(deepstack=(1,)),
    "levels out of order": TINY.but(deepstack=(2, 0)),
    "head_dim 128": TINY.but(head_dim=128, heads=2, kv_heads=1, mrope_section=(24, 20, 20)),
    "patch 16, bf16, sharded": TINY.but(patch_size=16, dtype="bfloat16", sharded=True),
}

QUESTION = "What is in these images, and where?"


@pytest.fixture(scope="session")
def model(built):
    """A package that runs entirely in onnxruntime-genai, as it does from other languages."""
    made: dict[object, Model] = {}

    def get(tiny: Tiny, **options: object) -> Model:
        key = (tiny, *sorted(options.items()))
        if key not in made:
            vision = None if options.get("part") == "text" else "runtime"
            made[key] = Model(built(tiny, **options), threads=1, vision_provider=vision)
        return made[key]

    return get


def make_images(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    random = np.random.default_rng(len(sizes))
    return [random.integers(0, 256, (height, width, 3), np.uint8) for width, height in sizes]


def check(model: Model, reference, images: list[np.ndarray]) -> None:
    answer = model.generate(QUESTION, images, max_tokens=TOKENS, sampling=Sampling(temperature=0))
    assert answer.finish_reason == "length"
    assert len(answer.tokens) == TOKENS
    wanted = reference.generate(model.prompt(QUESTION, images).named_arrays(), TOKENS)
    # a fault would change this answer
    assert len(set(wanted)) > TOKENS // 4
    assert max(wanted) < FIRST_SPECIAL
    assert answer.tokens == wanted


@pytest.mark.parametrize("images", SIZES)
def test_images(images, model, reference):
    check(model(TINY), reference(TINY), make_images(SIZES[images]))


@pytest.mark.parametrize("images", SIZES)
def test_images_encoded_in_a_separate_session(images, built, reference):
    check(Model(built(TINY), threads=1), reference(TINY), make_images(SIZES[images]))


@pytest.mark.parametrize("images", ["text", "one image", "two unequal"])
@pytest.mark.parametrize("name", TINIES)
def test_checkpoints(name, images, model, reference):
    check(model(TINIES[name]), reference(TINIES[name]), make_images(SIZES[images]))


@pytest.mark.parametrize("part", ["all", "text"])
def test_config_gives_the_decoder_s_sizes(part, built):
    """onnxruntime-genai 0.18 reads most of these sizes from the graph, so running it would not reveal a wrong one."""
    tiny = TINIES["head_dim 128"]
    folder = built(tiny, part=part)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    wanted = {
        "hidden_size": tiny.hidden_size,
        "head_size": tiny.head_dim,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "num_hidden_layers": tiny.layers,
    }
    assert {name: config["decoder"][name] for name in wanted} == wanted
    assert (config["vocab_size"], config["context_length"]) == (tiny.vocabulary, 4096)


@pytest.mark.parametrize("name", ["v5", "v4", "bias"])
def test_text_part(name, model, reference):
    text = model(TINIES[name], part="text")
    assert text.config["model"]["type"] == "qwen3_vl_text"
    check(text, reference(TINIES[name]), [])


def test_conversation_with_images_in_two_turns(model, reference):
    images = make_images([(96, 64), (32, 80)])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "This one"}, {"type": "image"}]},
    ]
    answer = model(TINY).generate(messages, images, max_tokens=TOKENS, sampling=Sampling(temperature=0))
    assert answer.tokens == reference(TINY).generate(model(TINY).prompt(messages, images).named_arrays(), TOKENS)


def test_answers_do_not_depend_on_earlier_ones(model):
    one, two = make_images([(96, 64), (32, 80)])

    def tokens(images):
        return model(TINY).generate(QUESTION, images, max_tokens=8, sampling=Sampling(temperature=0)).tokens

    first = tokens([one])
    assert tokens([two]) != first
    assert tokens([]) != first
    assert tokens([one]) == first


@pytest.mark.parametrize("images", ["text", "one image", "two equal", "two unequal"])
@pytest.mark.parametrize("share", [True, False])
def test_lower_level_with_and_without_shared_buffers(share, images, built, reference, model, tmp_path):
    """The package works with onnxruntime-genai alone, as for users without vlpack."""
    folder = tmp_path / "package"
    shutil.copytree(built(TINY), folder)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    config["search"]["past_present_share_buffer"] = share
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    arrays = model(TINY).prompt(QUESTION, make_images(SIZES[images])).named_arrays()
    runtime = og.Model(str(folder))
    params = og.GeneratorParams(runtime)
    params.set_search_options(max_length=arrays["input_ids"].shape[1] + TOKENS, do_sample=False)
    generator = og.Generator(runtime, params)
    if len(arrays) == 1:
        generator.append_tokens(arrays["input_ids"])
    else:
        tensors = og.NamedTensors()
        for name, array in arrays.items():
            tensors[name] = array
        generator.set_inputs(tensors)
    tokens: list[int] = []
    while len(tokens) < TOKENS:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    assert tokens == reference(TINY).generate(arrays, TOKENS)


def test_logits_of_the_prompt(model, reference):
    """All logits agree, not only the largest: the runtime's positions and its passing of features change nothing."""
    import torch

    for sizes in ("text", "two equal", "two unequal", "300 tokens"):
        prompt = model(TINY).prompt(QUESTION, make_images(SIZES[sizes]))
        params = og.GeneratorParams(model(TINY)._load_runtime())
        generator = og.Generator(model(TINY)._load_runtime(), params)
        tensors = og.NamedTensors()
        arrays = prompt.named_arrays()
        if prompt.has_images:
            for name, array in arrays.items():
                tensors[name] = array
            generator.set_inputs(tensors)
        else:
            generator.append_tokens(prompt.input_ids)
        logits = generator.get_logits()[0, -1]
        live = reference(TINY).model
        ids = torch.tensor(arrays["input_ids"]).long()
        images = {name: torch.tensor(arrays[name]) for name in ("pixel_values", "image_grid_thw") if name in arrays}
        with torch.no_grad():
            live.model.rope_deltas = None
            wanted = live(input_ids=ids, mm_token_type_ids=(ids == 2060).int(), **images).logits[0, -1].numpy()
        assert np.linalg.norm(logits - wanted) <= 1e-5 * np.linalg.norm(wanted), sizes
