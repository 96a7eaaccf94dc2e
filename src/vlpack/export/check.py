"""Checks a checkpoint against its architecture: exactly the expected tensors must exist, in the expected shapes."""

from __future__ import annotations

from fnmatch import fnmatchcase

from vlpack.architectures.base import Architecture
from vlpack.architectures.ports import GraphOptions
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.errors import CheckpointError
from vlpack.export.graph import declare
from vlpack.quantize.policy import Policy
from vlpack.quantize.storage import slabs

HEAD = "lm_head.weight"
"""Tensor name of the head over the vocabulary."""

UNUSED = ("*.rotary_emb.inv_freq", "*.rotary_pos_emb.inv_freq")
"""Name patterns of buffers in old checkpoints that are ignored, because they are computed from the config."""


def check_tensors(architecture: Architecture, checkpoint: Checkpoint, policy: Policy) -> None:
    """Checks that a checkpoint has every tensor of the whole model in its shape and dtype, and no other tensors.

    Raises:
        CheckpointError: tensors are missing, have a wrong shape or dtype, or are unknown; the first few are named.
    """
    options = GraphOptions.of_policy(policy)
    weights = [w for part in architecture.parts(options) for w in declare(part, policy)]
    wanted = {tensor.name: tensor.shape for weight in weights for tensor in weight.source.tensors()}
    missing = [name for name in wanted if name not in checkpoint.tensors]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise CheckpointError(
            f"{checkpoint.place}: {_some(missing)} {verb} missing from the checkpoint.",
            "The config and the weights do not belong together, or the checkpoint is incomplete.",
        )
    for name, shape in wanted.items():
        found = checkpoint.tensors[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{found.file}: the tensor {name} has the shape {list(found.shape)}; config.json requires "
                f"{list(shape)}.",
                "The config and the weights do not belong together.",
            )
        if found.dtype.kind not in "fV" or found.dtype.itemsize < 2:
            raise CheckpointError(
                f"{found.file}: the tensor {name} is of type {found.dtype}; weights must be bfloat16, float16, float32 "
                "or float64.",
                "If it is quantized, its config does not say how: use the original checkpoint.",
            )
    if architecture.tied and HEAD in checkpoint.tensors:
        check_equal(checkpoint, f"{architecture.decoder.prefix}.embed_tokens.weight")
    unused = (*UNUSED, *architecture.ignored, *([HEAD] if architecture.tied else []))
    extra = [
        name
        for name in checkpoint.tensors
        if name not in wanted
        and not any(fnmatchcase(name, pattern) for pattern in unused)
        and not checkpoint.is_void(name)
    ]
    if extra:
        raise CheckpointError(
            f"{checkpoint.place}: the model has no place for {_some(extra)}.",
            "The config and the weights do not belong together, or this is another model.",
        )


def ignored_notes(architecture: Architecture, checkpoint: Checkpoint) -> list[str]:
    """Notes for the user on tensors of the checkpoint that are not part of the package."""
    return [
        f"The package leaves out the checkpoint's tensors {pattern}: {what}."
        for pattern, what in architecture.ignored.items()
        if any(fnmatchcase(name, pattern) for name in checkpoint.tensors)
    ]


def check_equal(checkpoint: Checkpoint, embedding: str) -> None:
    """Checks that the head stored in a tied checkpoint equals the embedding.

    Raises:
        CheckpointError: it differs. Transformers 4 would ignore such a head, transformers 5 would use it.
    """
    one, two = checkpoint.tensors[HEAD], checkpoint.tensors[embedding]
    equal = one.shape == two.shape and one.dtype == two.dtype
    for start, stop in slabs(*two.shape) if equal else ():
        equal = (
            equal and checkpoint.rows(HEAD, start, stop).tobytes() == checkpoint.rows(embedding, start, stop).tobytes()
        )
    if not equal:
        raise CheckpointError(
            f"{one.file}: {HEAD} differs from {embedding}, although config.json says that they are tied.",
            f"Set tie_word_embeddings to false in config.json to use {HEAD}, or remove it from the checkpoint.",
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'tensors' if len(names) > 1 else 'tensor'} {shown}{more}"
