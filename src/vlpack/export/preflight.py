"""What is known of a checkpoint before its weights are there: gigabytes are not fetched for what cannot be built."""

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
) -> ResolvedSource:
    """The folder of a checkpoint, whose weights are downloaded only when ``check`` has nothing against its settings.

    Args:
        source: a folder or a Hub id; see `resolve`, as for the others.
        check: given the checkpoint without weights, raises where it cannot be used; with ``room`` true, where a
            download follows, also where the disk has no room for the package.
        revision: of a Hub id.
        cache_dir: where the Hub's files are kept.
        token: of the Hub.
    """
    found = resolve(source, revision=revision, cache_dir=cache_dir, token=token, patterns=SETTINGS)
    complete = is_folder(source) or found.repo_id is None or Checkpoint.has_weights(found.folder)
    check(Checkpoint.open_settings(found.folder), room=not complete)
    if complete or found.repo_id is None:
        return found
    # by the commit, as the branch may have moved meanwhile
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
    """The architecture and what config.json says of it are supported, and the package would have room on the disk.

    Args:
        checkpoint: perhaps without weights.
        output: the package's folder, which need not be there.
        part: of the package that is to be built.
        task: that it is to be for, or auto.
        vision_precision: that was asked for.
        policy: the precision policy, by what it must know of the architecture.
        room: look at the disk, too.

    Raises:
        CheckpointError: it is not supported.
        OptionError: an option does not suit it.
        VlpackError: the disk is too small.
    """
    architecture = read_settings(checkpoint, None if task == AUTO else task)
    check_sees(architecture, checkpoint, part, vision_precision)
    storage = policy(architecture.precision_facts)
    if not room or part not in ("all", "text"):
        return
    # the decoder and what sees: an embedding may share its bytes with the head
    parts = [p for p in architecture.parts(GraphOptions.of_policy(storage)) if p.name != "embedding"]
    wanted = [p for p in parts if part == "all" or p.name in ("text", "decoder")]
    with suppress(OSError, ValueError):  # of a place that cannot be written: told when the folder is made
        place = next(parent for parent in Path(os.path.realpath(output)).parents if parent.is_dir())
        check_space(place / output.name, sum(planned_bytes(declare(p, storage)) for p in wanted), where=place)


def check_sees(architecture: Architecture, checkpoint: Checkpoint, part: str, vision_precision: str | None) -> None:
    """Raises an OptionError where an option is about a vision encoder that there is not."""
    if architecture.vision is None and (part in ("vision", "embedding") or vision_precision):
        raise OptionError(
            f"{checkpoint.architecture} has no vision encoder.",
            f"Leave {option('part')} and {option('vision_precision')} away.",
        )
