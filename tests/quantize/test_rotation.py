"""Balance and rotation: the matrices and scales, and that the result of no architecture changes.

The checkpoints have planted outliers, so that balance has an effect; at fp32 a package is then as close to live
transformers as one whose channels are unchanged.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

import vlpack
from architectures.test_embedding_reranker import JUDGE, RETRIEVE, TEXTS, WIDE, parts
from architectures.test_family import IDS, TEXT_MEMBERS, VISION_MEMBERS
from architectures.test_parity_parts import TINIES, TINY, check
from family import Member, make_member
from kept import Kept
from outliers import permute, plant, plant_values
from parity import Package, Reference, make_inputs, nothing_yet, relative
from retrieval import BIASED, Recipe, make_text, make_vision
from tiny import IMAGE, Tiny, make_checkpoint
from vlpack.options import parse_extra_options
from vlpack.quantize.policy import LARGEST_ROTATION
from vlpack.quantize.rotate import (
    LARGEST,
    equal_columns,
    even_sizes,
    hadamard,
    powers_of_two,
    rotate,
    rotation_matrix,
    rotation_size,
)
from vlpack.quantize.transforms import Transform
from vlpack.verification.cases import built_in
from vlpack.verification.run import verify

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXACT = 1e-5
CHANGED = ("balance=true", "rotation=true")
ORDERS = [order for order in range(1, 129) if rotation_size(order, order) == order]


# --- matrices ----------------------------------------------------------------------------------------


def test_orders_of_hadamard_matrices() -> None:
    """There is a matrix for powers of two and all head sizes, but not for multiples of four without a construction."""
    assert {1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 60, 64, 68, 72, 80, 84, 96, 104, 128} <= set(ORDERS)
    assert not {3, 5, 6, 10, 28 + 2, 36, 52, 92, 100, 116} & set(ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_matrices(order: int) -> None:
    matrix = hadamard(order)
    assert set(np.unique(matrix)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))
    assert not matrix.flags.writeable
    rotation = rotation_matrix(order)
    assert rotation.dtype == np.float32
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(order), atol=1e-6)


@pytest.mark.parametrize("order", [-4, 0, 3, 7, 36, 92])
def test_orders_without_a_matrix(order: int) -> None:
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order} is known"):
        hadamard(order)


@given(channels=st.integers(1, 20000), largest=st.integers(1, 300))
def test_rotation_sizes(channels: int, largest: int) -> None:
    size = rotation_size(channels, largest)
    assert 1 <= size <= min(largest, channels)
    assert channels % size == 0
    assert len(hadamard(size)) == size
    # every power of two has a matrix, so no block is smaller than the largest power of two that divides the channels
    power = 1
    while channels % (2 * power) == 0 and 2 * power <= largest:
        power *= 2
    assert size >= power


MATRICES = st.tuples(st.integers(1, 9), st.integers(1, 6), st.sampled_from(ORDERS), st.integers(0, 2**32 - 1))


@settings(deadline=None)
@given(MATRICES)
def test_rotating_back(shape: tuple[int, int, int, int]) -> None:
    rows, blocks, size, seed = shape
    matrix = np.random.default_rng(seed).normal(size=(rows, blocks * size)).astype(np.float32)
    turned = rotate(matrix, size)
    assert turned.dtype == np.float32
    np.testing.assert_allclose(rotate(turned, size, back=True), matrix, atol=1e-5)
    # block by block, as in the graph
    whole = np.kron(np.eye(blocks), rotation_matrix(size))
    np.testing.assert_allclose(turned, matrix @ whole, atol=1e-5)
    # lengths do not change
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(matrix, axis=1), rtol=1e-5)


def test_an_outlier_is_spread() -> None:
    row = np.zeros((1, 128), np.float32)
    row[0, 5] = 64
    turned = rotate(row, 64)
    np.testing.assert_allclose(np.abs(turned[0, :64]), 8, rtol=1e-6)
    assert not turned[0, 64:].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_float(dtype: str) -> None:
    import ml_dtypes

    kind = getattr(ml_dtypes, dtype, dtype)
    matrix = np.random.default_rng(0).normal(size=(3, 24)).astype(kind)
    np.testing.assert_array_equal(rotate(matrix, 24), rotate(matrix.astype(np.float32), 24))
    np.testing.assert_array_equal(rotate(matrix, 1), matrix.astype(np.float32))


# --- scales ------------------------------------------------------------------------------------------


POSITIVE = st.floats(2.0**-20, 2.0**20)


@given(st.lists(POSITIVE, min_size=1, max_size=50))
def test_powers_of_two(values: list[float]) -> None:
    scales = powers_of_two(np.array(values))
    assert scales.dtype == np.float32
    mantissas, _ = np.frexp(scales)
    assert (mantissas == 0.5).all()
    assert ((scales <= LARGEST) & (scales >= 1 / LARGEST)).all()
    within = (np.array(values) < LARGEST) & (np.array(values) > 1 / LARGEST)
    ratio = scales[within] / np.array(values)[within]
    assert ((ratio < 1.42) & (ratio > 0.7)).all()


@given(st.lists(POSITIVE, min_size=1, max_size=50))
def test_columns_become_equal(values: list[float]) -> None:
    """After division by the scales, columns differ from the median only by the rounding to powers of two."""
    norms = np.array(values)
    scales = equal_columns(norms)
    left = norms / scales / np.median(norms)
    reached = (norms / np.median(norms) < LARGEST) & (norms / np.median(norms) > 1e-3)
    assert ((left[reached] < 1.42) & (left[reached] > 0.7)).all()


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=50), st.floats(1, 20))
def test_even_sizes_move_ratios_towards_the_median(pairs: list[tuple[float, float]], tolerance: float) -> None:
    """Ratios of readers to activations within the tolerance stay; others move towards it, but never past the median."""
    norms, sizes = np.array(pairs).T
    scales = even_sizes(norms, sizes, tolerance)
    assert (np.frexp(scales)[0] == 0.5).all()
    relative_norms, relative_sizes = norms / np.median(norms), sizes / np.median(sizes)
    plausible = (relative_norms > 2e-6) & (relative_sizes > 2e-6)
    if not plausible.all():
        return
    ratio = relative_norms / relative_sizes
    ratio /= np.median(ratio)
    inside = (ratio <= tolerance) & (ratio >= 1 / tolerance)
    assert (scales[inside] == 1).all()
    # readers are divided and activations multiplied by a scale, so the ratio is divided by its square
    after = ratio / scales.astype(np.float64) ** 2
    reached = (scales < LARGEST) & (scales > 1 / LARGEST)
    top = (ratio > tolerance) & reached
    bottom = (ratio < 1 / tolerance) & reached
    assert (after[top] <= 2.01 * tolerance).all()
    assert (after[top] >= tolerance / 2.01).all()
    assert (after[bottom] >= 1 / tolerance / 2.01).all()
    assert (after[bottom] <= 2.01 / tolerance).all()


@pytest.mark.parametrize("values", [[0, 0, 0], [0, 1, 4], [1e-30, 1, 1]])
def test_channels_that_are_not_used(values: list[float]) -> None:
    """A channel of zeros counts as one of median size."""
    norms = np.array(values, np.float64)
    for scales in (equal_columns(norms), even_sizes(norms, np.ones(3), 8), even_sizes(np.ones(3), norms, 8)):
        assert np.isfinite(scales).all()
        assert scales[0] == 1


# --- transforms --------------------------------------------------------------------------------------


ROTATED = st.tuples(st.sampled_from([1, 4, 12]), st.integers(0, 7), st.integers(1, 3), st.integers(0, 9))


@settings(deadline=None)
@given(ROTATED, st.data())
def test_any_rows_of_a_rotated_weight(shape: tuple[int, int, int, int], data: st.DataObject) -> None:
    """A slab that cuts a block of rows rotated together equals the same rows of the whole transformed weight."""
    size, first, blocks, rest = shape
    rows = first + size * blocks + rest
    weight = np.random.default_rng(rows).normal(size=(rows, 24)).astype(np.float32)
    transform = Transform(input_rotation=8, output_rotation=size, first=first, count=size * blocks)
    scales: Any = object()  # scales of no channels, because nothing is balanced
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return weight[start:stop]

    reader = transform.reader(read, scales)
    whole = reader(0, rows)
    np.testing.assert_allclose(transform.undo(whole, scales), weight, atol=1e-5)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    np.testing.assert_allclose(reader(start, stop), whole[start:stop], atol=1e-6)
    low, high = asked[-1]
    assert start - size < low <= start
    assert stop <= high < stop + size
    assert high <= rows


# --- architectures: transforms do not change the result -------------------------------------------------------


def planted(folder: Path, size: int | None = None, layers: int = 99) -> Path:
    """Replaces a checkpoint by one with outliers in norms, in rows of up_proj and in the values of heads."""
    path = folder / "model.safetensors"
    tensors = plant(load_file(path), layers)
    if size is not None:
        tensors = plant_values(tensors, size)
    save_file(tensors, path, {"format": "pt"})
    return folder


def initializer(folder: Path, graph: str, name: str) -> np.ndarray:
    model = onnx.load(folder / graph)
    return next(numpy_helper.to_array(x) for x in model.graph.initializer if x.name == name)


SPECIAL = ("pos_embed", "experts.down_proj", ".answers", "conv1d.weight", "in_proj_ba", "shared_expert_gate")


def check_manifest(folder: Path, checkpoint: Path) -> None:
    """Checks that everything was balanced and rotated that can be, and that norms have no outliers left."""
    manifest = json.loads((folder / "vlpack.json").read_text(encoding="utf-8"))
    originals = load_file(checkpoint / "model.safetensors")
    norms = 0
    for graph, part in manifest["parts"].items():
        # the output of attention is multiplied by a gate before o_proj, so no rotation passes between them
        gated = any("linear_attn" in path for path in part["weights"])
        for path, entry in part["weights"].items():
            own = path.rpartition(".")[2]
            matrix = len(entry["shape"]) == 2 and not path.endswith("conv1d.weight")
            if matrix and not path.endswith(SPECIAL):
                size = rotation_size(entry["shape"][1], LARGEST_ROTATION)
                head = own in ("o_proj", "proj") and "attn" in path
                # outputs of attention heads are rotated in the weights, in blocks of the head size
                assert entry.get("rotated", 1) >= (2 if head else size), path
                assert head or entry.get("rotated", 1) == size, path
            readers = ("qkv_proj", "o_proj", "qkv", "linear_fc1", "fc1", "gate_proj", "up_proj", "gate_up_proj")
            if matrix and (own in (*readers, "gate") or path.endswith("merger.mlp.0")):
                assert "columns" in entry["balanced"], path
            if own in ("qkv_proj", "qkv", "up_proj"):
                assert "rows" in entry["balanced"], path
                assert own == "up_proj" or ("rows_rotated" not in entry if gated else entry["rows_rotated"] > 1), path
            if own == "down_proj" and "experts" not in path:
                assert entry["balanced"] == ["columns"], path
            vector = path.removesuffix(".weight").rpartition(".")[2]
            balanced = vector in ("input_layernorm", "post_attention_layernorm", "norm1", "norm2", "ln_q")
            if path.endswith(".weight") and (balanced or (vector == "norm" and "merger" in path)):
                assert entry["balanced"] == ["rows"], path
                stored = initializer(folder, graph, path)
                name = next(n for n in originals if n.endswith(path.replace("model.language_model.", "")[6:]))
                assert np.abs(stored).max() < np.abs(originals[name]).max() / 3, path
                norms += 1
    assert norms


def package_of(checkpoint: Path, folder: Path, **options: Any) -> Package:
    extra = parse_extra_options([*CHANGED, "prune_lm_head=false"])
    vlpack.build(checkpoint, folder, precision="fp32", extra_options=extra, threads=1, **options)
    check_manifest(folder, checkpoint)
    return Package(folder)


SHAPES: dict[str, Tiny] = {
    "as it comes": TINY,
    "untied, bias": TINY.but(tied=False, attention_bias=True),
    "v4, DeepStack 2 0": TINY.but(style="v4", deepstack=(2, 0)),
    "no DeepStack": TINY.but(deepstack=()),
    "one kv head": TINY.but(heads=4, kv_heads=1),
    "as many kv heads": TINY.but(heads=2, kv_heads=2),
    "head_dim 72, vision heads of 72": TINY.but(
        heads=4, kv_heads=2, head_dim=72, mrope_section=(12, 12, 12), vision_size=144
    ),
    "head_dim 80, vision heads of 80": TINY.but(
        heads=2, kv_heads=1, head_dim=80, mrope_section=(16, 12, 12), vision_size=160
    ),
    "odd widths": TINIES["odd widths"],
    "widths that nothing divides": TINY.but(
        hidden_size=84, intermediate_size=75, vision_size=40, vision_heads=5, vision_intermediate_size=51
    ),
    "bf16": TINY.but(dtype="bfloat16", tied=False),
    "merge 1": TINY.but(merge=1),
}


@pytest.fixture(scope="module")
def outlying(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tiny], Path]:
    """Returns the folder of a tiny checkpoint with outliers."""
    made: dict[Tiny, Path] = {}

    def get(tiny: Tiny) -> Path:
        if tiny not in made:
            folder = make_checkpoint(tmp_path_factory.mktemp("outlying") / "tiny", tiny)
            made[tiny] = planted(folder, tiny.head_dim)
        return made[tiny]

    return get


@pytest.mark.parametrize("name", SHAPES)
def test_qwen3_vl(name: str, outlying: Callable[[Tiny], Path], tmp_path: Path) -> None:
    tiny = SHAPES[name]
    checkpoint = outlying(tiny)
    package, live = package_of(checkpoint, tmp_path / "package"), Reference(checkpoint)
    for images in ((), ((1, 4, 6), (1, 8, 2))):
        check(tiny, package, lambda _: live, make_inputs(tiny, images), EXACT)


def test_outliers_are_planted_and_change_nothing(
    outlying: Callable[[Tiny], Path], reference: Callable[[Tiny], Reference]
) -> None:
    tiny = SHAPES["untied, bias"]
    inputs = make_inputs(tiny, ((1, 4, 6),))
    before, after = reference(tiny)(inputs), Reference(outlying(tiny))(inputs)
    assert relative(after.logits, before.logits) < 1e-4
    assert relative(after.merged, before.merged) < 1e-4
    tensors = load_file(outlying(tiny) / "model.safetensors")
    for name in ("layers.0.input_layernorm", "layers.3.post_attention_layernorm"):
        weight = tensors[f"model.language_model.{name}.weight"]
        assert np.sum(np.abs(weight) > 5 * np.median(np.abs(weight))) >= 5


@pytest.mark.parametrize("member", [TEXT_MEMBERS[1], TEXT_MEMBERS[4], TEXT_MEMBERS[9]], **IDS)
def test_permuting_changes_nothing(member: Member, tmp_path: Path) -> None:
    checkpoint = make_member(tmp_path / "checkpoint", member)
    ids = torch.arange(100, 130)[None]
    logits = []
    for _ in range(2):
        live = member.model.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits.append(live(ids).logits.numpy())
        before = load_file(checkpoint / "model.safetensors")
        after = permute(before, seed=3)
        save_file(after, checkpoint / "model.safetensors", {"format": "pt"})
        stayed = [name for name in before if np.array_equal(before[name], after[name])]
        heads = ("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias")
        assert all(name.endswith(heads) for name in stayed)
    assert relative(logits[1], logits[0]) < EXACT


def head_size(checkpoint: Path) -> int:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


@pytest.mark.parametrize("member", TEXT_MEMBERS + VISION_MEMBERS, **IDS)
def test_families(member: Member, tmp_path: Path) -> None:
    checkpoint = make_member(tmp_path / "checkpoint", member)
    planted(checkpoint, head_size(checkpoint))
    live, loading = member.model.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), f"the reference is not the checkpoint: {loading}"
    live.eval()
    package = package_of(checkpoint, tmp_path / "package")
    layouts: list[tuple[Any, ...]] = [((),)]
    if member.vision is not None:
        # several windows, and edges that do not fill one
        layouts += [(((1, 10, 22), (1, 4, 6)),)]
    for rows in layouts:
        inputs = make_inputs(Tiny(), *rows, text=20)
        ids = torch.tensor(inputs.ids)
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
        with torch.no_grad():
            if len(inputs.grid):
                pixels, grid = torch.tensor(inputs.pixels), torch.tensor(inputs.grid)
                kinds = (ids == IMAGE).int()
                seen = live.model.visual(pixels, grid_thw=grid)
                levels = getattr(seen, "deepstack_features", None) or []
                features = [seen.pooler_output.numpy(), *(level.numpy() for level in levels)]
                got = np.split(package.features(inputs), len(features), axis=-1)
                assert max(map(relative, got, features)) < EXACT
                positions, _ = live.model.get_rope_index(ids, kinds, image_grid_thw=grid)
                arguments |= {"pixel_values": pixels, "image_grid_thw": grid}
                if levels:
                    arguments["mm_token_type_ids"] = kinds
            if member.vision is not None:
                arguments["position_ids"] = positions
            wanted = live(**arguments).logits.numpy()
        if member.vision is not None:
            logits = package.logits(inputs, positions.numpy())
        else:
            ports = [p for p in package.sessions["decoder"].get_inputs() if p.name.startswith("past")]
            past = {p.name: nothing_yet(p, 1) for p in ports}
            given = {"input_ids": inputs.ids, "attention_mask": np.ones_like(inputs.ids)}
            axes = next(p.shape[:-2] for p in package.sessions["decoder"].get_inputs() if p.name == "position_ids")
            places = np.ascontiguousarray(np.broadcast_to(np.arange(ids.shape[1]), (*axes, 1, ids.shape[1])))
            logits = package.run("decoder", **given, position_ids=places, **past)["logits"]
        assert relative(logits, wanted) < EXACT


RETRIEVERS: dict[str, Callable[[Path], Path]] = {
    "text": make_text,
    "biased": lambda folder: make_text(folder, BIASED),
    "vision": make_vision,
    "vision untied": lambda folder: make_vision(folder, seed=5, tied=False, deepstack=(2, 0)),
}


@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize("name", RETRIEVERS)
def test_retrieval(name: str, task: str, tmp_path: Path) -> None:
    checkpoint = RETRIEVERS[name](tmp_path / "checkpoint")
    planted(checkpoint, head_size(checkpoint))
    extra = parse_extra_options(CHANGED)
    vlpack.build(checkpoint, tmp_path / "package", task=task, precision="fp32", extra_options=extra, threads=1)
    check_manifest(tmp_path / "package", checkpoint)
    model, recipe = vlpack.load(tmp_path / "package", threads=1), Recipe(checkpoint)
    sees = name.startswith("vision")
    if task == "embedding":
        if sees:
            wanted = [recipe.seen("Represent the user's input.", parts(*one)) for one in ((WIDE, "x"), ("y",))]
            got = model.embed([{"image": WIDE, "text": "x"}, "y"])
        else:
            wanted, got = [recipe.text(text) for text in TEXTS], model.embed(TEXTS)
        assert relative(got, [recipe.embedding(one) for one in wanted]) < EXACT
        return
    yes, no = recipe.rows()
    if sees:
        start = f"<Instruct>: {RETRIEVE}", "<Query>:", "a query", "\n<Document>:"
        hidden = recipe.seen(JUDGE, parts(*start, WIDE))
        got = model.score("a query", [{"image": WIDE}])
    else:
        prompt = (
            f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n<Instruct>: Which is true?\n"
            f"<Query>: What is it?\n<Document>: {TEXTS[0]}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        hidden = recipe.hidden(recipe.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        got = model.score("What is it?", TEXTS[:1], instruction="Which is true?")
    # a score is a difference of two logits, so its error is compared with the size of the logits
    logits = np.array([hidden @ yes, hidden @ no], np.float64)
    apart = np.log(got[0] / (1 - got[0])) - (logits[0] - logits[1])
    assert abs(apart) < EXACT * np.linalg.norm(logits)


# --- packages with balance and rotation ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixed", [{}, {"mixed_layers": "int8"}, {"last_matmul": "int4"}], ids=["int4", "int8", "head in 4 bits"]
)
def test_quantized_packages_are_exact_with_their_dequantized_weights(
    mixed: dict[str, str], outlying: Callable[[Tiny], Path], tmp_path: Path
) -> None:
    """With outliers, the scales of 4-bit weights have an effect, too. Activations are fp32, which excludes int8."""
    tiny = SHAPES["untied, bias"]
    extra = vlpack.ExtraOptions(accuracy_level=1, matmul_mixed_precision=mixed or None, prune_lm_head=False)
    checkpoint = Path(shutil.copytree(outlying(tiny), tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    scales = np.where(np.arange(tiny.hidden_size) % 16, 1, 64).astype(np.float32)  # of the channels that the head reads
    tensors["model.language_model.norm.weight"] *= scales
    tensors["lm_head.weight"] /= scales
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    vlpack.build(checkpoint, tmp_path / "package", precision="int4", vision_precision="int4", extra_options=extra)
    kept, live = Kept(checkpoint, "int4", vision="int4", mixed=mixed), Reference(checkpoint)
    candidates = kept.weights.get("lm_head_candidates.weight")
    assert (candidates is not None) == ("last_matmul" in mixed)
    with live.with_weights(kept), nullcontext() if candidates is None else live.with_candidates(candidates):
        package = Package(tmp_path / "package")
        for images in ((), ((1, 4, 6), (1, 8, 2))):
            check(tiny, package, lambda _: live, make_inputs(tiny, images), EXACT)


QUANTIZED = [*{each.model_class: each for each in TEXT_MEMBERS + VISION_MEMBERS}.values()]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("member", QUANTIZED, **IDS)
def test_quantized_families(member: Member, precision: str, tmp_path: Path) -> None:
    """Without the rounding of activations, results equal transformers' with the dequantized weights."""
    checkpoint = planted(make_member(tmp_path / "checkpoint", member))
    vlpack.build(checkpoint, tmp_path / "package", precision=precision, threads=1)
    cases = built_in(sees=member.vision is not None)
    report = verify(
        tmp_path / "package", checkpoint, cases=cases[:1] if member.vision is None else cases[3:4], tokens=1
    )
    assert all(weight.same for weight in report.weights)
    stages = [stage for case in report.cases for stage in case.stages if stage.graph]
    assert len(stages) > 3
    # an error in the dequantized weights would be detected: the original weights are much further away
    assert max(stage.graph.relative for stage in stages if stage.graph) < EXACT
    assert max(stage.total.relative for stage in stages) > 100 * EXACT


def test_adapters_are_merged_before_transforms(outlying: Callable[[Tiny], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(3)
    tiny = SHAPES["untied, bias"]
    checkpoint, inputs = outlying(tiny), make_inputs(tiny, ((1, 4, 6),))
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "qkv", "attn.proj", "linear_fc1", "lm_head"]
    adapted = peft.get_peft_model(
        Reference(checkpoint).model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, bias="all")
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapter")
    live = Reference(checkpoint)
    without = live(inputs)
    live = Reference(checkpoint)
    live.model = peft.PeftModel.from_pretrained(live.model, tmp_path / "adapter").merge_and_unload().eval()
    package = package_of(checkpoint, tmp_path / "package", lora=tmp_path / "adapter")
    check(tiny, package, lambda _: live, inputs, EXACT)
    assert relative(live(inputs).logits, without.logits) > 0.05


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packages_do_not_depend_on_the_number_of_threads(
    precision: str, outlying: Callable[[Tiny], Path], tmp_path: Path
) -> None:
    checkpoint = outlying(SHAPES["head_dim 72, vision heads of 72"])
    built = []
    for threads in (1, 4):
        vlpack.build(checkpoint, tmp_path / str(threads), precision=precision, threads=threads)
        built.append(hashes(tmp_path / str(threads)))
    assert built[0] == built[1]
    extra = parse_extra_options(["balance=false", "rotation=false"])
    vlpack.build(checkpoint, tmp_path / "plain", precision=precision, threads=1, extra_options=extra)
    assert hashes(tmp_path / "plain")["decoder.onnx.data"] != built[0]["decoder.onnx.data"]


def entries(folder: Path, graph: str) -> dict[str, dict[str, Any]]:
    """The entries of weights in the manifest, without the keys that all of them have."""
    weights = json.loads((folder / "vlpack.json").read_text(encoding="utf-8"))["parts"][graph]["weights"]
    told = ("balanced", "rotated", "rows_rotated")
    return {path: {name: entry[name] for name in told if name in entry} for path, entry in weights.items()}


LAYER = "model.language_model.layers.1"
DECODER = {
    f"{LAYER}.self_attn.qkv_proj": {"balanced": ["columns", "rows"], "rotated": 64, "rows_rotated": 32},
    f"{LAYER}.self_attn.o_proj": {"balanced": ["columns"], "rotated": 32},
    f"{LAYER}.self_attn.q_norm.weight": {},
    f"{LAYER}.self_attn.k_norm.weight": {},
    f"{LAYER}.mlp.gate_proj": {"balanced": ["columns"], "rotated": 64},
    f"{LAYER}.mlp.up_proj": {"balanced": ["columns", "rows"], "rotated": 64},
    f"{LAYER}.mlp.down_proj": {"balanced": ["columns"], "rotated": 48},
    f"{LAYER}.input_layernorm.weight": {"balanced": ["rows"]},
    f"{LAYER}.post_attention_layernorm.weight": {"balanced": ["rows"]},
    "model.language_model.norm.weight": {},
    "lm_head": {"rotated": 64},
}
BLOCK = "model.visual.blocks.2"
VISION = {
    f"{BLOCK}.norm1.weight": {"balanced": ["rows"]},
    f"{BLOCK}.norm1.bias": {"balanced": ["rows"]},
    f"{BLOCK}.attn.qkv": {"balanced": ["columns", "rows"], "rotated": 32, "rows_rotated": 16},
    f"{BLOCK}.attn.qkv.bias": {"balanced": ["rows"], "rows_rotated": 16},
    f"{BLOCK}.attn.proj": {"balanced": ["columns"], "rotated": 16},
    f"{BLOCK}.attn.proj.bias": {},
    f"{BLOCK}.mlp.linear_fc1": {"balanced": ["columns"], "rotated": 32},
    f"{BLOCK}.mlp.linear_fc1.bias": {},
    f"{BLOCK}.mlp.linear_fc2": {"rotated": 48},
    "model.visual.merger.norm.weight": {"balanced": ["rows"]},
    "model.visual.merger.linear_fc1": {"balanced": ["columns"], "rotated": 64},
    "model.visual.pos_embed": {},
    "model.visual.patch_embed.proj": {},
}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_manifest_describes_the_transform_of_each_weight(precision: str, built: Callable[..., Path]) -> None:
    decoder, vision = (entries(built(TINY, precision=precision), f"{part}.onnx") for part in ("decoder", "vision"))
    assert DECODER.items() <= decoder.items()
    assert VISION.items() <= vision.items()


@pytest.mark.parametrize(
    ("precision", "extra", "told"),
    [
        ("fp32", (), set()),
        ("fp16", (), set()),
        ("fp32", ("balance=true",), {"balanced"}),
        ("fp32", ("rotation=true",), {"rotated", "rows_rotated"}),
        ("int8", ("balance=false",), {"rotated", "rows_rotated"}),
        ("int8", ("rotation=false",), {"balanced"}),
        ("int4", ("balance=false", "rotation=false"), set()),
    ],
)
def test_the_manifest_contains_the_requested_options(
    precision: str, extra: tuple[str, ...], told: set[str], built: Callable[..., Path]
) -> None:
    weights = entries(built(TINY, *extra, precision=precision), "decoder.onnx")
    assert {name for entry in weights.values() for name in entry} == told


def test_other_providers_are_not_rotated(built: Callable[..., Path]) -> None:
    weights = entries(built(TINY, precision="int4", execution_provider="cuda"), "decoder.onnx")
    assert {name for entry in weights.values() for name in entry} == {"balanced"}
