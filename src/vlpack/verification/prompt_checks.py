"""Compares a model's inputs with those that transformers makes: token ids, pixels and the tokens that end an answer.

This comes before anything is computed, because different inputs make every later stage differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.architectures.hparams import VisionFacts
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.preprocess.prompt_builder import VISION_END, VISION_START
from vlpack.preprocess.retrieval_prompts import AFTER, BEFORE
from vlpack.preprocess.video import ProcessedVideo, VideoProcessor
from vlpack.tasks import EMBEDDING
from vlpack.verification.answers import Answers, Asked
from vlpack.verification.metrics import difference
from vlpack.verification.result import Finding

Arrays = Mapping[str, npt.NDArray[Any]]
PIXEL_TOLERANCE = 1e-3
"""Largest relative L2 error of normalized pixels that rounding explains."""


def check_prompts(answers: Answers, checkpoint: Checkpoint, facts: VisionFacts | None) -> list[Finding]:
    """Compare token ids and pixels with those that transformers makes from the checkpoint's tokenizer and settings.

    transformers' video processor needs torchvision, so videos are compared with vlpack's own video processor, which
    reads the checkpoint's settings. The tests prove that it equals transformers'.

    Returns:
        the first difference, or nothing.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    for one in answers.asked:
        text, mine, arrays, videos = one.prompt.text, one.prompt.input_ids[0], {}, _videos(one, checkpoint)
        if facts is not None and one.prompt.has_images:
            image = facts.image_token_id
            arrays = one.prompt.transformers_arrays(image, facts.video_token_id)
            # before its expansion, the placeholder of an image is a single token
            mine = mine[np.concatenate([[True], (mine[1:] != image) | (mine[:-1] != mine[1:])])]
            video, still = (str(tokenizer.convert_ids_to_tokens(token)) for token in (facts.video_token_id, image))
            for clip in videos:
                patches = (f"<{stamp:.1f} seconds>{VISION_START}{still}{VISION_END}" for stamp in clip.timestamps)
                text = text.replace(video, "".join(patches), 1)
        if videos and (problem := _other_video(one, arrays, videos)):
            return [Finding("pixels", f"{one.case.name}: {problem}")]
        if mine.tolist() != _ids(tokenizer, text, answers):
            return [Finding("prompt", f"{one.case.name}: the package's token ids are not the checkpoint's.")]
        if one.case.images and (problem := _pixels(one, arrays, answers, checkpoint)):
            return [Finding("pixels", f"{one.case.name}: {problem}")]
    return []


def _videos(one: Asked, checkpoint: Checkpoint) -> list[ProcessedVideo]:
    if not one.case.videos:
        return []
    processor = VideoProcessor.from_folder(checkpoint.folder)
    return [processor(source, one.case.video_options) for source in one.case.videos]


def _other_video(one: Asked, arrays: Arrays, wanted: Sequence[ProcessedVideo]) -> str | None:
    mine, theirs = [list(clip.grid_thw) for clip in one.prompt.videos], [list(clip.grid_thw) for clip in wanted]
    if mine != theirs:
        return f"the video's grid is {mine} patches in time, height and width; the checkpoint's settings make {theirs}."
    if [clip.timestamps for clip in one.prompt.videos] != [clip.timestamps for clip in wanted]:
        return "the video's frames are taken at other times than with the checkpoint's settings."
    apart = difference(arrays["pixel_values_videos"], np.concatenate([clip.pixel_values for clip in wanted]))
    if apart.relative < PIXEL_TOLERANCE:
        return None
    return f"the video's pixels differ from the checkpoint's by {apart.relative:.2g} (relative L2)."


def _ids(tokenizer: Any, text: str, answers: Answers) -> list[int]:
    if not answers.plain:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if answers.task == EMBEDDING:  # the tokenizer appends the token whose hidden state is the vector
        return list(tokenizer(text)["input_ids"])
    # the pieces are tokenized one by one, as in the published recipe
    pieces = (BEFORE, text.removeprefix(BEFORE).removesuffix(AFTER), AFTER)
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def _pixels(one: Asked, arrays: Arrays, answers: Answers, checkpoint: Checkpoint) -> str | None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint.folder)
    options: dict[str, Any] = {"size": dict(answers.limits)} if answers.limits else {}
    wanted = processor(images=list(one.case.images), return_tensors="np", **options)
    grid, pixels = arrays["image_grid_thw"], arrays["pixel_values"]
    if grid.tolist() != wanted["image_grid_thw"].tolist():
        return f"the images have {grid.tolist()} patches, in transformers {wanted['image_grid_thw'].tolist()}."
    apart = difference(pixels, wanted["pixel_values"])
    if apart.relative < PIXEL_TOLERANCE:
        return None
    return f"the pixels differ from transformers' by {apart.relative:.2g} (relative L2)."


def check_stops(answers: Answers, checkpoint: Checkpoint) -> list[Finding]:
    """Check that the tokens that end the package's answers, if it generates, are those of the checkpoint."""
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
