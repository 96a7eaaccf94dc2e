"""GGUF files of the vision encoders of tiny checkpoints (mmproj), as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_TENSOR
from gguf import GGMLQuantizationType as Type

from gguf_files import matrices_as, stored, write

PROJECTORS = {"qwen3_vl": "qwen3vl_merger", "qwen3_vl_moe": "qwen3vl_merger", "qwen2_vl": "qwen2vl_merger"}
PROJECTORS["qwen2_5_vl"] = "qwen2.5vl_merger"
SWAPPED = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}

Change = Callable[[gguf.GGUFWriter], object]


def write_mmproj(
    checkpoint: Path,
    path: Path,
    kind: Type,
    change: Change = lambda writer: None,
    *,
    legacy: bool = False,
    frames: tuple[Type, Type] | None = None,
) -> dict[str, np.ndarray]:
    """Writes the vision encoder of a checkpoint.

    Args:
        checkpoint: folder of the checkpoint.
        path: path of the file.
        kind: type of the matrices; the patch embedding is F16 if they are and else F32, as in the converter, and the
            position embedding and vectors are F32.
        change: function that changes the file's metadata and tensors before they are written.
        legacy: whether the feed-forward matrices have each other's names, as in files of 2024.
        frames: types of the patch embedding's two convolutions in place of the converter's.

    Returns:
        The values of the tensors by their names in the checkpoint, without ``model.``.
    """
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "clip")
    _settings(writer, config, json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8")))
    done: dict[str, np.ndarray] = {}
    tensors = {
        own.removeprefix("model."): values.astype(np.float32)
        for own, values in load_file(checkpoint / "model.safetensors").items()
        if "visual." in own
    }
    kernels = iter(frames or [Type.F16 if kind is Type.F16 else Type.F32] * 2)
    for number, (own, new, values) in enumerate(_parts(tensors, config["vision_config"])):
        if "patch_embd.weight" in new:
            chosen = next(kernels)
        else:
            chosen = kind if values.ndim == 2 and "position_embd" not in new else Type.F32
        place = ".".join(SWAPPED.get(part, part) for part in new.split(".")) if legacy else new
        one = stored(values, chosen, number)
        writer.add_tensor(place, one.data, raw_dtype=one.kind)
        if "patch_embd.weight" in new:
            done.setdefault(own, np.empty(tensors[own].shape, np.float32))[:, :, int(new.endswith(".1"))] = one.values
        else:
            done[own] = np.concatenate([done[own], one.values]) if own in done else one.values
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return done


def write_both(checkpoint: Path, folder: Path, kind: Type, **settings: Any) -> dict[str, np.ndarray]:
    """Writes ``model.gguf`` and ``mmproj.gguf`` into a folder, which is made if it is missing."""
    folder.mkdir(exist_ok=True)
    values = write(checkpoint, folder / "model.gguf", matrices_as(kind))
    return values | write_mmproj(checkpoint, folder / "mmproj.gguf", kind, **settings)


def set_values(model: Any, values: Mapping[str, np.ndarray]) -> None:
    """Replaces the parameters of a model of transformers by the values of GGUF files, if there are such values.

    Every parameter outside of the vision encoder must have a value.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
            if plain in values:
                parameter.copy_(torch.tensor(values[plain]))
            elif ".experts." in name:
                stem = plain.rpartition(".")[0]
                parts = ["gate_proj", "up_proj"] if name.endswith("gate_up_proj") else ["down_proj"]
                each = np.stack(
                    [
                        np.concatenate([values[f"{stem}.{expert}.{part}.weight"] for part in parts])
                        for expert in range(len(parameter))
                    ]
                )
                parameter.copy_(torch.tensor(each))
            else:
                assert ".visual." in name, name


def _settings(writer: gguf.GGUFWriter, config: Mapping[str, Any], images: Mapping[str, Any]) -> None:
    """Writes the metadata of a vision encoder."""
    vision, family = config["vision_config"], config["model_type"]
    text = config.get("text_config", config)
    old = "embed_dim" in vision  # Qwen2-VL, whose hidden_size is the width of the result
    writer.add_type("mmproj")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(text["hidden_size"])
    side = int(vision.get("num_position_embeddings", 0) ** 0.5 * vision["patch_size"])
    writer.add_vision_image_size(side or 560)
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["embed_dim" if old else "hidden_size"])
    writer.add_vision_feed_forward_length(vision["hidden_size" if old else "intermediate_size"])
    writer.add_vision_block_count(vision["depth"])
    writer.add_vision_head_count(vision["num_heads"])
    writer.add_vision_image_mean(images["image_mean"])
    writer.add_vision_image_std(images["image_std"])
    writer.add_clip_projector_type(PROJECTORS[family])
    writer.add_vision_attention_layernorm_eps(text["rms_norm_eps"])
    if family == "qwen2_5_vl":
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)
    if family.startswith("qwen3_vl"):
        writer.add_vision_use_gelu(True)
        writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
        levels = vision["deepstack_visual_indexes"]
        writer.add_vision_is_deepstack_layers([index in levels for index in range(vision["depth"])])


def _parts(tensors: Mapping[str, np.ndarray], vision: Mapping[str, Any]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields the tensors of the file: name in the checkpoint, name in the file, and values."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision["depth"])
    deepstack = {"norm": MODEL_TENSOR.V_DS_NORM, "linear_fc1": MODEL_TENSOR.V_DS_FC1}
    deepstack["linear_fc2"] = MODEL_TENSOR.V_DS_FC2
    for own, values in tensors.items():
        module, _, end = own.rpartition(".")
        if own == "visual.patch_embed.proj.weight":
            kernel = gguf.TENSOR_NAMES[MODEL_TENSOR.V_ENC_EMBD_PATCH]
            yield own, f"{kernel}.weight", values[:, :, 0].copy()
            yield own, f"{kernel}.weight.1", values[:, :, 1].copy()
        elif ".deepstack_merger_list." in own:
            level, inner = module.split(".")[2:]
            place = vision["deepstack_visual_indexes"][int(level)]
            yield own, f"{gguf.TENSOR_NAMES[deepstack[inner]].format(bid=place)}.{end}", values
        elif module.startswith("visual.merger.linear_fc"):
            projector = gguf.TENSOR_NAMES[MODEL_TENSOR.V_MMPROJ]
            yield own, f"{projector.format(bid=0 if module.endswith('1') else 2)}.{end}", values
        elif module == "visual.merger.norm":
            yield own, f"{gguf.TENSOR_NAMES[MODEL_TENSOR.V_POST_NORM]}.{end}", values
        elif ".attn.qkv" in module and "num_position_embeddings" not in vision:
            for letter, part in zip("qkv", np.split(values, 3), strict=True):
                new = names.get_name(own.replace("qkv", letter), try_suffixes=(".weight", ".bias"))
                assert new is not None
                yield own, new, part
        else:
            new = names.get_name(own, try_suffixes=(".weight", ".bias"))
            assert new is not None, own
            yield own, new, values
