"""Graphs with planted faults that look plausible: the comparison of the parity tests must detect each of them.

The first is the most tempting shortcut: "Qwen3-VL is Qwen2.5-VL with other sections". The numbers in config.json are
the same, but the rotary frequencies belong to other axes, and a comparison on text alone does not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import vlpack.architectures.qwen3_vl as family
from parity import Inputs, Package, make_inputs, relative
from tiny import Tiny
from vlpack.builder import build
from vlpack.layers.attention import Heads
from vlpack.layers.deepstack import SideChannel
from vlpack.layers.rope import chunked_axes
from vlpack.layers.vision import PatchPositions
from vlpack.options import parse_extra_options
from vlpack.preprocess import ImageProcessor

TINY = Tiny(head_dim=128, mrope_section=(24, 20, 20), peak=4.0)
EXACT = 1e-5
"""The tolerance of the parity tests."""

IMAGES = make_inputs(TINY, ((1, 8, 16), (1, 12, 6)))
TEXT = make_inputs(TINY, (), text=24)


@pytest.fixture
def wrong(checkpoint: Callable[..., Any], reference: Callable[..., Any], tmp_path):
    """Builds with the code as currently patched; returns the errors of merged features, levels and logits."""

    def errors(inputs: Inputs = IMAGES, tiny: Tiny = TINY) -> dict[str, float]:
        build(checkpoint(tiny), tmp_path / "wrong", precision="fp32", threads=1, force=True,
              extra_options=parse_extra_options(["prune_lm_head=false"]))  # fmt: skip
        runs, expected = Package(tmp_path / "wrong"), reference(tiny)(inputs)
        features = runs.features(inputs)
        found = {}
        if len(inputs.grid):
            parts = np.split(features, 1 + len(tiny.deepstack), axis=-1)
            wanted = {"merged": expected.merged} | {f"level {i}": level for i, level in enumerate(expected.levels)}
            found = {name: relative(part, level) for part, (name, level) in zip(parts, wanted.items(), strict=True)}
        logits, _ = runs.decode(runs.embed(inputs.ids, features), expected.positions)
        found["logits"] = relative(logits, expected.logits)
        print({name: f"{error:.2g}" for name, error in found.items()})
        return found

    return errors


def test_the_correct_graph_passes(wrong):
    assert max(wrong().values()) <= EXACT
    assert max(wrong(TEXT).values()) <= EXACT


def test_chunked_rotary_axes(wrong, monkeypatch):
    monkeypatch.setattr(family, "interleaved_axes", chunked_axes)
    errors = wrong()
    assert errors["merged"] <= EXACT
    assert errors["logits"] > 0.2
    # text has the same position on all axes, so the fault is invisible there
    assert wrong(TEXT)["logits"] <= EXACT


def test_one_dimensional_positions(wrong, monkeypatch):
    monkeypatch.setattr(family, "interleaved_axes", lambda sections: np.zeros(sum(sections), np.int64))
    assert wrong()["logits"] > 0.2
    assert wrong(TEXT)["logits"] <= EXACT


def test_deepstack_dropped(wrong, monkeypatch):
    monkeypatch.setattr(SideChannel, "levels_of", lambda self, op, channel: [])
    errors = wrong()
    assert errors["level 2"] <= EXACT
    assert errors["logits"] > 0.2
    assert wrong(TEXT)["logits"] <= EXACT


def test_deepstack_levels_permuted_in_the_decoder(wrong, monkeypatch):
    right = SideChannel.levels_of
    monkeypatch.setattr(SideChannel, "levels_of", lambda self, op, channel: right(self, op, channel)[::-1])
    errors = wrong()
    assert errors["level 0"] <= EXACT
    assert errors["logits"] > 0.2


def test_deepstack_levels_permuted_in_the_encoder(wrong, monkeypatch):
    right = SideChannel.join
    monkeypatch.setattr(SideChannel, "join", lambda self, op, merged, levels: right(self, op, merged, levels[::-1]))
    errors = wrong()
    assert errors["level 0"] > 1
    assert errors["level 1"] <= EXACT
    assert errors["logits"] > 0.2


def test_deepstack_one_layer_late(wrong, monkeypatch):
    """DeepStack's features are added to a layer's input instead of its output."""
    right = SideChannel.levels_of

    def late(self: SideChannel, op: Any, channel: ir.Value) -> list[ir.Value]:
        levels = right(self, op, channel)
        return [op.Mul(levels[0], 0.0), *levels]

    monkeypatch.setattr(SideChannel, "levels_of", late)
    assert wrong()["logits"] > 0.2


def test_deepstack_mergers_by_depth_instead_of_by_place(wrong, monkeypatch):
    """The mergers are in the order of depth instead of the list's order, which only unsorted indexes reveal."""
    tiny = TINY.but(deepstack=(2, 0))
    assert max(wrong(tiny=tiny).values()) <= EXACT
    right = family.deepstack_indexes
    monkeypatch.setattr(family, "deepstack_indexes", lambda config: sorted(right(config)))
    errors = wrong(tiny=tiny)
    assert errors["merged"] <= EXACT
    assert errors["level 0"] > 1


def test_the_other_kind_of_gelu(wrong, monkeypatch):
    """The graph has the other kind of GELU; both differ by at most a thousandth, which is far above the tolerance."""
    for act, other in (("gelu_pytorch_tanh", "gelu"), ("gelu", "gelu_pytorch_tanh")):
        tiny = TINY.but(vision_act=act)
        with monkeypatch.context() as patch:
            right = family.VisionMLP
            patch.setattr(family, "VisionMLP", lambda *a, right=right, other=other: right(*a[:-1], other))
            errors = wrong(tiny=tiny)
        assert min(errors.values()) > 5 * EXACT


def test_the_other_kind_of_gelu_in_the_mergers(wrong, monkeypatch):
    right = family.activation
    monkeypatch.setattr(family, "activation", lambda op, x, name: right(op, x, "gelu_pytorch_tanh"))
    errors = wrong()
    assert min(errors.values()) > 10 * EXACT


@contextmanager
def transposed(monkeypatch: pytest.MonkeyPatch, table: bool, angles: bool) -> Iterator[None]:
    """Rows and columns are exchanged in the position table, in the rotary angles, or in both."""
    places, rope = family.patch_positions, family.axial_rope

    def turn(p: PatchPositions) -> PatchPositions:
        return PatchPositions(p.column, p.row, p.width, p.height)

    with monkeypatch.context() as patch:
        if table:
            patch.setattr(family, "patch_positions", lambda *a: turn(places(*a)))
        if table != angles:
            patch.setattr(family, "axial_rope", lambda op, p, *a: rope(op, turn(p), *a))
        yield


@pytest.mark.parametrize(("table", "angles"), [(True, False), (False, True), (True, True)])
def test_rows_and_columns_of_the_encoder_exchanged(table, angles, wrong, monkeypatch):
    with transposed(monkeypatch, table, angles):
        errors = wrong()
    assert min(errors.values()) > 0.1


def test_positions_not_interpolated(wrong, monkeypatch):
    """The graph takes the nearest entry of the position table instead of interpolating between four."""
    right = family.bilinear_taps

    def nearest(op: Any, *arguments: Any) -> list[tuple[ir.Value, ir.Value]]:
        return [(index, op.Round(weight)) for index, weight in right(op, *arguments)]

    monkeypatch.setattr(family, "bilinear_taps", nearest)
    assert min(wrong().values()) > 0.1


def test_patches_in_raster_order(wrong, monkeypatch):
    """Patches are taken in raster order instead of merge-block order."""
    right = family.patch_positions
    monkeypatch.setattr(family, "patch_positions", lambda op, grid, merge: right(op, grid, 1))
    assert min(wrong().values()) > 0.1


def test_query_norm_forgotten(wrong, monkeypatch):
    right = Heads._norm_rotate

    def forgetful(self: Heads, op: Any, x: ir.Value, count: int, norm: ir.Value | None, rope: Any) -> ir.Value:
        return right(self, op, x, count, None if count == self.queries else norm, rope)

    monkeypatch.setattr(Heads, "_norm_rotate", forgetful)
    # the graph then has no place for the norm's weight, and the build must not fail because of that
    assert wrong(TEXT)["logits"] > 0.1


def test_another_epsilon_in_the_encoder(wrong, monkeypatch):
    """The graph has LayerNorm's default epsilon instead of Qwen3-VL's, which the config does not contain."""
    tiny = TINY.but(quiet=True)
    assert max(wrong(tiny=tiny).values()) <= EXACT
    monkeypatch.setattr(family, "LAYER_NORM_EPS", 1e-5)
    assert min(wrong(tiny=tiny).values()) > 10 * EXACT


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # CLIP's and Qwen2.5-VL's
        ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
        ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5)),
    ],
)
def test_wrong_mean_and_std(mean, std, checkpoint, package, reference):
    from dataclasses import replace

    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    right = ImageProcessor.from_folder(checkpoint(TINY))
    expected = None
    for processor in (right, replace(right, image_mean=mean, image_std=std)):
        processed = processor([image])
        features = package(TINY).run(
            "vision", pixel_values=processed.pixel_values, image_grid_thw=processed.image_grid_thw
        )["image_features"]
        if expected is None:
            expected = features
        else:
            assert relative(features, expected) > 0.1
