"""Vision encoders in GGUF files (mmproj): features, logits and answers of complete packages, and files that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from PIL import Image

from family import ROPE, Member, make_member
from gguf_files import matrices_as, write
from gguf_vision import Change, set_values, write_both, write_mmproj
from parity import Inputs, Package, make_inputs, relative
from samples import vlpack
from tiny import EXAMPLE, IMAGE, Tiny
from vlpack.builder import build
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.demo import QUESTIONS
from vlpack.errors import CheckpointError, OptionError
from vlpack.inspection import inspect
from vlpack.options import parse_extra_options
from vlpack.package.manifest import read_manifest
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling
from vlpack.shipped import examples_folder
from vlpack.verification import verify

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TOLERANCE = 1e-5
SIZES: dict[str, Any] = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
QWEN3: dict[str, Any] = SIZES | {"num_position_embeddings": 64, "deepstack_visual_indexes": [2, 0]}
QWEN3 |= {"hidden_act": "gelu_pytorch_tanh"}
INTERLEAVED = {"head_dim": 32, "rope_parameters": ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}}
CHUNKED = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def member(family: str, text: dict[str, Any], vision: dict[str, Any]) -> Member:
    return Member(family, f"{family}Config", f"{family}ForConditionalGeneration", text=text, vision=vision)


QWEN3_VL = member("Qwen3VL", INTERLEAVED, QWEN3)
MOE = member("Qwen3VLMoe", INTERLEAVED | EXPERTS, QWEN3)
QWEN2_5_VL = member("Qwen2_5_VL", CHUNKED, SIZES | {"window_size": 112, "fullatt_block_indexes": [1]})
QWEN2_VL = member("Qwen2VL", CHUNKED, {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2})
CASES: dict[str, tuple[Member, Type, dict[str, Any]]] = {
    "F32": (QWEN3_VL, Type.F32, {}),
    "F16": (QWEN3_VL, Type.F16, {"frames": (Type.F16, Type.F32)}),
    "Q8_0": (QWEN3_VL, Type.Q8_0, {}),
    "experts": (MOE, Type.F16, {}),
    "Qwen2.5-VL": (QWEN2_5_VL, Type.F32, {}),
    "Qwen2.5-VL in Q8_0": (QWEN2_5_VL, Type.Q8_0, {}),
    "Qwen2-VL": (QWEN2_VL, Type.F16, {}),
    "Qwen2-VL of 2024": (QWEN2_VL, Type.F32, {"legacy": True}),
}


def reference_outputs(model: Any, inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The image features with all DeepStack levels, the logits and the positions of transformers' model."""
    ids, pixels, grid = torch.tensor(inputs.ids), torch.tensor(inputs.pixels), torch.tensor(inputs.grid)
    kinds = (ids == IMAGE).int()
    positions, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grid)
    with torch.no_grad():
        out = model.model.visual(pixels, grid_thw=grid)
        levels = getattr(out, "deepstack_features", None) or []
        features = torch.cat([out.pooler_output, *levels], dim=-1).numpy()
        logits = model(
            input_ids=ids, position_ids=positions, use_cache=False, pixel_values=pixels, image_grid_thw=grid,
            mm_token_type_ids=kinds,
        ).logits.numpy()  # fmt: skip
    return features, logits, positions.numpy()


@pytest.mark.parametrize("name", CASES)
def test_features_and_logits(name: str, tmp_path: Path) -> None:
    case, kind, settings = CASES[name]
    checkpoint = make_member(tmp_path / "checkpoint", case)
    values = write_both(checkpoint, tmp_path / "gguf", kind, **settings)
    options = parse_extra_options(["prune_lm_head=false"])
    build(tmp_path / "gguf", tmp_path / "package", precision="fp32", extra_options=options, threads=1)
    model = case.model.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    set_values(model, values)
    inputs = make_inputs(Tiny(), ((1, 10, 22),))
    features, logits, positions = reference_outputs(model, inputs)
    package = Package(tmp_path / "package")
    assert relative(package.features(inputs), features) < TOLERANCE
    assert relative(package.logits(inputs, positions), logits) < TOLERANCE
