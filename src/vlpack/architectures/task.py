"""The task that a checkpoint is built for: generating text, embedding inputs or scoring documents (reranking).

A reranker has the config and tensors of a generating model, and an embedding model may have them too. If the checkpoint
does not show its task, the user chooses it (option ``task``). The build reports the decision in a note and records it
in the manifest.
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
    """Decide the task of a checkpoint.

    Args:
        checkpoint: the checkpoint with its original tensor names.
        asked: the task that the user chose, or ``auto`` to recognize it by the checkpoint.
        name: the checkpoint's Hub id or folder; it never decides, but may lead to a note.

    Returns:
        the task, and notes for the user that explain it.

    Raises:
        CheckpointError: sentence-transformers' files describe another task, or a pooling or score that vlpack does not
            compute.
    """
    if asked == GENERATE:
        return GENERATE, []
    files = SentenceFiles(checkpoint)
    if asked != AUTO:
        if files.task not in (None, asked):
            raise CheckpointError(
                f"{checkpoint.folder / 'modules.json'} describes a model for the task {files.task}, not {asked}.",
                f"Leave out {option('task')}, or give {option('task', files.task)}.",
            )
        return asked, []
    task, why = GENERATE, ""
    if files.task is not None:
        task, why = files.task, "modules.json of sentence-transformers says so"
    elif checkpoint.architecture.endswith("Model"):  # transformers' name for a model saved without a head
        task, why = EMBEDDING, f"{checkpoint.architecture} has no head to generate with"
    elif any(bare in checkpoint.tensors for bare in _BARE):
        task, why = EMBEDDING, "its tensors are those of a model without a head"
    if task != GENERATE:
        return task, [f"Built for the task {task}: {why}. {option('task')} chooses another one."]
    hints = {EMBEDDING: r"embed", RERANKER: r"rerank"}
    looks = [other for other, pattern in hints.items() if re.search(pattern, name, re.IGNORECASE)]
    notes = [
        f"Built to generate text. Only the name {name} suggests that the model is for the task {other}: "
        f"if it is, build it with {option('task', other)}."
        for other in looks
    ]
    return GENERATE, notes


def with_names_for(architecture: Architecture, checkpoint: Checkpoint, task: str) -> Checkpoint:
    """A view of the checkpoint whose tensors have the names that the architecture expects for ``task``.

    Raises:
        CheckpointError: the head that the task needs is missing, or two tensors would get the same name.
    """
    named = checkpoint.renamed(architecture.renamed)
    if task != GENERATE:  # a model saved without a head may lack the prefix "model."
        names = ("embed_tokens", "layers", "norm") if architecture.vision is None else ("language_model", "visual")
        named = named.renamed({f"{name}.": f"model.{name}." for name in names})
    if task == EMBEDDING:
        return named.without(HEAD)
    if not architecture.tied and HEAD not in named.tensors:
        raise CheckpointError(
            f"{checkpoint.place}: tensor {HEAD} is missing from the checkpoint, so it can neither generate nor score.",
            f"If it is an embedding model, which has no head, build it with {option('task', EMBEDDING)}. "
            "Otherwise the checkpoint is incomplete.",
        )
    return named


def yes_no_token_ids(checkpoint: Checkpoint) -> tuple[int, int]:
    """The ids of the tokens ``yes`` and ``no``, from whose logits a reranker's score is computed.

    Raises:
        CheckpointError: yes or no is not a single token, or the checkpoint scores by other tokens.
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
