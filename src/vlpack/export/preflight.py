"""Checks a checkpoint's settings before its weights are downloaded, so that no gigabytes are fetched in vain."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vlpack.architectures import Architecture, read_settings
from vlpack.architectures.ports import GraphOptions
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.hub import SETTINGS, ResolvedSource, is_folder, resolve
from vlpack.errors import OptionError, option
from vlpack.export.folder import check_space
from vlpack.export.graph import declare
from vlpack.export.weights import planned_bytes
from vlpack.quantize.policy import Policy, PrecisionFacts
from vlpack.tasks import AUTO


def resolve_checked(
    source: str | os.PathLike[str],
    check: Callable[..., None],
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    mmproj: str | os.PathLike[str] | None = None,
) -> ResolvedSource:
    """Finds a checkpoint's folder; downloads its weights only after ``check`` has accepted its settings.

    Args:
        source: a folder or a Hub id, as in `vlpack.checkpoint.hub.resolve`.
        check: function that takes the checkpoint without weights and raises if it cannot be built. Its argument
            ``room`` is true if a download follows; then it also raises if the disk has no room for the package.
        revision: branch, tag or commit of a Hub id.
        cache_dir: the Hugging Face cache to use.
        token: a Hub token.
        mmproj: GGUF file with the vision encoder of the model in another GGUF file.
    """
    found = resolve(source, revision=revision, cache_dir=cache_dir, token=token, patterns=SETTINGS)
    complete = is_folder(source) or found.repo_id is None or Checkpoint.has_weights(found.folder)
    check(Checkpoint.open_settings(found.folder, mmproj), room=not complete)
    if complete or found.repo_id is None:
        return found
    # the same commit, as the branch may have moved meanwhile
    return resolve(found.repo_id, revision=found.commit or revision, cache_dir=cache_dir, token=token)


def check_settings(
    checkpoint: Checkpoint,
    *,
    output: Path,
    part: str,
    task: str,
    vision_precision: str | None,
    policy: Callable[[PrecisionFacts], Policy],
    room: bool,
) -> None:
    """Checks that an architecture and its config.json are supported, and that the disk has room for the package.

    Args:
        checkpoint: the checkpoint, possibly without weights.
        output: the package's folder, which need not exist.
        part: the part of the package to build, or all.
        task: the package's task, or auto.
        vision_precision: precision given for the vision encoder; None if none was given.
        policy: function that makes the precision policy from the architecture's facts.
        room: whether to check the disk's free space.

    Raises:
        CheckpointError: the checkpoint is not supported.
        OptionError: an option does not apply to the checkpoint.
        VlpackError: the disk has too little space.
    """
    architecture = read_settings(checkpoint, None if task == AUTO else task)
    check_sees(architecture, checkpoint, part, vision_precision)
    storage = policy(architecture.precision_facts)
    if not room or part not in ("all", "text"):
        return
    with suppress(OSError, ValueError):  # a path that cannot be written is reported when the folder is created
        place = next(parent for parent in Path(os.path.realpath(output)).parents if parent.is_dir())
        check_space(place / output.name, planned_size(architecture, part, storage), where=place)


def planned_size(architecture: Architecture, part: str, policy: Policy) -> int:
    """The size of a package's weights in bytes, of which those that several parts share count once.

    Args:
        architecture: the architecture of the model.
        part: the part of the package to build, or all.
        policy: the precision policy.
    """
    options = GraphOptions.of_policy(policy)
    parts = [architecture.text_part(options)] if part == "text" else architecture.parts(options)
    weights = {
        weight.key: weight for each in parts if part in ("all", "text", each.name) for weight in declare(each, policy)
    }
    return planned_bytes(list(weights.values()))


def check_sees(architecture: Architecture, checkpoint: Checkpoint, part: str, vision_precision: str | None) -> None:
    """Raises an OptionError if an option concerns the vision encoder of a model that has none."""
    if architecture.vision is None and (part in ("vision", "embedding") or vision_precision):
        raise OptionError(
            f"{checkpoint.architecture} has no vision encoder.",
            f"Leave out {option('part')} and {option('vision_precision')}.",
        )
