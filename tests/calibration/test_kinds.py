"""Calibrated embedding models, rerankers and experts are closer to the model, on inputs not used for calibration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.progress import Progress

from family import Member, make_member
from retrieval import TEXT, make_text, make_vision, picture
from vlpack.architectures import architecture_of
from vlpack.architectures.ports import GraphOptions
from vlpack.builder import build
from vlpack.calibration.experts import SHARED, WORTH, ExpertInputs, expert_pairs
from vlpack.calibration.gram import Gram
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.cli.console_build import BuildBar
from vlpack.export.graph import Weight, declare
from vlpack.export.weights import encode
from vlpack.options import parse_extra_options
from vlpack.preprocess.retrieval_prompts import Input
from vlpack.quantize.gptq import HessianFactor, factor_hessian
from vlpack.quantize.policy import QuantizationOptions, make_policy
from vlpack.quantize.transforms import IDENTITY, ChannelScales
from vlpack.runtime.load import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

UNSEEN = [
    "The ferry crosses the strait twice a day in winter.",
    "for name, count in sorted(totals.items()): print(name, count)",
    "Der Zug nach Hamburg fährt heute von Gleis sieben.",
    "A man in a yellow raincoat repairs a fishing net on the pier.",
    "今天的会议推迟到下午三点。",
    "Total: 41.20, paid in cash, change 8.80.",
]


def packages(source: Path, folder: Path, precision: str, **options: Any) -> list[Path]:
    """Three packages: fp32, and ``precision`` without and with calibration, with the same bits and block sizes."""
    same = ["block_size=32", "is_symmetric=true", "matmul_mixed_precision=mixed_layers:int4"]
    extra = parse_extra_options(same if precision == "int4" else [])
    build(source, folder / "fp32", precision="fp32", **options)
    build(source, folder / "nearest", precision=precision, extra_options=extra, **options)
    build(source, folder / "fitted", precision=precision, extra_options=extra, calibrate="self", **options)
    return [folder / name for name in ("fp32", "nearest", "fitted")]


def distances(outputs: Sequence[np.ndarray]) -> tuple[float, float]:
    """The distances of the second and the third array from the first."""
    exact, nearest, fitted = outputs
    return float(np.linalg.norm(nearest - exact)), float(np.linalg.norm(fitted - exact))


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_calibrated_embeddings_are_closer(kind: str, tmp_path: Path) -> None:
    inputs: list[Input] = [*UNSEEN]
    if kind == "vision":
        inputs += [{"image": picture(seed, 96, 64)} for seed in range(3)]
    source = make_text(tmp_path / "source", TEXT) if kind == "text" else make_vision(tmp_path / "source")
    folders = packages(source, tmp_path, "int4", task="embedding")
    nearest, fitted = distances([load(folder).embed(inputs) for folder in folders])  # type: ignore[union-attr]
    print(f"{kind}: nearest {nearest:.4f}, fitted {fitted:.4f}")
    assert fitted < 0.9 * nearest


def test_calibrated_scores_are_closer(tmp_path: Path) -> None:
    folders = packages(make_text(tmp_path / "source", TEXT), tmp_path, "int4", task="reranker")

    def logits(folder: Path) -> np.ndarray:
        scores = np.array([load(folder).score(query, UNSEEN) for query in UNSEEN])  # type: ignore[union-attr]
        return np.asarray(np.log(scores / (1 - scores)))

    nearest, fitted = distances([logits(folder) for folder in folders])
    print(f"nearest {nearest:.4f}, fitted {fitted:.4f}")
    assert fitted < 0.9 * nearest


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
MIXTURE = Member("mixture", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", EXPERTS)


class Fitted:
    """The weights of one layer's experts with their inputs, as a build requests them."""

    def __init__(self, checkpoint: Checkpoint, inputs: ExpertInputs) -> None:
        self.scales, self._inputs = ChannelScales(checkpoint), inputs

    def __call__(self, weight: Weight, expert: int = 0) -> HessianFactor:
        products = self._inputs.products(weight, expert)
        weight.transform.carry(products, self.scales, IDENTITY, self.scales)
        return factor_hessian(products)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_calibrated_experts_have_smaller_errors(precision: str, tmp_path: Path) -> None:
    """Errors of the outputs of every expert's matrices, on tokens that calibration did not use."""
    random = np.random.default_rng(0)
    x = (random.standard_normal((3000, 10)) @ random.standard_normal((10, 64))).astype(np.float32)
    x += 0.2 * random.standard_normal(x.shape).astype(np.float32)
    logits = random.standard_normal((3000, 4)).astype(np.float32)
    with Checkpoint.open(make_member(tmp_path / "source", MIXTURE)) as opened:
        pair = expert_weights(opened, precision)
        seen, unseen = (ExpertInputs(opened, pair[0], 2) for _ in range(2))
        seen.add(x[:2000], logits[:2000], None)
        unseen.add(x[2000:], logits[2000:], None)
        seen.finish()
        unseen.finish()
        fitted = Fitted(opened, seen)
        for weight in pair:
            exact = weight.source.read(opened, 0, weight.rows).reshape(4, -1, weight.cols)
            losses = []
            for calibration in (None, fitted):
                arrays: dict[str, list[np.ndarray]] = {}
                for name, chunk in encode(opened, weight, fitted.scales, calibration):
                    arrays.setdefault(name, []).append(chunk)
                whole = {name: np.concatenate(chunks) for name, chunks in arrays.items()}
                assert {name: (kept.dtype, kept.shape) for name, kept in whole.items()} == {
                    **weight.storage.arrays(weight.rows, weight.cols)
                }
                values = weight.storage.values(whole, weight.rows, weight.cols)
                apart = weight.transform.undo(values, fitted.scales).reshape(exact.shape) - exact
                products = [unseen.products(weight, expert) for expert in range(4)]
                losses.append([float(np.sqrt(((d @ h) * d).sum())) for d, h in zip(apart, products, strict=True)])
            print(f"{weight.path}: {losses}")
            assert all(after < 0.85 * before for before, after in zip(*losses, strict=True))


def expert_weights(checkpoint: Checkpoint, precision: str) -> tuple[Weight, Weight]:
    """The weights of the gate and up projections, and of the down projections, of the second layer's experts."""
    architecture, _ = architecture_of(checkpoint)
    policy = make_policy(precision, "cpu", QuantizationOptions(calibrated=True), architecture.precision_facts)
    declared = [weight for part in architecture.parts(GraphOptions()) for weight in declare(part, policy)]
    (pair,) = (pair for pair in expert_pairs(declared) if ".layers.1." in pair[0].path)
    return pair


def test_a_calibrated_mixture_of_experts(tmp_path: Path) -> None:
    """Attention and experts are calibrated, the router is not; verification and the runtime accept the package."""
    from vlpack.verification import verify

    source = make_member(tmp_path / "source", MIXTURE)
    build(source, tmp_path / "out", precision="int4", calibrate="self")
    manifest = json.loads((tmp_path / "out" / "vlpack.json").read_text(encoding="utf-8"))
    weights = next(iter(manifest["parts"].values()))["weights"]
    fitted = {path.rpartition(".")[2] for path, weight in weights.items() if weight["storage"].endswith("calibrated")}
    assert fitted == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}
    report = verify(tmp_path / "out", source, tokens=2)
    assert not [finding for finding in report.findings if finding.stage == "weights"]
    experts = [weight for weight in report.weights if ".experts." in weight.path]
    assert experts
    assert all(
        weight.error > weight.expected for weight in experts
    )  # rounding to the nearest codes would have the smallest error of the weights


def test_inputs_of_experts(tmp_path: Path) -> None:
    """Hessians of each expert's own tokens, weighted by shares, and of a few tokens for all, against transformers."""
    folder = make_member(tmp_path / "source", MIXTURE)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    block = model.model.layers[1].mlp
    with Checkpoint.open(folder) as opened:
        gate_up, down = expert_weights(opened, "int4")
        random = np.random.default_rng(0)
        x = random.standard_normal((700, gate_up.cols)).astype(np.float32)
        logits = random.standard_normal((700, 4)).astype(np.float32)
        logits[:, 3] = -20  # no token is sent to the last expert
        inputs = ExpertInputs(opened, gate_up, 2)
        for start in (0, 300):
            inputs.add(x[start : start + 300 + start], logits[start : start + 300 + start], None)
        inputs.finish()
        np.testing.assert_allclose(inputs.sizes, np.sqrt((x**2).mean(axis=0)), rtol=1e-5)
        some = np.linspace(0, 699, SHARED, dtype=int)
        probabilities = torch.tensor(logits).softmax(-1).numpy()
        for expert in range(4):
            shares = np.where(probabilities >= np.sort(probabilities)[:, -2, None], probabilities, 0)
            shares = 2 * (shares / shares.sum(axis=1, keepdims=True))[:, expert]
            weights = gate_and_up(block, expert)
            inner = torch.nn.functional.silu(torch.tensor(x) @ weights[0].T) * (torch.tensor(x) @ weights[1].T)
            for weight, rows in ((gate_up, x), (down, inner.detach().numpy())):
                wanted = (rows * shares[:, None] ** 2).T @ rows + WORTH / SHARED * rows[some].T @ rows[some]
                np.testing.assert_allclose(inputs.products(weight, expert), wanted, rtol=1e-3, atol=1e-3)


def gate_and_up(block: Any, expert: int) -> list[Any]:
    """The gate and up matrices of an expert in transformers 4 or 5."""
    if hasattr(block.experts, "gate_up_proj"):
        return list(block.experts.gate_up_proj[expert].chunk(2))
    return [block.experts[expert].gate_proj.weight, block.experts[expert].up_proj.weight]


@pytest.mark.parametrize(("outlier", "apart"), [(1, 0.005), (3000, 0.03)])
def test_gram_matrices_in_8_bits(outlier: float, apart: float) -> None:
    """Gram matrices in 8 bits equal float32 ones up to a small part of the geometric mean of both sums."""
    random = np.random.default_rng(0)
    rows = (random.standard_normal((900, 30)) @ random.standard_normal((30, 1300))).astype(np.float32)
    rows *= np.exp(random.standard_normal(1300)).astype(np.float32)
    rows[7, :5] *= outlier
    gram = Gram(1300)
    gram.add(rows[:600])
    gram.add(rows[600:])
    total, wanted = gram.total(), rows.astype(np.float64).T @ rows
    sizes = np.sqrt(wanted.diagonal())
    assert (total == total.T).all()
    assert np.abs((total - wanted) / np.outer(sizes, sizes)).max() < apart
    assert (total != (rows.T @ rows)).any()  # they were not computed in float32
    assert gram.rows == 900


def test_gram_matrices_of_values_that_are_not_finite() -> None:
    rows = np.ones((600, 600), np.float32)
    rows[3, 5] = np.inf
    gram = Gram(600)
    gram.add(rows)
    assert not np.isfinite(gram.total().diagonal()).all()


def test_the_remaining_time_is_reported() -> None:
    now = [0.0]
    with Progress(disable=True) as shown:
        bar = BuildBar(shown, lambda: now[0])
        bar.start(100)
        bar.say("calibrating layers", 0, 28)
        now[0] = 30.0
        bar.say("calibrating layers", 7, 28)
        bar.advance(10, "a.weight")
        assert shown.tasks[0].description == "calibrating layers, 25%, 1:30 left"
        assert shown.tasks[0].completed == 10
        bar.say("calibrating layers", 28, 28)
        bar.advance(10, "a.weight")
        assert shown.tasks[0].description.strip() == "a.weight"
