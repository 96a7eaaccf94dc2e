"""The manifest's section for running an embedding model or reranker: prompts, token ids and image limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpack.architectures.base import Architecture
from vlpack.architectures.hparams import VisionFacts
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.sentence_transformers import SentenceFiles
from vlpack.export.processor_config import check_processor
from vlpack.preprocess import ImageProcessor
from vlpack.tasks import EMBEDDING, RERANKER

PLAIN, CHAT = "plain", "chat"
"""Forms of a prompt: plain text, or a conversation formatted with the chat template."""

INSTRUCTIONS = {
    (EMBEDDING, PLAIN): None,
    (EMBEDDING, CHAT): "Represent the user's input.",
    (RERANKER, PLAIN): "Given a web search query, retrieve relevant passages that answer the query",
    (RERANKER, CHAT): "Given a search query, retrieve relevant candidates that answer the query.",
}
"""Default instruction by task and form, from the models' published recipes."""

LEAST_IMAGE_TOKENS, MOST_IMAGE_TOKENS = 4, 1800
"""Limits of an image in tokens, from the published recipes; narrower than in the checkpoints' own settings."""


def encoder_section(architecture: Architecture, checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, Any]:
    """The section ``encoder`` of the manifest, as JSON data.

    Args:
        architecture: the model's architecture, with its task.
        checkpoint: the checkpoint, whose prompts and image settings are used.
        names: part → file name of its graph.

    Raises:
        CheckpointError: the prompts, tokens or image settings are not usable.
    """
    prompts, default = SentenceFiles(checkpoint).prompts()
    form = CHAT if architecture.vision else PLAIN
    section: dict[str, Any] = {
        "form": form,
        "instruction": INSTRUCTIONS[architecture.task, form],
        "prompts": prompts,
        "default_prompt": default,
        "max_length": architecture.text.context_length,
        "hidden_size": architecture.text.hidden_size,
    }
    if architecture.task == RERANKER:
        section["answers"] = dict(zip(("yes", "no"), architecture.yes_no_ids or (), strict=True))
    if architecture.vision and "vision" in names:
        check_processor(architecture.vision, ImageProcessor.from_folder(checkpoint.folder))
        section["image"] = _image(architecture.vision)
    return section


def _image(facts: VisionFacts) -> dict[str, int]:
    area = (facts.patch_size * facts.spatial_merge_size) ** 2  # pixels of one token
    return {
        "image_token_id": facts.image_token_id,
        "video_token_id": facts.video_token_id,
        "spatial_merge_size": facts.spatial_merge_size,
        "min_pixels": LEAST_IMAGE_TOKENS * area,
        "max_pixels": MOST_IMAGE_TOKENS * area,
    }
