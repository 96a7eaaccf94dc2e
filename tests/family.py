"""Tiny checkpoints of the other families, in transformers' own classes, named as published ones are or as today's."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import (
    BOS,
    EOS,
    EXAMPLE,
    FIRST_SPECIAL,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    Tiny,
    _to_version_4,
    _values,
)

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
VISION: dict[str, Any] = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": 8,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
WEIGHTS = "model.safetensors"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Member:
    """A checkpoint of a family.

    Args:
        name: of the test.
        config_class: of transformers.
        model_class: of transformers.
        text: settings of the decoder beside `TEXT`.
        vision: settings of the vision encoder beside `VISION`; None for text models.
        tied: the head's weight is the embedding's.
        old: as the Hub's checkpoints are: flat config, ``rope_scaling``, names without ``language_model``.
        fused: a mixture's experts are in one tensor, as transformers 5 holds them in memory.
    """

    name: str
    config_class: str
    model_class: str
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] | None = None
    tied: bool = False
    old: bool = False
    fused: bool = False

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def offset_norms(self) -> bool:
        """Whether the family stores the weights of norms as differences from 1."""
        return self.model_class.startswith(("Qwen3_5", "Qwen3Next"))

    @property
    def model(self) -> Any:
        """The class in transformers."""
        import transformers

        return getattr(transformers, self.model_class)


def make_member(folder: Path, member: Member) -> Path:
    """Write the checkpoint into ``folder``."""
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(len(member.name))
    text = TEXT | {"rope_parameters": dict(ROPE)} | member.text
    values: dict[str, Any] = {"tie_word_embeddings": member.tied}
    if member.vision is None:
        values |= text
    else:
        values |= {**IDS, "text_config": text, "vision_config": VISION | member.vision}
    model = member.model(getattr(transformers, member.config_class)(**values))
    tiny = Tiny(tied=member.tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_values(name, parameter, tiny))
            if member.offset_norms and "norm" in name and "linear_attn" not in name and "visual" not in name:
                parameter.sub_(1.0)
        model.lm_head.weight[FIRST_SPECIAL:] *= 0.1
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    if member.vision is not None:
        settings = json.loads((EXAMPLE / "preprocessor_config.json").read_text(encoding="utf-8"))
        settings |= {"patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 1 << 18}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if member.old and {"deepstack_visual_indexes", "num_position_embeddings"} & (member.vision or {}).keys():
        _to_version_4(folder / "config.json")
    elif member.old:
        _age(folder)
    if member.fused:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file({n: t for n, t in state.items() if not (member.tied and n == "lm_head.weight")}, folder / WEIGHTS)
    return folder


def _age(folder: Path) -> None:
    """Config and tensor names as transformers 4 published them."""
    from safetensors.numpy import load_file, save_file

    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.pop("text_config", None)
    if text is not None:
        config |= {k: v for k, v in text.items() if k not in ("model_type", "dtype")}
        config["vision_config"].pop("rope_parameters", None)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if "mrope_section" in rope:
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    elif rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / WEIGHTS)
    old = {
        n.replace("model.visual.", "visual.").replace("model.language_model.", "model."): t for n, t in tensors.items()
    }
    save_file(old, folder / WEIGHTS)
