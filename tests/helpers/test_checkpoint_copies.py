"""Permuted copies and copies with planted outliers compute the same function, and have the promised differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from checkpoint_copies import NORM_OUTLIERS, UP_OUTLIERS, Change, permuted, planted, write_copy
from parity import relative

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.numpy").load_file

LAYERS = 3


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=request.param, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # norms of 1 and biases of 0 would hide an error in the order of channels
            parameter.data = torch.rand_like(parameter) + 0.5
    folder = tmp_path_factory.mktemp("qwen2")
    model.save_pretrained(folder)
    return folder


def logits(folder: Path) -> np.ndarray:
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return np.asarray(model.eval()(torch.arange(40)[None]).logits.numpy())


@pytest.mark.parametrize("changes", [[permuted], [planted], [permuted, planted]], ids=["permuted", "planted", "both"])
def test_copies_compute_the_same(checkpoint: Path, changes: Sequence[Change], tmp_path: Path) -> None:
    copy = write_copy(checkpoint, tmp_path / "copy", *changes)
    assert relative(logits(copy), logits(checkpoint)) < 1e-4
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, copy))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == np.float32 for name in after)


def test_no_channel_stays_with_its_neighbours(checkpoint: Path, tmp_path: Path) -> None:
    copy = write_copy(checkpoint, tmp_path / "copy", permuted)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, copy))
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ):
        assert sorted(before[name].ravel()) == sorted(after[name].ravel())
        assert relative(after[name], before[name]) > 0.5


def test_outliers_are_planted(checkpoint: Path, tmp_path: Path) -> None:
    copy = write_copy(checkpoint, tmp_path / "copy", planted)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, copy))
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, count in (
            ("input_layernorm", NORM_OUTLIERS),
            ("post_attention_layernorm", NORM_OUTLIERS),
            ("mlp.up_proj", UP_OUTLIERS),
        ):
            ratio = after[f"{prefix}{name}.weight"] / before[f"{prefix}{name}.weight"]
            larger = ratio.reshape(ratio.shape[0], -1).max(axis=1)
            assert (larger > 9.9).sum() == count
            assert larger.max() < 60.1
    again = write_copy(checkpoint, tmp_path / "again", planted)
    assert (again / "model.safetensors").read_bytes() == (copy / "model.safetensors").read_bytes()
