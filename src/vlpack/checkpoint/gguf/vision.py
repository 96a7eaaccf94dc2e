"""The settings of a vision encoder in a GGUF file of its own (mmproj), as those of a Hugging Face checkpoint.

The metadata has sizes under keys such as ``clip.vision.embedding_length``, and the kind of the model under
``clip.projector_type``. What it lacks (how large images and videos may be, and the side of Qwen2.5-VL's attention
windows) is taken from the settings that Qwen has published, as a note for the user says.

Sources: ``Qwen3VLVisionModel`` and ``Qwen2VLVisionModel`` of llama.cpp's ``convert_hf_to_gguf.py``; ``Keys.ClipVision``
in ``gguf/constants.py`` of the package ``gguf`` 0.19; config.json and preprocessor_config.json of Qwen's checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlpack.checkpoint.config import Section, is_finite
from vlpack.checkpoint.files import parse_json, quote
from vlpack.checkpoint.gguf.header import Entry
from vlpack.checkpoint.gguf.settings import architecture_of
from vlpack.checkpoint.gguf.vision_names import QWEN2, QWEN2_5, QWEN3, Names, deepstack_blocks
from vlpack.errors import CheckpointError

VISION = "clip"
"""The architecture in the metadata of a file with a vision encoder."""
IMAGES, VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"
"""Names of the files with the settings of the image and the video processor."""
FRAMES = 2
"""Number of frames in a patch; llama.cpp has two convolutions, one for each."""
WINDOW = 112
"""Side of an attention window of Qwen2.5-VL in pixels, which llama.cpp does not write into the file."""
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""Setting in config.json → the token whose id it is."""


@dataclass(frozen=True)
class Family:
    """A family of vision-language models.

    Args:
        title: name of the family, for people.
        model_class: class in transformers.
        model_type: model type in transformers.
        names: names of the vision encoder's tensors.
        pixels: smallest and largest area of an image in the published settings, in square pixels.
        videos: the same for all frames of a video together; None if the image settings are those of videos too.
        interleaved: whether M-RoPE's axes alternate.
    """

    title: str
    model_class: str
    model_type: str
    names: Names
    pixels: tuple[int, int]
    videos: tuple[int, int] | None = None
    interleaved: bool = False


_QWEN3_PIXELS: dict[str, Any] = {"pixels": (65536, 16777216), "videos": (4096, 25165824), "interleaved": True}
_QWEN2_PIXELS = (3136, 12845056)
FAMILIES = {
    ("qwen3vl", "qwen3vl_merger"): Family(
        "Qwen3-VL", "Qwen3VLForConditionalGeneration", "qwen3_vl", QWEN3, **_QWEN3_PIXELS
    ),
    ("qwen3vlmoe", "qwen3vl_merger"): Family(
        "Qwen3-VL", "Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", QWEN3, **_QWEN3_PIXELS
    ),
    ("qwen2vl", "qwen2vl_merger"): Family(
        "Qwen2-VL", "Qwen2VLForConditionalGeneration", "qwen2_vl", QWEN2, _QWEN2_PIXELS
    ),
    ("qwen2vl", "qwen2.5vl_merger"): Family(
        "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", QWEN2_5, _QWEN2_PIXELS
    ),
}
"""The families, by the architecture of the decoder's file and the projector type of the vision encoder's."""


def family_of(decoder: str, metadata: Section) -> Family:
    """The family that a decoder and a vision encoder form.

    Args:
        decoder: architecture in the metadata of the decoder's file.
        metadata: metadata of the vision encoder's file.

    Raises:
        CheckpointError: the file has no vision encoder, or one of another kind of model.
    """
    where, name = metadata.where.removesuffix(": metadata"), architecture_of(metadata)
    if name != VISION:
        raise CheckpointError(
            f"{where} has no vision encoder: its architecture is {name!r:.60}, not {VISION!r}.",
            "Give the file that is called mmproj-….gguf beside the model.",
        )
    found = metadata.values.get("clip.projector_type") or metadata.values.get("clip.vision.projector_type")
    taken = [projector for architecture, projector in FAMILIES if architecture == decoder]
    if found not in taken:
        needed = f"needs one of the type {' or '.join(taken)}" if taken else "is built for text alone"
        raise CheckpointError(
            f"{where}: the vision encoder is of the type {found!r:.60}, and a model of the architecture "
            f"{decoder!r:.60} {needed}.",
            "Take both files from the same model, or leave the vision encoder out.",
        )
    return FAMILIES[decoder, str(found)]


def vision_config(metadata: Section, entries: Mapping[str, Entry], family: Family) -> dict[str, Any]:
    """The ``vision_config`` of config.json.

    Args:
        metadata: metadata of the vision encoder's file.
        entries: its tensors, by their names in the file.
        family: family of the model.

    Raises:
        CheckpointError: a setting is missing, out of range or not supported, or the tensors do not fit it.
    """
    # not read: ``attention.layer_norm_epsilon``, in which the converter writes the decoder's epsilon, whereas
    # transformers has a fixed one; Qwen2-VL's ``feed_forward_length``, in which it writes the width of the result
    size = metadata.integer("clip.vision.embedding_length", high=1 << 16)
    depth = metadata.integer("clip.vision.block_count", high=1024)
    silu = family.names is QWEN2_5
    for key, wanted in (("clip.use_silu", silu), ("clip.use_gelu", family.names is QWEN3)):
        if metadata.flag(key, wanted) != wanted:
            raise CheckpointError(f"{metadata.where}: '{key}' is {not wanted}; {family.title} has another activation.")
    config: dict[str, Any] = {
        "model_type": "qwen3_vl_vision" if family.names is QWEN3 else family.model_type,
        "depth": depth,
        "num_heads": metadata.integer("clip.vision.attention.head_count", high=1 << 10),
        "patch_size": metadata.integer("clip.vision.patch_size", high=256),
        "temporal_patch_size": FRAMES,
        "spatial_merge_size": metadata.integer("clip.vision.spatial_merge_size", 2, high=16),
        "in_channels": 3,
    }
    out = metadata.integer("clip.vision.projection_dim", high=1 << 20)
    if family.names is QWEN2:
        first = entries.get("v.blk.0.ffn_up.weight")
        inner = 0 if first is None or len(first.shape) != 2 else max(first.shape)
        if not inner or inner % size:
            raise CheckpointError(
                f"{metadata.where.removesuffix(': metadata')}: the tensor v.blk.0.ffn_up.weight must be a matrix of "
                f"{size} columns and a multiple of {size} rows."
            )
        return {**config, "embed_dim": size, "hidden_size": out, "mlp_ratio": inner // size, "hidden_act": "quick_gelu"}
    config |= {"hidden_size": size, "out_hidden_size": out}
    config["intermediate_size"] = metadata.integer("clip.vision.feed_forward_length", high=1 << 20)
    if silu:
        each = metadata.integer("clip.vision.n_wa_pattern", high=1024)
        side = metadata.integer("clip.vision.window_size", WINDOW, high=1 << 16)
        full = list(range(each - 1, depth, each))
        return {**config, "hidden_act": "silu", "fullatt_block_indexes": full, "window_size": side,
                "tokens_per_second": 2}  # fmt: skip
    places = entries.get("v.position_embd.weight")
    return {
        **config,
        "hidden_act": "gelu_pytorch_tanh",
        "num_position_embeddings": 0 if places is None else places.shape[0],
        "deepstack_visual_indexes": _deepstack(metadata, entries, depth),
    }


def _deepstack(metadata: Section, entries: Mapping[str, Entry], depth: int) -> list[int]:
    """The indexes of the blocks whose output is a DeepStack level.

    Raises:
        CheckpointError: the metadata and the tensors name different blocks.
    """
    key, stored = "clip.vision.is_deepstack_layers", deepstack_blocks(entries)
    flags = metadata.values.get(key)
    if flags is None:
        flags = [index in stored for index in range(depth)]
    if not isinstance(flags, list) or len(flags) != depth or not all(isinstance(flag, bool) for flag in flags):
        raise CheckpointError(f"{metadata.where}: '{key}' must be a list of {depth} truth values, one for each block.")
    indexes = [index for index, flag in enumerate(flags) if flag]
    if indexes != stored:
        raise CheckpointError(
            f"{metadata.where}: '{key}' names the blocks {indexes}, but there are tensors v.deepstack of the blocks "
            f"{stored}.",
            "The file is damaged or incomplete; download or convert it again.",
        )
    return indexes


def check_match(metadata: Section, vision: Section, config: Mapping[str, Any]) -> None:
    """Checks that a vision encoder belongs to a decoder.

    Args:
        metadata: metadata of the decoder's file.
        vision: metadata of the vision encoder's file.
        config: the ``vision_config``.

    Raises:
        CheckpointError: the sizes differ, so they are parts of different models.
    """
    name = architecture_of(metadata)
    keys = [(f"{name}.embedding_length", "clip.vision.projection_dim", vision.values["clip.vision.projection_dim"])]
    if f"{name}.n_deepstack_layers" in metadata:
        levels = len(config.get("deepstack_visual_indexes", ()))
        keys.append((f"{name}.n_deepstack_layers", "clip.vision.is_deepstack_layers", levels))
    for key, other, found in keys:
        if metadata.values[key] != found:
            raise CheckpointError(
                f"{vision.where.removesuffix(': metadata')} belongs to another model than "
                f"{metadata.where.removesuffix(': metadata')}: {other} gives {found}, and {key} "
                f"{metadata.values[key]!r:.60}.",
                "Take both files from the same model, of the same size.",
            )


def whole_config(
    metadata: Section,
    decoder: Mapping[str, Any],
    vision: Mapping[str, Any],
    family: Family,
    ids: Mapping[str, int],
) -> dict[str, Any]:
    """The config.json of a model with a vision encoder.

    Args:
        metadata: metadata of the decoder's file.
        decoder: config.json of the decoder alone.
        vision: the ``vision_config``.
        family: family of the model.
        ids: ids of the tokens of `TOKENS`, as far as they are known.

    Raises:
        CheckpointError: the sections of M-RoPE are missing.
    """
    outside = ("architectures", "dtype", "tie_word_embeddings")
    text = {key: value for key, value in decoder.items() if key not in outside}
    sections = metadata.integers(f"{architecture_of(metadata)}.rope.dimension_sections")
    rope = {"rope_type": "default", **(decoder.get("rope_scaling") or {}), "mrope_section": sections[:3]}
    if family.interleaved:
        rope["mrope_interleaved"] = True
    text |= {"model_type": f"{family.model_type}_text", "rope_scaling": rope}
    return {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        **{key: decoder[key] for key in outside[1:]},
        **ids,
        "text_config": text,
        "vision_config": dict(vision),
    }


def token_ids(metadata: Section, tokenizer: bytes | None) -> dict[str, int]:
    """The ids of the tokens of `TOKENS`, by their names in config.json; none if there is no tokenizer.

    Args:
        metadata: metadata of the decoder's file.
        tokenizer: a tokenizer.json that is used in place of the metadata; None for none.

    Raises:
        CheckpointError: the tokenizer lacks one of the tokens.
    """
    if tokenizer is None:
        tokens = metadata.values.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            return {}
        places = {token: number for number, token in enumerate(tokens) if token in TOKENS.values()}
    else:
        added = parse_json(tokenizer, "tokenizer.json").get("added_tokens")
        entries = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
        places = {
            one["content"]: one["id"]
            for one in entries
            if one.get("content") in TOKENS.values() and type(one.get("id")) is int
        }
    missing = [token for token in TOKENS.values() if token not in places]
    if missing:
        raise CheckpointError(
            f"{metadata.where.removesuffix(': metadata')}: the tokenizer has no token {', '.join(missing)}, which a "
            "model that sees needs."
        )
    return {name: places[token] for name, token in TOKENS.items()}


def processor_files(vision: Section, config: Mapping[str, Any], family: Family) -> dict[str, bytes]:
    """The settings files of the image and the video processor, by name.

    Args:
        vision: metadata of the vision encoder's file.
        config: the ``vision_config``.
        family: family of the model, whose published limits are used if the file has none.

    Raises:
        CheckpointError: a setting is out of range.
    """
    sizes = {
        "patch_size": config["patch_size"],
        "temporal_patch_size": config["temporal_patch_size"],
        "merge_size": config["spatial_merge_size"],
        "image_mean": _channels(vision, "clip.vision.image_mean"),
        "image_std": _channels(vision, "clip.vision.image_std"),
    }
    keys = ("clip.vision.image_min_pixels", "clip.vision.image_max_pixels")
    low, high = (vision.integer(key, default) for key, default in zip(keys, family.pixels, strict=True))
    kinds: dict[str, dict[str, Any]] = {
        IMAGES: {"image_processor_type": "Qwen2VLImageProcessor", "size": {"shortest_edge": low, "longest_edge": high}}
    }
    if family.videos is not None:
        low, high = family.videos
        size = {"shortest_edge": low, "longest_edge": high}
        kinds[VIDEOS] = {"video_processor_type": "Qwen3VLVideoProcessor", "size": size}
    return {name: json.dumps({**sizes, **own}, indent=2).encode() for name, own in kinds.items()}


def _channels(vision: Section, key: str) -> list[float]:
    """Three numbers, one for each colour."""
    values = vision.values.get(key)
    if not isinstance(values, list) or len(values) != 3 or not all(map(is_finite, values)):
        raise CheckpointError(f"{vision.where}: '{key}' is {quote(values)}; it must be a list of three numbers.")
    if key.endswith("std") and min(values) <= 0:
        raise CheckpointError(f"{vision.where}: '{key}' is {quote(values)}; its numbers must be above zero.")
    return values


def assumed(
    file: str, vision: Section, family: Family, given: Mapping[str, bytes], ids: Mapping[str, int]
) -> list[str]:
    """The note about settings that neither file has; none if they have all.

    Args:
        file: name of the vision encoder's file.
        vision: its metadata.
        family: family of the model.
        given: files of the user with settings, by name.
        ids: ids of tokens that are known.
    """
    taken = []
    if not {IMAGES, "processor_config.json"} & given.keys() and "clip.vision.image_max_pixels" not in vision:
        taken.append("images of {} to {} pixels".format(*family.pixels))
    if family.videos is not None and not {VIDEOS, "processor_config.json"} & given.keys():
        taken.append("videos of {} to {} pixels in all frames, two frames per second".format(*family.videos))
    if family.names is QWEN2_5:
        taken.append(f"windows of {WINDOW} pixels, two positions per second")
    if not ids:
        taken.append("the token ids of images and videos")
    if not taken:
        return []
    return [
        f"{file} does not have all settings, so these are the published ones of {family.title}: {'; '.join(taken)}. "
        f"{IMAGES} and {VIDEOS} of the original model, in one folder with the GGUF files, take precedence."
    ]
