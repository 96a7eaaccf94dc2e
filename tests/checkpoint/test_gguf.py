"""GGUF files as checkpoints: values of all types, logits of all architectures, tokenizers, and kept codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from family import ROPE, Member, make_member
from gguf_files import matrices_as, write
from parity import Package, nothing_yet, relative
from vlpack.builder import build
from vlpack.checkpoint.gguf.types import BLOCKS
from vlpack.options import parse_extra_options

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TOLERANCE = 1e-5
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"rope_type": "llama3", "factor": 32.0, "rope_theta": 500000.0}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
VISION = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
QWEN3_VL = VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
MROPE = ROPE | {"mrope_section": [6, 5, 5]}


def member(family: str, kind: str = "CausalLM", **settings: Any) -> Member:
    return Member(family, f"{family}Config", f"{family}For{kind}", **settings)


SEES = "ConditionalGeneration"
CASES: dict[str, tuple[Member, Type]] = {
    "qwen2": (member("Qwen2", tied=True), Type.F32),
    "qwen3": (member("Qwen3", text={"head_dim": 32, "attention_bias": True}), Type.F16),
    "qwen3-yarn": (member("Qwen3", text={"head_dim": 32, "rope_parameters": YARN}, tied=True), Type.BF16),
    "qwen3moe": (member("Qwen3Moe", text=EXPERTS | {"mlp_only_layers": [1], "norm_topk_prob": True}), Type.F16),
    "llama": (member("Llama", text={"attention_bias": True, "rms_norm_eps": 1e-3}), Type.F32),
    "llama3": (member("Llama", text={"head_dim": 32, "rope_parameters": LLAMA3}), Type.Q8_0),
    "qwen3-q4": (member("Qwen3", text={"head_dim": 32}, tied=True), Type.Q4_0),
    "qwen2vl": (member("Qwen2_5_VL", SEES, text={"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}},
                       vision=VISION | {"window_size": 64, "fullatt_block_indexes": [1]}), Type.F16),
    "qwen3vl": (member("Qwen3VL", SEES, text={"head_dim": 32, "rope_parameters": MROPE}, vision=QWEN3_VL), Type.F16),
}  # fmt: skip


@pytest.mark.parametrize("number", BLOCKS)
def test_values_are_those_of_gguf(number: int) -> None:
    kind = Type(number)
    values, octets = gguf.GGML_QUANT_SIZES[kind]
    assert (kind.name, values, octets) == (BLOCKS[number].name, BLOCKS[number].values, BLOCKS[number].block.itemsize)
    raw = np.random.default_rng(number).integers(0, 256, (50, 3 * octets), np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw, kind)
    found = BLOCKS[number].dequantized(raw)
    # NaN in both places; all other values bit for bit
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    assert np.array_equal(found.view(np.uint32)[~np.isnan(found)], wanted.view(np.uint32)[~np.isnan(wanted)])


def reference_logits(folder: Path, member: Member, values: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The logits of transformers' model with the values of the GGUF file in the place of its own."""
    model = member.model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            plain = name.replace("model.language_model.", "model.")
            if plain in values:
                parameter.copy_(torch.tensor(values[plain]))
            elif ".experts." in name:
                stem = plain.rpartition(".")[0]
                parts = ["gate_proj", "up_proj"] if name.endswith("gate_up_proj") else ["down_proj"]
                each = [
                    np.concatenate([values[f"{stem}.{expert}.{part}.weight"] for part in parts])
                    for expert in range(len(parameter))
                ]
                parameter.copy_(torch.tensor(np.stack(each)))
            else:
                assert ".visual." in name, name
        logits: np.ndarray = model(torch.tensor(ids)).logits.numpy()
    return logits


def package_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    package, length = Package(folder), ids.shape[1]
    past = [port for port in package.sessions["decoder"].get_inputs() if port.name.startswith("past")]
    positions = np.arange(length, dtype=np.int64)[None]
    out = package.run(
        "decoder", input_ids=ids, attention_mask=np.ones((1, length), np.int64), position_ids=positions,
        **{port.name: nothing_yet(port, 1) for port in past},
    )  # fmt: skip
    return out["logits"]


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tmp_path: Path) -> None:
    member, kind = CASES[name]
    checkpoint = make_member(tmp_path / "checkpoint", member)
    values = write(checkpoint, tmp_path / "model.gguf", matrices_as(kind))
    options = parse_extra_options(["prune_lm_head=false"])
    result = build(
        tmp_path / "model.gguf", tmp_path / "package", precision="fp32", extra_options=options, threads=1
    )
    ids = np.random.default_rng(0).integers(0, 2048, (1, 90))
    wanted = reference_logits(checkpoint, member, values, ids)
    assert relative(package_logits(tmp_path / "package", ids), wanted) < TOLERANCE
    assert any("text alone" in note for note in result.notes) is (member.vision is not None)
