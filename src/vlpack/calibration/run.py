"""The start of a calibration: collects the texts and prepares the measurement of the decoder's activations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from vlpack.calibration.hessians import Calibration
from vlpack.calibration.options import SELF, ReportProgress
from vlpack.calibration.prompts import (
    WRITTEN,
    conversations_of,
    of_one_length,
    openings,
    passages,
    pictured,
    prompt_builder,
    retrieval,
    texts_of,
)
from vlpack.calibration.teacher import CalibrationModel
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import OptionError, option
from vlpack.export.graph import Weight
from vlpack.package.genai import eos_ids
from vlpack.package.manifest import read_manifest
from vlpack.preprocess.prompt import Prompt
from vlpack.preprocess.tokenizer import Tokenizer
from vlpack.quantize.transforms import Transform
from vlpack.runtime.retrieval import prompt_form
from vlpack.tasks import GENERATE

SEED = 0
INSTRUCTION = "Given a search query, retrieve relevant passages that answer the query"
"""Instruction for queries if the model has no default instruction."""
JSONL = ".jsonl"
"""File-name suffix of files of conversations; files with any other suffix contain plain text."""


def start_calibration(
    model: CalibrationModel,
    weights: Iterable[Weight],
    transforms: Mapping[str, Transform],
    checkpoint: Checkpoint,
    source: str | os.PathLike[str],
    progress: ReportProgress,
) -> Calibration:
    """Collects the calibration texts and returns a calibration, from which Hessians can be requested.

    Args:
        model: 8-bit package of the whole model.
        weights: matrices whose Hessians will be requested.
        transforms: transforms of the 8-bit package's matrices, by path.
        checkpoint: checkpoint of both packages.
        source: `SELF`, the path of a plain-text file, or the path of a file of conversations, which ends with `JSONL`.
        progress: function to which each step is reported.

    Raises:
        OptionError: the file cannot be used.
        InputError: a line of the file or one of its images cannot be used.
        PackageError: onnxruntime cannot load the package.
    """
    vision = model.architecture.vision
    image = vision.image_token_id if vision else None
    prompts = prompt_builder(model.folder, image)
    # a second tokenizer would take a hundred megabytes
    tokenizer = Tokenizer.from_folder(model.folder) if prompts is None else prompts.tokenizer
    texts: list[list[int]] = []
    asked: list[Prompt] = []
    task = model.architecture.task
    if source == SELF and task != GENERATE:
        section = read_manifest(model.folder)["encoder"]
        form = prompt_form(model.folder, section["form"], section.get("image"))
        asked = retrieval(form, task, section["instruction"] or INSTRUCTION, sees=vision is not None)
    elif source == SELF:
        begun = openings(prompts, tokenizer)

        def written(tokens: int) -> None:
            progress("writing calibration texts", tokens, len(begun) * WRITTEN)

        written(0)
        ends = eos_ids(json.loads((model.folder / "genai_config.json").read_text(encoding="utf-8")))
        texts = model.write(begun, WRITTEN, ends, SEED, written) + passages(prompts, tokenizer)
    elif task != GENERATE and Path(source).suffix.lower() == JSONL:
        raise OptionError(
            f"{source} contains conversations, which a model for the task {task} cannot use.",
            f"Give a plain-text file, *.txt, or use {option('calibrate', 'self')} for the built-in texts.",
        )
    elif Path(source).suffix.lower() == JSONL:
        asked = conversations_of(Path(source).expanduser(), prompts)
    else:
        texts = texts_of(Path(source).expanduser(), tokenizer)
    if (
        task == GENERATE
        and vision is not None
        and prompts is not None
        and not any(prompt.has_images for prompt in asked)
    ):
        asked += pictured(prompts)
    shown = [model.show(np.array(together, np.int64)) for together in of_one_length(texts)]
    shown += [model.show(prompt.input_ids.astype(np.int64), prompt) for prompt in asked]
    described = {
        "texts": ("the model's own" if task == GENERATE else "built in") if source == SELF else "a file",
        "pictures": sum(len(prompt.grids) for prompt in asked),
        "tokens": sum(one.tokens for one in shown),
    }

    def looked(layer: int, layers: int) -> None:
        progress("calibrating layers", layer, layers)

    return Calibration(model, weights, transforms, checkpoint, shown, described, looked)
