"""Finds the files with the weights of a checkpoint, in the order in which transformers looks for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlpack.checkpoint.files import check_plain_name, locate, quote, quote_error, read_json
from vlpack.checkpoint.safetensors import MAX_HEADER_BYTES
from vlpack.errors import CheckpointError, option

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_CONVERT = (
    "If you trust its source, convert it once with transformers: `from_pretrained(folder).save_pretrained(new)` "
    "writes safetensors."
)


def find_weights(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Path], dict[str, str] | None]:
    """The weight files: name → real path and, for shards, the index's map from tensor name to file name.

    The order of preference is that of transformers: a file named in the config, the single file, then the shards. The
    files of old releases of AutoGPTQ come last.
    """
    explicit = config.get("transformers_weights")
    if explicit is not None and not isinstance(explicit, str):
        raise CheckpointError(f"{folder / 'config.json'}: transformers_weights must be a file name.")
    for name in [explicit] if explicit is not None else [_SINGLE, _INDEX, *_old_names(folder)]:
        target = locate(folder, check_plain_name(name, str(folder / "config.json")))
        if target is None:
            continue
        if not name.endswith(".index.json"):
            _check_suffix(folder / name)
            return {name: target}, None
        weight_map = _read_index(folder / name, target)
        shards = {shard: locate(folder, shard) for shard in sorted(set(weight_map.values()))}
        if missing := [shard for shard, place in shards.items() if place is None]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of the {len(shards)} files that {name} lists: "
                f"{', '.join(missing[:3])}{more}.",
                "The download is incomplete: download the missing files.",
            )
        return {shard: place for shard, place in shards.items() if place is not None}, weight_map
    raise _no_weights(folder, explicit)


def _old_names(folder: Path) -> list[str]:
    """The names of the weights or the index that an old release of AutoGPTQ wrote, such as gptq_model-4bit-128g.

    Raises:
        CheckpointError: there are several models.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.startswith("gptq_model-"))
    except OSError:
        return []  # the error is reported when no weights are found
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    found = indexes or [name for name in names if name.endswith(".safetensors")]
    if len(found) > 1 and not any(locate(folder, name) for name in (_SINGLE, _INDEX)):
        raise CheckpointError(
            f"{folder} has {len(found)} models of AutoGPTQ: {', '.join(map(quote, found[:3]))}.",
            "Keep one of them in the folder, with the quantize_config.json that belongs to it.",
        )
    return found


def _read_index(path: Path, target: Path) -> dict[str, str]:
    weight_map = read_json(path, target, limit=MAX_HEADER_BYTES, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map, an object that gives each tensor's file.")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{path}: the file of tensor {quote(name)} must be a name, not {quote(file)}.")
    for file in set(weight_map.values()):
        _check_suffix(path.parent / check_plain_name(file, str(path)))
    return weight_map


def _check_suffix(path: Path) -> None:
    if path.suffix == ".safetensors":
        return
    if path.suffix in _PICKLES:
        raise CheckpointError(f"{path} is a pickle, which can run any program when loaded.", _CONVERT)
    raise CheckpointError(f"{path} is not a safetensors file; no other weights are read.", _CONVERT)


def _no_weights(folder: Path, explicit: str | None) -> CheckpointError:
    if explicit is not None:
        return CheckpointError(f"{folder} lacks {quote(explicit)}, the weights that its config.json names.")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return CheckpointError(f"{folder} cannot be listed: {quote_error(error)}.")
    if pickles := [name for name in names if Path(name).suffix in _PICKLES]:
        return CheckpointError(
            f"{folder} has its weights only as pickles ({quote(pickles[0])}), which vlpack never loads: "
            "a pickle can run any program.",
            _CONVERT,
        )
    if "adapter_config.json" in names:
        return is_adapter(folder)
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(
            f"{folder} has a config.json, and its weights only as GGUF ({quote(gguf[0])}).",
            "Give the GGUF file itself, which has its settings inside.",
        )
    return CheckpointError(
        f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}.", "Download the checkpoint's *.safetensors files."
    )


def is_adapter(folder: Path) -> CheckpointError:
    """The error for a folder with an adapter in place of a model."""
    return CheckpointError(
        f"{folder} is an adapter, not a model.",
        f"Build the model that it was trained on, with {option('lora', folder)}.",
    )
