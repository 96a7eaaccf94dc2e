"""What a checkpoint is for: generating text, embedding inputs, or scoring documents, as decided when it is built.

A reranker has the config and tensors of a generating model, and an embedding model may have them too. What cannot be
told from the checkpoint is asked for (``--task``); what was decided is said in a note and recorded in the manifest.
"""

from __future__ import annotations

import re

from vlpack.architectures.base import Architecture
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.sentence_transformers import SentenceFiles
from vlpack.errors import CheckpointError, option
from vlpack.preprocess.tokenizer import Tokenizer
from vlpack.tasks import AUTO, EMBEDDING, GENERATE, RERANKER

HEAD = "lm_head.weight"
_BARE = ("embed_tokens.weight", "language_model.embed_tokens.weight")


def decide_task(checkpoint: Checkpoint, asked: str, name: str) -> tuple[str, list[str]]:
    """The task of a checkpoint, and notes that say why.

    Args:
        checkpoint: as it lies there, its tensors not renamed yet.
        asked: one of `TASKS`, or ``auto`` for what can be told from the checkpoint.
        name: its Hub id or folder; only ever a hint in a note.

    Raises:
        CheckpointError: sentence-transformers' files ask for another pooling or score than vlpack computes.
    """
    if asked == GENERATE:
        return GENERATE, []
    files = SentenceFiles(checkpoint)
    if asked != AUTO:
        if files.task not in (None, asked):
            raise CheckpointError(
                f"{checkpoint.folder / 'modules.json'} describes a model for the task {files.task}, not {asked}.",
                f"Leave {option('task')} away, or give {option('task', files.task)}.",
            )
        return asked, []
    task, why = GENERATE, ""
    if files.task is not None:
        task, why = files.task, "modules.json of sentence-transformers says so"
    elif checkpoint.architecture.endswith("Model"):  # as transformers calls what it saves without a head
        task, why = EMBEDDING, f"{checkpoint.architecture} has no head to generate with"
    elif any(bare in checkpoint.tensors for bare in _BARE):
        task, why = EMBEDDING, "its tensors are those of a model without a head"
    if task != GENERATE:
        return task, [f"Taken as a model for the task {task}: {why}. {option('task')} chooses another one."]
    hints = {EMBEDDING: r"embed", RERANKER: r"rerank"}
    looks = [other for other, pattern in hints.items() if re.search(pattern, name, re.IGNORECASE)]
    notes = [
        f"Built to generate text, as nothing but its name ({name}) says that it is for the task {other}. "
        f"If it is, build it with {option('task', other)}."
        for other in looks
    ]
    return GENERATE, notes


def with_names_for(architecture: Architecture, checkpoint: Checkpoint, task: str) -> Checkpoint:
    """A view of the checkpoint in which tensors have the names that the architecture looks for in a model for ``task``.

    Raises:
        CheckpointError: there is no head to generate or score with, or two tensors would have one name.
    """
    named = checkpoint.renamed(architecture.renamed)
    if task != GENERATE:  # models without a head may have been saved without the prefix that it makes necessary
        names = ("embed_tokens", "layers", "norm") if architecture.vision is None else ("language_model", "visual")
        named = named.renamed({f"{name}.": f"model.{name}." for name in names})
    if task == EMBEDDING:
        return named.without(HEAD)
    if not architecture.tied and HEAD not in named.tensors:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {HEAD} is missing from the checkpoint, so it can neither generate nor score.",
            f"An embedding model has no head: build it with {option('task', EMBEDDING)}. "
            "Else the checkpoint is not complete.",
        )
    return named


def answer_ids(checkpoint: Checkpoint) -> tuple[int, int]:
    """The ids of the tokens ``yes`` and ``no``, whose logits make a reranker's score.

    Raises:
        CheckpointError: they are not tokens of their own, or the checkpoint scores by other ones.
    """
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    ids = []
    for token in ("yes", "no"):
        token_id = tokenizer.token_id(token)
        if token_id is None or tokenizer.encode(token) != [token_id]:
            raise CheckpointError(
                f"{tokenizer.where}: '{token}' is not one token, so the checkpoint cannot be a reranker of this kind.",
                f"Build it with {option('task', GENERATE)}.",
            )
        ids.append(token_id)
    SentenceFiles(checkpoint).check_answers(*ids)
    return ids[0], ids[1]
