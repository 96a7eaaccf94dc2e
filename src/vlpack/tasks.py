"""What a model is for: generating text, embedding inputs, or scoring documents. Decided once, when it is built.

A reranker has the config and tensors of a generating model, and an embedding model may have; so what cannot be told
from the checkpoint is asked for (``--task``), and what was taken is said in a note and recorded in the manifest.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlpack.checkpoint.sentence_transformers import SentenceFiles
from vlpack.errors import CheckpointError, OptionError, PackageError
from vlpack.preprocess.tokenizer import Tokenizer

if TYPE_CHECKING:
    from vlpack.architectures import Architecture
    from vlpack.checkpoint.checkpoint import Checkpoint
    from vlpack.options import ExtraOptions

GENERATE, EMBEDDING, RERANKER = "generate", "embedding", "reranker"
TASKS = (GENERATE, EMBEDDING, RERANKER)
AUTO = "auto"


HEAD = "lm_head.weight"
_BARE = ("embed_tokens.weight", "language_model.embed_tokens.weight")
_USES = {
    GENERATE: ("generates text", "vlpack run PACKAGE", ".generate(…)"),
    EMBEDDING: ("embeds its inputs", "vlpack embed PACKAGE TEXT", ".embed([…])"),
    RERANKER: ("scores documents", "vlpack score PACKAGE QUERY DOCUMENT", ".score(query, documents)"),
}
_METHODS = ("generate", "stream", "embed", "score")


def check_task(task: str) -> None:
    """Raises an OptionError where ``task`` is none of those that a build takes."""
    if task not in (AUTO, *TASKS):
        raise OptionError(f"Unknown task '{task}'.", f"Tasks are {', '.join((AUTO, *TASKS))}.")


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
                f"Leave --task away, or give --task {files.task}.",
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
        return task, [f"Taken as a model for the task {task}: {why}. --task chooses another one."]
    hints = {EMBEDDING: r"embed", RERANKER: r"rerank"}
    looks = [other for other, pattern in hints.items() if re.search(pattern, name, re.IGNORECASE)]
    notes = [
        f"Built to generate text, as nothing but its name ({name}) says that it is for the task {other}. "
        f"If it is, build it with --task {other}."
        for other in looks
    ]
    return GENERATE, notes


def check_task_options(extra: ExtraOptions, task: str, precision: str) -> None:
    """Every option that was given changes something in a package for ``task``.

    Raises:
        OptionError: one does not: such a package has no head over the vocabulary, and always embeds its tokens.
    """
    if task in (GENERATE, AUTO):
        return
    if extra.kv_cache is not None:
        raise OptionError(f"kv_cache has no effect on a model for the task {task}, which keeps no cache.")
    for name in ("prune_lm_head", "exclude_embeds", "shared_embeddings"):
        if getattr(extra, name) is not None:
            raise OptionError(
                f"{name} has no effect on a model for the task {task}, which has no head over the vocabulary."
                if name != "exclude_embeds"
                else f"exclude_embeds is an option of models that generate; this one is for the task {task}."
            )
    if extra.algo_config == "rtn_last" or "last_matmul" in (extra.matmul_mixed_precision or {}):
        raise OptionError(
            f"rtn_last and last_matmul choose the head's bits; a model for the task {task} has no head over the "
            "vocabulary."
        )
    if extra.accuracy_level is not None and precision != "int4":
        raise OptionError(f"accuracy_level has no effect with precision {precision} on a model for the task {task}.")


def prepare_task(architecture: Architecture, checkpoint: Checkpoint, task: str) -> None:
    """Tell the architecture its task, and call the checkpoint's tensors what it will look for.

    Raises:
        CheckpointError: there is no head to generate or score with, or yes and no are no tokens of the tokenizer.
    """
    architecture.task = task
    if task != GENERATE:  # models without a head may have been saved without the prefix that it makes necessary
        names = ("embed_tokens", "layers", "norm") if architecture.vision is None else ("language_model", "visual")
        checkpoint.rename({f"{name}.": f"model.{name}." for name in names})
    if task == EMBEDDING:
        checkpoint.leave_out(HEAD)
    elif not architecture.tied and HEAD not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {HEAD} is missing from the checkpoint, so it can neither generate nor score.",
            "An embedding model has no head: build it with --task embedding. Else the checkpoint is not complete.",
        )
    if task == RERANKER:
        architecture.answers = answer_ids(checkpoint)


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
                "Build it with --task generate.",
            )
        ids.append(token_id)
    SentenceFiles(checkpoint).check_answers(*ids)
    return ids[0], ids[1]


class WrongTaskError(PackageError, AttributeError):
    """A package was asked for what another task's does; an AttributeError too, so that ``hasattr`` answers."""


def check_package_task(folder: Path, manifest: dict[str, Any], wanted: str) -> None:
    """Raises a `WrongTaskError`, which says what to do instead, where a package is not for the task ``wanted``."""
    task = manifest_task(folder, manifest)
    if task != wanted:
        raise wrong_task(folder, task)


def manifest_task(folder: Path, manifest: dict[str, Any]) -> str:
    """The task that a package's manifest names; the first ones named none.

    Raises:
        PackageError: this vlpack does not know it.
    """
    task = manifest.get("task", GENERATE)
    if task not in TASKS:
        raise PackageError(f"{folder} is for the task {task!r}, which this vlpack does not know.", "Update vlpack.")
    return str(task)


def wrong_task(folder: Path, task: str) -> WrongTaskError:
    """The error for a package of ``task`` that was asked for something else."""
    does, command, call = _USES[task]
    return WrongTaskError(
        f"{folder} is a package for the task {task}: it {does} and does nothing else.",
        f"On the command line: {command.replace('PACKAGE', str(folder))}; from Python: vlpack.load(…){call}.",
    )


class Loaded:
    """A package in memory: methods of other tasks' packages are errors that name this one's."""

    folder: Path
    task: str

    def __getattr__(self, name: str) -> Any:
        if name in _METHODS:
            raise wrong_task(self.folder, self.task)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
