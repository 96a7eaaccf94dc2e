"""Mixtures of experts: layouts of the weights, quantization, and refused configs. Parity is tested in test_family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from family import WEIGHTS, Member, make_member
from parity import Package, relative
from vlpack.builder import build
from vlpack.checkpoint.rows import Alternating, Part, Rows, Source, Stacked, TransposedRows
from vlpack.errors import CheckpointError, OptionError
from vlpack.options import parse_extra_options
from vlpack.quantize.policy import PrecisionFacts, QuantizationOptions, make_policy

pytest.importorskip("torch")
pytest.importorskip("transformers")

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
MEMBER = Member("mixture", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", EXPERTS)
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


class Tensors:
    """A stand-in for a checkpoint with two tensors; it has the methods that classes of `Rows` call."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.a, self.b = random.normal(size=(3, 4, 6)), random.normal(size=(12, 6))

    def rows(self, name: str, start: int, stop: int, *, width: int | None = None) -> Any:
        return getattr(self, name).reshape(-1, width)[start:stop]


A, B = Source("a", (3, 4, 6), leading=2), Source("b", (12, 6))
CASES: dict[str, tuple[Rows, Any]] = {
    "experts as a matrix": (A, lambda t: t.a.reshape(12, 6)),
    "a part": (Part(A, 4, 4), lambda t: t.a[1]),
    "turned": (TransposedRows(Part(A, 8, 4)), lambda t: t.a[2].T),
    "a part of what is turned": (Part(TransposedRows(B), 2, 3), lambda t: t.b.T[2:5]),
    "stacked": (Stacked((B, Part(A, 0, 4), B)), lambda t: np.concatenate([t.b, t.a[0], t.b])),
    "alternating": (Alternating(A, B), lambda t: np.stack([t.a.reshape(12, 6), t.b], axis=1).reshape(24, 6)),
}


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
def test_rows_of_every_layout(case: str, data: st.DataObject) -> None:
    source, whole = CASES[case]
    tensors: Any = Tensors()
    wanted = whole(tensors)
    assert (source.rows, source.cols) == wanted.shape
    start = data.draw(st.integers(0, source.rows))
    stop = data.draw(st.integers(start, source.rows).filter(lambda stop: stop > start or source.rows == start))
    if start < stop:
        np.testing.assert_array_equal(source.read(tensors, start, stop), wanted[start:stop])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_member(tmp_path_factory.mktemp("mixture") / "checkpoint", MEMBER)


def logits(package: Path) -> np.ndarray:
    ids = np.random.default_rng(3).integers(0, 2048, (2, 40))
    sessions = Package(package)
    ports = [port for port in sessions.sessions["decoder"].get_inputs() if port.name.startswith("past")]
    past = {port.name: np.zeros((2, port.shape[1], 0, port.shape[3]), np.float32) for port in ports}
    positions = np.broadcast_to(np.arange(40), (2, 40))
    return sessions.run(
        "decoder", input_ids=ids, attention_mask=np.ones((2, 40), np.int64), position_ids=positions, **past
    )["logits"].astype(np.float32)


@pytest.fixture(scope="module")
def exact(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    folder = tmp_path_factory.mktemp("exact") / "package"
    build(mixture, folder, precision="fp32", extra_options=parse_extra_options(["prune_lm_head=false"]))
    return logits(folder)


@pytest.mark.parametrize(
    ("precision", "extra", "bound"),
    [
        ("fp16", [], 3e-3),
        ("int8", [], 0.05),
        ("int8", ["is_symmetric=false", "block_size=16"], 0.05),
        ("int4", [], 0.4),
        ("int4", ["accuracy_level=1"], 0.4),
        ("int4", ["is_symmetric=false", "block_size=16"], 0.25),
        ("int4", ["matmul_mixed_precision=mixed_layers:int8"], 0.4),
    ],
)
def test_precisions(
    precision: str, extra: list[str], bound: float, mixture: Path, exact: np.ndarray, tmp_path: Path
) -> None:
    options = parse_extra_options([*extra, "prune_lm_head=false"])
    build(mixture, tmp_path / "package", precision=precision, extra_options=options)
    error = relative(logits(tmp_path / "package"), exact)
    assert 1e-5 < error < bound


@pytest.mark.parametrize("normalized", [False, True])
def test_shares_in_fp16(normalized: bool, tmp_path: Path) -> None:
    """The experts' outputs are large, so that errors in the router's shares are visible."""
    member = replace(MEMBER, text=EXPERTS | {"norm_topk_prob": normalized})

    def loud(tensors: dict[str, Any]) -> None:
        tensors.update({name: 8 * values for name, values in tensors.items() if ".experts." in name})

    source = spoil(make_member(tmp_path / "source", member), tmp_path / "loud", loud)
    options = parse_extra_options(["prune_lm_head=false"])
    for precision in ("fp32", "fp16"):
        build(source, tmp_path / precision, precision=precision, extra_options=options)
    assert relative(logits(tmp_path / "fp16"), logits(tmp_path / "fp32")) < 5e-3


def test_mixed_layers_reach_the_experts(mixture: Path, tmp_path: Path) -> None:
    from vlpack.inspection import inspect

    options = parse_extra_options(["matmul_mixed_precision=mixed_layers:int8"])
    build(mixture, tmp_path / "package", precision="int4", extra_options=options)
    groups = inspect(tmp_path / "package")["parts"]["text"]["groups"]
    counts = {(group["modules"], group["storage"]): group["count"] for group in groups}
    for name in ("down_proj", "gate_up_proj"):
        assert counts[f"model.layers.*.mlp.experts.{name}", "int8 block 32"] == 1
        assert counts[f"model.layers.*.mlp.experts.{name}", "int4 block 32"] == 2
    assert counts["model.layers.*.mlp.gate", "float32"] == 3


def test_a_dense_model_has_no_rules_for_experts(tmp_path: Path) -> None:
    from samples import DIGITS
    from vlpack.inspection import inspect

    build(DIGITS, tmp_path / "package")
    assert not {"text.router", "text.expert"} & {rule["role"] for rule in inspect(tmp_path / "package")["policy"]}


def test_an_unknown_role() -> None:
    policy = make_policy("int4", "cpu", QuantizationOptions(), PrecisionFacts())
    assert policy.storage("text.linear").label == "int4 block 32 8-bit scales"
    with pytest.raises(AssertionError, match="no role"):
        policy.storage("text.linaer")


@pytest.mark.parametrize(
    ("provider", "size", "int4", "int8"),
    [
        ("cpu", 2048, "int4 block 32", "int8 block 64"),
        ("cpu", 768 + 32, "int4 block 32", "int8 block 32"),
        ("cpu", 48, "int4 block 16", "int8 block 16"),
        ("cuda", 2048, "int4 block 32", None),
    ],
)
def test_blocks_of_experts_divide_their_sizes(provider: str, size: int, int4: str, int8: str | None) -> None:
    """The default block size divides the experts' sizes; a requested size that does not is refused."""
    facts = PrecisionFacts(num_hidden_layers=3, expert_size=size)
    assert make_policy("int4", provider, QuantizationOptions(), facts).storage("text.expert").label == int4
    if int8:
        assert make_policy("int8", provider, QuantizationOptions(), facts).storage("text.expert").label == int8
        mixed = make_policy("int4", provider, QuantizationOptions(mixed={"mixed_layers": "int8"}), facts)
        assert mixed.storage("text.expert", "model.layers.2.mlp.experts.down_proj").label.startswith("int8 block ")


def test_experts_that_no_block_divides() -> None:
    with pytest.raises(OptionError, match="block_size=16 does not divide the experts' sizes"):
        make_policy("int4", "cpu", QuantizationOptions(), PrecisionFacts(expert_size=40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"execution_provider": "dml"}, "Mixtures of experts are not offered on dml"),
        ({"execution_provider": "webgpu"}, "Mixtures of experts are not offered on webgpu"),
        ({"precision": "int4", "extra_options": parse_extra_options(["block_size=64"])}, "block_size=64"),
    ],
)
def test_options_that_are_not_offered_for_experts(
    options: dict[str, Any], message: str, mixture: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        build(mixture, tmp_path / "package", **options)
    assert not list(tmp_path.iterdir())


def spoil(mixture: Path, folder: Path, change: Any) -> Path:
    folder.mkdir()
    for path in mixture.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(mixture / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("change", "precision", "message"),
    [
        (lambda t: t[EXPERT].__setitem__((3, 5), np.nan), "int4", f"{EXPERT} holds nan at row 3, column 5"),
        (lambda t: t[EXPERT].__setitem__((3, 5), 1e6), "fp16", f"{EXPERT} has a value that cannot be stored"),
        (lambda t: t.pop(EXPERT), "int4", f"tensor {EXPERT} is missing"),
        (lambda t: t.update({EXPERT: t[EXPERT].T.copy()}), "int4", f"{EXPERT} has the shape"),
    ],
)
def test_an_expert_with_a_value_that_is_not_finite(
    change: Any, precision: str, message: str, mixture: Path, tmp_path: Path
) -> None:
    source = spoil(mixture, tmp_path / "checkpoint", change)
    with pytest.raises(CheckpointError, match=message):
        build(source, tmp_path / "package", precision=precision)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0, "num_local_experts": None}, "'num_experts'"),
        ({"num_experts_per_tok": 5}, "'num_experts_per_tok'"),
        ({"hidden_act": "gelu"}, "'hidden_act'"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str, mixture: Path) -> None:
    from vlpack.architectures.qwen3_moe import Qwen3Moe
    from vlpack.checkpoint.checkpoint import Checkpoint

    config = Checkpoint.open(mixture).config
    with pytest.raises(CheckpointError, match=message):
        Qwen3Moe({**config, **change})


def test_a_model_whose_layers_are_all_dense(tmp_path: Path) -> None:
    dense = replace(MEMBER, name="dense", text={**EXPERTS, "mlp_only_layers": [0, 1, 2]})
    source = make_member(tmp_path / "checkpoint", dense)
    build(
        source, tmp_path / "package", precision="int4", execution_provider="dml"
    )  # DirectML has no kernels for experts
