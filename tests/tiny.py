"""Tiny Qwen3-VL checkpoints with random weights, made and saved with transformers' own classes.

No parameter has its usual initial value (norms are not one, biases not zero), so that an omitted one is detected.
Special tokens, whose ids are 2048 and above, have small rows in the head, so a greedy answer never contains them and
neither ends early nor contains an image token.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits-qwen3-vl"
"""The shipped checkpoint, whose tokenizer, chat template and settings the tiny checkpoints use."""

VOCABULARY, FIRST_SPECIAL = 2176, 2048
BOS, EOS = 2048, 2050
VISION_START, VISION_END, IMAGE, VIDEO = 2057, 2058, 2060, 2061


@dataclass(frozen=True)
class Tiny:
    """The description of a tiny checkpoint; the defaults are those of Qwen3-VL on a small scale.

    Args:
        style: ``v5`` for the form that transformers 5 saves, or ``v4`` for that of the published checkpoints, which has
            other names in config.json.
        peak: factor on the q norms; the larger it is, the sharper attention is, and the more positions matter.
        quiet: whether the inputs of the vision encoder are so small that the epsilon of its norms matters.
    """

    hidden_size: int = 64
    intermediate_size: int = 96
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mrope_section: tuple[int, int, int] = (6, 5, 5)
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    tied: bool = True
    vocabulary: int = VOCABULARY
    vision_size: int = 32
    vision_intermediate_size: int = 48
    vision_heads: int = 2
    vision_act: str = "gelu_pytorch_tanh"
    depth: int = 3
    deepstack: tuple[int, ...] = (0, 1, 2)
    patch_size: int = 8
    temporal_patch_size: int = 2
    merge: int = 2
    num_position_embeddings: int = 64
    style: str = "v5"
    sharded: bool = False
    dtype: str = "float32"
    peak: float = 2.0
    quiet: bool = False
    seed: int = 0

    def but(self, **changes: Any) -> Tiny:
        """A copy of the description with some values changed."""
        return replace(self, **changes)

    @property
    def pixels(self) -> int:
        """Number of values of a flattened patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def make_checkpoint(folder: Path, tiny: Tiny) -> Path:
    """Writes the checkpoint to ``folder``, with a tokenizer and all other files of a published one."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    folder.mkdir(parents=True)
    torch.manual_seed(tiny.seed)
    dtype = getattr(torch, tiny.dtype)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**_config(tiny)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_values(name, parameter, tiny))
        model.lm_head.weight[FIRST_SPECIAL:] *= 0.1
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB" if tiny.sharded else "1GB")
    if tiny.style == "v4":
        _to_version_4(folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    settings = json.loads((EXAMPLE / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings |= {"patch_size": tiny.patch_size, "merge_size": tiny.merge}
    settings["temporal_patch_size"] = tiny.temporal_patch_size
    settings["size"] = {"shortest_edge": (tiny.patch_size * tiny.merge) ** 2, "longest_edge": 1 << 18}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    settings["size"] = {"shortest_edge": 2 * (tiny.patch_size * tiny.merge) ** 2, "longest_edge": 1 << 17}
    settings |= {"video_processor_type": "Qwen3VLVideoProcessor"}
    del settings["image_processor_type"]
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _config(tiny: Tiny) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": tiny.rope_theta, "mrope_interleaved": True}
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": tiny.tied,
        "text_config": {
            "vocab_size": tiny.vocabulary,
            "hidden_size": tiny.hidden_size,
            "intermediate_size": tiny.intermediate_size,
            "num_hidden_layers": tiny.layers,
            "num_attention_heads": tiny.heads,
            "num_key_value_heads": tiny.kv_heads,
            "head_dim": tiny.head_dim,
            "hidden_act": tiny.hidden_act,
            "attention_bias": tiny.attention_bias,
            "rms_norm_eps": tiny.rms_norm_eps,
            "max_position_embeddings": 4096,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "rope_parameters": {**rope, "mrope_section": list(tiny.mrope_section)},
        },
        "vision_config": {
            "hidden_size": tiny.vision_size,
            "intermediate_size": tiny.vision_intermediate_size,
            "num_heads": tiny.vision_heads,
            "depth": tiny.depth,
            "deepstack_visual_indexes": list(tiny.deepstack),
            "hidden_act": tiny.vision_act,
            "out_hidden_size": tiny.hidden_size,
            "patch_size": tiny.patch_size,
            "temporal_patch_size": tiny.temporal_patch_size,
            "spatial_merge_size": tiny.merge,
            "num_position_embeddings": tiny.num_position_embeddings,
        },
    }


def _values(name: str, parameter: Any, tiny: Tiny) -> Any:
    """Random values for each kind of parameter, scaled so that every branch contributes similarly to the result."""
    import torch

    if name.endswith("A_log"):
        mean, spread = -2.0, 1.5  # some heads of linear attention remember few tokens, some hundreds
    elif name.endswith("q_norm.weight"):
        mean, spread = tiny.peak, 0.3 * tiny.peak
    elif name.endswith("bias"):
        mean, spread = 0.0, 0.3
    elif "norm" in name:
        mean, spread = 1.0, 0.3
    elif "pos_embed" in name:
        mean, spread = 0.0, 1.0
    elif "embed_tokens" in name:
        # if the embedding dominated the residual stream, a tied head would repeat the last token for ever
        mean, spread = 0.0, 0.3 if tiny.tied else 1.0
    elif name == "lm_head.weight":
        mean, spread = 0.0, 8 / tiny.hidden_size**0.5
    else:
        mean, spread = 0.0, 1.5 / parameter[0].numel() ** 0.5
    values = mean + spread * torch.randn(parameter.shape)
    return 0.01 * values if tiny.quiet and ("pos_embed" in name or "patch_embed" in name) else values


def _to_version_4(path: Path) -> None:
    """Rewrites a config.json of transformers 5 in the form of transformers 4.57, as in the published checkpoints."""
    config = json.loads(path.read_text(encoding="utf-8"))
    text, vision = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters")
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            text[name] = rope.pop(name)
    text["rope_scaling"] = rope
    vision.pop("rope_parameters", None)
    vision["model_type"] = config["model_type"]
    config["torch_dtype"] = text["dtype"] = config.pop("dtype")
    text["tie_word_embeddings"] = config["tie_word_embeddings"]
    config["transformers_version"] = "4.57.0.dev0"
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
