"""Real trained weights (SmolLM2-135M in Qwen2's shape): transformers' logits, true answers, the cost of fewer bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from checkpoint_copies import permuted, planted, write_copy
from outliers import plant
from parity import Package, relative
from smollm2 import UnavailableError, convert, fetch
from vlpack.builder import build
from vlpack.options import parse_extra_options
from vlpack.preprocess.tokenizer import Tokenizer
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

PARAGRAPH = (
    "Paris has been the capital of France for most of the last thousand years. The city began on an island in the"
    " Seine, where a Celtic tribe had a fishing village before the Romans came. In the nineteenth century wide "
    "avenues were cut through its crowded medieval quarters, new parks and sewers were built, and a railway line "
    "around the city joined its great stations. Today about two million people live inside its limits and more "
    "than ten million in the region around it. They work in banks, museums, laboratories, kitchens and theatres; "
    "they travel by metro, by bicycle and on foot; and in the evening they sit along the quays of the river and "
    "talk. Visitors come for the paintings, the churches and the food, and most of them climb the iron tower that was "
    "built for the world's fair of 1889. It was meant to stand for twenty years. By then it had become useful as an "
    "antenna for the radio, and so it was kept; now it is the picture that everyone has of the city."
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        path = fetch(folder)
    except UnavailableError as error:
        pytest.skip(f"SmolLM2's weights cannot be had here: {error}")
    return convert(path, folder / "checkpoint")


@pytest.fixture(scope="module")
def ids(checkpoint: Path) -> np.ndarray:
    return np.array([Tokenizer.from_folder(checkpoint).encode(PARAGRAPH)], np.int64)


@pytest.fixture(scope="module")
def wanted(checkpoint: Path, ids: np.ndarray) -> np.ndarray:
    model = transformers.Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return np.asarray(model.eval()(torch.tensor(ids)).logits[0].numpy())


def logits(
    checkpoint: Path, precision: str, ids: np.ndarray, folder: Path, *extra: str, calibrate: str | None = None
) -> np.ndarray:
    options = parse_extra_options(["prune_lm_head=false", *extra])
    build(checkpoint, folder, precision=precision, extra_options=options, calibrate=calibrate)
    package = Package(folder)
    ports = [port for port in package.sessions["decoder"].get_inputs() if port.name.startswith("past")]
    past = {port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32) for port in ports}
    positions = np.arange(ids.shape[1])[None]
    out = package.run("decoder", input_ids=ids, attention_mask=np.ones_like(ids), position_ids=positions, **past)
    shutil.rmtree(folder)
    return out["logits"][0]


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def test_the_reference_reads_english(wanted: np.ndarray, ids: np.ndarray) -> None:
    """The weights, their order and the tokenizer are correct, so that the perplexity of an English paragraph is low."""
    chosen = log_softmax(wanted[:-1])[np.arange(ids.shape[1] - 1), ids[0, 1:]]
    assert -chosen.mean() < 3.5


def test_logits_are_transformers(checkpoint: Path, ids: np.ndarray, wanted: np.ndarray, tmp_path: Path) -> None:
    distance = relative(logits(checkpoint, "fp32", ids, tmp_path / "package"), wanted)
    print(f"fp32: L2 {distance:.2g}")
    assert distance < 1e-5


def test_planted_outliers_change_no_logit(
    checkpoint: Path, ids: np.ndarray, wanted: np.ndarray, tmp_path: Path
) -> None:
    copy = write_copy(checkpoint, tmp_path / "planted", permuted, planted)
    model = transformers.Qwen2ForCausalLM.from_pretrained(copy, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert relative(model.eval()(torch.tensor(ids)).logits[0].numpy(), wanted) < 1e-4


def test_as_llama(checkpoint: Path, ids: np.ndarray, wanted: np.ndarray, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, tmp_path / "llama")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 64}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}
    save_file(kept, tmp_path / "llama" / "model.safetensors")
    assert relative(logits(tmp_path / "llama", "fp32", ids, tmp_path / "package"), wanted) < 1e-5


@pytest.mark.parametrize(
    ("precision", "extra", "calibrate", "kl", "top1"),
    [
        ("int8", [], None, 0.005, 0.9),
        ("int4", [], None, 0.4, 0.6),
        ("int4", ["is_symmetric=false"], None, 0.45, 0.55),
        ("int4", [], "self", 0.26, 0.65),  # blocks of 128, for which rounding to the nearest codes gives 0.39
    ],
)
def test_divergence_by_precision(
    precision: str,
    extra: list[str],
    calibrate: str | None,
    kl: float,
    top1: float,
    checkpoint: Path,
    ids: np.ndarray,
    wanted: np.ndarray,
    tmp_path: Path,
) -> None:
    found = logits(checkpoint, precision, ids, tmp_path / "package", *extra, calibrate=calibrate)
    p, q = log_softmax(wanted), log_softmax(found)
    divergence, agree = float((np.exp(p) * (p - q)).sum(axis=1).mean()), float((p.argmax(1) == q.argmax(1)).mean())
    cost = f"L2 {relative(found, wanted):.3g}, KL {divergence:.4f} nats, same top token {agree:.1%}"
    print(f"{precision} {extra} {calibrate or ''}: {cost} of {ids.shape[1]}")
    assert divergence < kl
    assert agree > top1


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_capital_of_france(checkpoint: Path, precision: str, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "package", precision=precision)
    model = Model(tmp_path / "package")
    # the answer of so small a model depends on the phrasing (docs/results.md)
    answer = model.generate("Name the capital of France.", max_tokens=16, sampling=Sampling(temperature=0))
    assert "Paris" in answer.text


def divergence(found: np.ndarray, wanted: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence of the next token's distribution, in nats."""
    p, q = log_softmax(wanted), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


PLANTED: dict[str, dict[str, float]] = {
    "six channels, 10 to 60 times": {},
    "two channels, 200 to 400 times": {"channels": 2, "low": 200, "high": 400},
}


@pytest.fixture(scope="module", params=PLANTED)
def outlying(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that computes the same function and has the outliers of larger models."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("outlying") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    layers = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    tensors = plant(load_file(checkpoint / "model.safetensors"), layers, **PLANTED[request.param])  # type: ignore[arg-type]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def mild(checkpoint: Path, ids: np.ndarray, wanted: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> float:
    """The divergence of int8 for the model without planted outliers."""
    return divergence(logits(checkpoint, "int8", ids, tmp_path_factory.mktemp("mild") / "package"), wanted)


def test_outliers_do_not_harm_int8(
    outlying: Path, mild: float, ids: np.ndarray, wanted: np.ndarray, tmp_path: Path
) -> None:
    """Balance and rotation together remove the effect of outliers on int8; either alone does not."""
    assert relative(logits(outlying, "fp32", ids, tmp_path / "package"), wanted) < 1e-4
    cost = {
        " ".join(extra): divergence(logits(outlying, "int8", ids, tmp_path / "package", *extra), wanted)
        for extra in ([], ["balance=false"], ["rotation=false"], ["balance=false", "rotation=false"])
    }
    told = ", ".join(f"{extra or 'as it comes'} {value:.4f}" for extra, value in cost.items())
    print(f"int8, outliers: mild {mild:.4f}; {told}")
    assert cost[""] < 1.5 * mild
    assert min(cost["balance=false"], cost["rotation=false"]) > 4 * mild
    assert cost["balance=false rotation=false"] > 50 * mild
