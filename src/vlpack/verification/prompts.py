"""What goes into a model, against what transformers puts into it: token ids, pixels, and the tokens that end an answer.

These are compared before anything is computed: where they differ, so does every later stage.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlpack.checkpoint import Checkpoint
from vlpack.preprocess.encoder_prompts import AFTER, BEFORE
from vlpack.tasks import EMBEDDING
from vlpack.verification.asking import Answers, Asked
from vlpack.verification.measure import difference
from vlpack.verification.result import Finding

PIXEL_TOLERANCE = 1e-3
"""Relative L2 of normalized pixels."""


def check_prompts(answers: Answers, checkpoint: Checkpoint, image_token_id: int | None) -> list[Finding]:
    """Token ids and pixels against those of the checkpoint's own tokenizer and image settings, in transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    for one in answers.asked:
        mine = one.prompt.input_ids[0]
        if one.case.images:  # placeholders are one token before they are expanded
            starts = np.concatenate([[True], (mine[1:] != image_token_id) | (mine[:-1] != mine[1:])])
            mine = mine[starts]
        if mine.tolist() != _ids(tokenizer, one.prompt.text, answers):
            return [Finding("prompt", f"{one.case.name}: the package's tokens are not the checkpoint's.")]
        if one.case.images and (problem := _pixels(one, answers, checkpoint)):
            return [Finding("pixels", f"{one.case.name}: {problem}")]
    return []


def _ids(tokenizer: Any, text: str, answers: Answers) -> list[int]:
    if not answers.plain:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if answers.task == EMBEDDING:  # whose vector is that of the token that the tokenizer puts last
        return list(tokenizer(text)["input_ids"])
    pieces = (BEFORE, text.removeprefix(BEFORE).removesuffix(AFTER), AFTER)  # as the published recipe does it
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def _pixels(one: Asked, answers: Answers, checkpoint: Checkpoint) -> str | None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint.folder)
    options: dict[str, Any] = {"size": dict(answers.limits)} if answers.limits else {}
    wanted = processor(images=list(one.case.images), return_tensors="np", **options)
    grid, pixels = one.prompt.grids, one.prompt.pixel_values
    assert pixels is not None
    if grid.tolist() != wanted["image_grid_thw"].tolist():
        return f"the images are {grid.tolist()} patches, transformers' {wanted['image_grid_thw'].tolist()}."
    apart = difference(pixels, wanted["pixel_values"])
    return None if apart.relative < PIXEL_TOLERANCE else f"pixels are {apart.relative:.2g} away from transformers'."


def check_stops(answers: Answers, checkpoint: Checkpoint) -> list[Finding]:
    """The tokens that end an answer, where there are any, are those of the checkpoint."""
    if answers.stops is None:
        return []
    generation = checkpoint.json("generation_config.json") or {}
    text = checkpoint.config.get("text_config") or {}
    wanted = generation.get("eos_token_id") or checkpoint.config.get("eos_token_id") or text["eos_token_id"]
    theirs = set(wanted if isinstance(wanted, list) else [wanted])
    if answers.stops == theirs:
        return []
    return [
        Finding("stop tokens", f"Answers end at {sorted(answers.stops)} where the checkpoint ends at {sorted(theirs)}.")
    ]
