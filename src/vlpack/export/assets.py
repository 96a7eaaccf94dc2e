"""Writes the files beside the graphs: runtime and processor settings, README, and copies of the checkpoint's files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlpack.architectures import Architecture
from vlpack.architectures.hparams import VisionFacts
from vlpack.architectures.ports import GraphOptions
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.config import Section
from vlpack.checkpoint.files import locate
from vlpack.errors import CheckpointError
from vlpack.export.genai_config import genai_config, search_notes
from vlpack.export.model_card import model_card
from vlpack.export.processor_config import grid_difference, processor_config
from vlpack.export.retrieval import CHAT
from vlpack.export.retrieval_card import encoder_card
from vlpack.preprocess import ImageProcessor, PromptBuilder, Tokenizer
from vlpack.preprocess.prompt_builder import check_vision_start
from vlpack.quantize.policy import Policy

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
"""Files of the checkpoint that are copied into the package unchanged, if they exist."""

MAX_COPIED_BYTES = 100_000_000
"""Largest file that is copied, in bytes; the largest real ones are tokenizers of about ten megabytes."""

_VIDEO_SETTINGS = "video_preprocessor_config.json"


def write_beside(
    folder: Path,
    architecture: Architecture,
    checkpoint: Checkpoint,
    policy: Policy,
    names: Mapping[str, str],
    origin: Mapping[str, Any],
    encoder: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes all files of a package except the graphs, their data and the manifest.

    Args:
        folder: the package's folder.
        architecture: the checkpoint's architecture.
        checkpoint: the checkpoint, whose tokenizer and settings are copied.
        policy: the precision policy.
        names: part → file name of its graph.
        origin: the package's origin, as in the manifest's ``source``.
        encoder: result of `encoder_section` for an embedding model or reranker; None for a model that generates.

    Returns:
        Notes for the user.

    Raises:
        CheckpointError: a setting, the tokenizer or the chat template is not usable.
    """
    for name in COPIED:
        if encoder is None or name != "generation_config.json":
            _copy(checkpoint, name, folder)
    if encoder is not None:
        return _write_encoder(folder, architecture, checkpoint, policy, names, origin, encoder)
    generation = checkpoint.json("generation_config.json") or {}
    options = GraphOptions.of_policy(policy)
    _, cache_channels = options.cache_of(architecture.text)
    config = genai_config(
        architecture,
        names,
        policy.provider,
        Section(checkpoint.config),
        generation,
        shared_cache=options.grouped_kernel,
        cache_channels=cache_channels,
    )
    _write_json(folder / "genai_config.json", config)
    difference = None
    if "vision" in names:
        _write_image_settings(folder, checkpoint)
        processor = ImageProcessor.from_folder(checkpoint.folder)
        _write_json(folder / "processor_config.json", processor_config(architecture, processor))
        difference = grid_difference(processor)
    card = model_card(
        origin,
        policy,
        config["model"]["type"],
        names,
        decoder_inputs=config["model"].get("decoder", {}).get("inputs", ()),
        difference=difference,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    notes = search_notes(generation) if {"text", "decoder"} & set(names) else []
    return notes + _check_prompts(folder, checkpoint, architecture.vision if "vision" in names else None)


def _check_prompts(folder: Path, checkpoint: Checkpoint, vision: VisionFacts | None) -> list[str]:
    """Checks tokenizer and chat template at build time, before the package is used. Returns notes for the user."""
    if not (folder / "tokenizer.json").is_file():
        return ["The checkpoint has no tokenizer.json, so the package runs on token ids only; `vlpack run` needs one."]
    note = None
    templates = ("chat_template.jinja", "chat_template.json")
    in_config = (checkpoint.json("tokenizer_config.json") or {}).get("chat_template") is not None
    if not (folder / "tokenizer_config.json").is_file():
        note = "The checkpoint has no tokenizer_config.json, so the runtime's own tokenizer cannot open the package."
    elif not in_config and not any((folder / name).is_file() for name in templates):
        note = "The checkpoint has no chat template, so `vlpack run` will not work; the runtime itself needs none."
    if note:
        tokenizer = Tokenizer.from_folder(checkpoint.folder)
    else:
        image_token_id = None if vision is None else vision.image_token_id
        tokenizer = PromptBuilder.from_folder(checkpoint.folder, image_token_id=image_token_id).tokenizer
    if vision is not None:
        check_vision_start(tokenizer, vision.vision_start_token_id)
    return [note] if note else []


def _write_encoder(
    folder: Path,
    architecture: Architecture,
    checkpoint: Checkpoint,
    policy: Policy,
    names: Mapping[str, str],
    origin: Mapping[str, Any],
    encoder: Mapping[str, Any],
) -> list[str]:
    """Writes the files of an embedding model or reranker; without runtime settings, as plain onnxruntime runs it."""
    if "image" in encoder:
        _write_image_settings(folder, checkpoint)
    parts = {part.name: part for part in architecture.parts(GraphOptions())}
    if "text" in names:
        parts["text"] = architecture.text_part(GraphOptions())
    card = encoder_card(origin, policy, architecture.task, encoder, names, parts)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if encoder["form"] == CHAT:
        PromptBuilder.from_folder(checkpoint.folder, image_token_id=encoder.get("image", {}).get("image_token_id"))
    else:
        Tokenizer.from_folder(checkpoint.folder)
    return []


def _write_image_settings(folder: Path, checkpoint: Checkpoint) -> None:
    whole = checkpoint.json("processor_config.json") or {}
    for key, name in (("image_processor", "preprocessor_config.json"), ("video_processor", _VIDEO_SETTINGS)):
        # transformers 5 nests these settings in processor_config.json; a package's file of that name is the runtime's
        if isinstance(nested := whole.get(key), dict):
            _write_json(folder / name, nested)


def _copy(checkpoint: Checkpoint, name: str, folder: Path) -> None:
    """Copies a file of the checkpoint into the package, if it exists. Links out of the checkpoint are refused."""
    target = locate(checkpoint.folder, name)
    if target is None:
        return
    if not target.is_file():
        raise CheckpointError(f"{checkpoint.folder / name} is not a regular file.")
    if (size := target.stat().st_size) > MAX_COPIED_BYTES:
        raise CheckpointError(
            f"{checkpoint.folder / name} has {size} bytes; more than {MAX_COPIED_BYTES} are not read."
        )
    if not os.access(target, os.R_OK):
        raise CheckpointError(f"{checkpoint.folder / name} cannot be read: permission denied.")
    shutil.copyfile(target, folder / name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
