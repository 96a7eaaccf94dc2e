"""The files beside the graphs: runtime and processor configs, model card, and what the checkpoint hands on whole."""

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
"""Files that go into the package whole, where the checkpoint has them."""

MAX_COPIED_BYTES = 100_000_000
"""Of each of them; the largest real ones are tokenizers of some ten megabytes."""

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
    """Write everything but the graphs and the manifest.

    Args:
        folder: the package.
        architecture: of the checkpoint.
        checkpoint: whose tokenizer and settings go along.
        policy: the precision policy.
        names: part → file name of its graph.
        origin: the source, as the manifest names it.
        encoder: `encoder_section`'s, for a model that does not generate.

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
    """What is wrong with tokenizer or template is told now, not when the package is first used."""
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
    """The files beside graphs that do not generate: no runtime's config, as plain onnxruntime runs them."""
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
        if isinstance(nested := whole.get(key), dict):  # transformers 5 keeps settings there; here it is the runtime's
            _write_json(folder / name, nested)


def _copy(checkpoint: Checkpoint, name: str, folder: Path) -> None:
    """A file of the checkpoint into the package, where there is one; links that lead out of it are refused."""
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
