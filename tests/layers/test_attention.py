"""Attention in ONNX's standard operators, which packages use where onnxruntime lacks its fused operator: fp32 on CUDA.

Here the packages run on the CPU, where they must compute the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest

from parity import make_inputs, relative
from runtime.test_parity_runtime import QUESTION, make_images
from samples import edit_json
from tiny import Tiny
from vlpack.quantize.policy import OFFERED
from vlpack.runtime.model import Model

CUDA = {"precision": "fp32", "execution_provider": "cuda"}
EXACT = 1e-5
TOKENS = 32
TINY = Tiny(seed=1)
TINIES = {
    "two to a group": TINY,
    "all in one group": TINY.but(kv_heads=1),
    "no groups": TINY.but(kv_heads=4),
    "one head, v4, untied, bias": TINY.but(heads=1, kv_heads=1, style="v4", tied=False, attention_bias=True),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", TINIES)
def test_prefill_more_and_single_tokens(name, rows, package, reference):
    tiny = TINIES[name]
    inputs = make_inputs(tiny, *[((1, 4, 6),), ((1, 6, 4),)][:rows], text=20)
    expected, runs = reference(tiny)(inputs), package(tiny, **CUDA)
    whole = runs.embed(inputs.ids, runs.features(inputs, packed=True))
    length = inputs.ids.shape[1]
    logits, past, start = [], None, 0
    for end in (15, 24, 25, 26, length):
        tokens = {key: value[:, start:end] for key, value in whole.items()}
        out, past = runs.decode(tokens, expected.positions[:, :, start:end], past)
        logits.append(out)
        start = end
    assert relative(np.concatenate(logits, axis=1), expected.logits) <= EXACT
    assert past is not None
    assert next(iter(past.values())).shape == (rows, tiny.kv_heads, length, tiny.head_dim)


@pytest.mark.parametrize("pads", [1, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_attended_to(side, pads, package, reference):
    inputs = make_inputs(TINY, (), text=12)
    expected, runs = reference(TINY)(inputs), package(TINY, part="text", **CUDA)
    session = runs.sessions["decoder"]
    edges = (pads, 0) if side == "left" else (0, pads)
    arrays = {
        "input_ids": np.pad(inputs.ids, ((0, 0), edges), constant_values=9),
        "attention_mask": np.pad(np.ones_like(inputs.ids), ((0, 0), edges)),
        "position_ids": np.pad(expected.positions, ((0, 0), (0, 0), edges)),
    }
    cache = np.zeros((1, TINY.kv_heads, 0, TINY.head_dim), np.float32)
    past = {port.name: cache for port in session.get_inputs() if port.name.startswith("past")}
    logits = runs.run("decoder", **arrays, **past)["logits"]
    assert np.isfinite(logits).all()
    kept = logits[:, pads:] if side == "left" else logits[:, :-pads]
    assert relative(kept, expected.logits) <= EXACT


@pytest.mark.parametrize("images", [[], [(96, 64)], [(96, 64), (32, 80)]], ids=str)
@pytest.mark.parametrize("part", ["all", "text"])
def test_greedy_tokens_in_the_stock_runtime(part, images, built, reference, tmp_path):
    if images and part == "text":
        pytest.skip("the text part has no eyes")
    folder = tmp_path / "package"
    shutil.copytree(built(TINY, part=part, **CUDA), folder)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    assert config["search"]["past_present_share_buffer"] is False
    for name in {"decoder", "vision", "embedding"} & set(config["model"]):
        # only the execution provider in the configuration is changed
        edit_json(folder / "genai_config.json", "model", name, "session_options", "provider_options", value=[])
    arrays = Model(built(TINY), threads=1).prompt(QUESTION, make_images(images)).named_arrays()
    runtime = og.Model(str(folder))
    params = og.GeneratorParams(runtime)
    params.set_search_options(max_length=arrays["input_ids"].shape[1] + TOKENS, do_sample=False)
    generator = og.Generator(runtime, params)
    if images:
        tensors = og.NamedTensors()
        for name, array in arrays.items():
            tensors[name] = array
        generator.set_inputs(tensors)
    else:
        generator.append_tokens(arrays["input_ids"])
    tokens: list[int] = []
    while len(tokens) < TOKENS:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    assert tokens == reference(TINY).generate(arrays, TOKENS)


PAIRS = [(provider, precision) for provider, offered in OFFERED.items() for precision in offered]


@pytest.mark.parametrize("part", ["all", "text"])
@pytest.mark.parametrize(("provider", "precision"), PAIRS)
def test_the_fused_operator_is_used_where_it_has_a_kernel(provider, precision, part, built):
    folder: Path = built(TINY, part=part, precision=precision, execution_provider=provider)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    model = onnx.load(folder / config["model"]["decoder"]["filename"], load_external_data=False)
    types = {port.name: port.type.tensor_type.elem_type for port in model.graph.output}
    fused = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    if provider == "cuda":  # CUDA's fused attention has only fp16 and bf16
        assert {types[node.output[1]] for node in fused} <= {onnx.TensorProto.FLOAT16}
    assert len(fused) == (0 if (provider, precision) == ("cuda", "fp32") else TINY.layers)
    # only the fused operator can share one buffer between past and present
    assert config["search"]["past_present_share_buffer"] is bool(fused)
