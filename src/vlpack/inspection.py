"""Implements `vlpack.inspect`, which describes a package or a checkpoint (a folder or a Hub id) as data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlpack.checkpoint.files import existing_folder
from vlpack.checkpoint.gguf import check_mmproj, gguf_in
from vlpack.checkpoint.hub import SETTINGS, is_folder, is_hub_id, resolve
from vlpack.errors import VlpackError
from vlpack.package.description import inspect_package
from vlpack.package.manifest import MANIFEST


def inspect(
    path: str | os.PathLike[str], *, hashes: bool = True, mmproj: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Describes a package or a checkpoint.

    Args:
        path: folder of the package or checkpoint, a GGUF file, or Hub id of a checkpoint, whose weights are not
            downloaded.
        hashes: whether to compare the SHA-256 of every file of a package.
        mmproj: GGUF file with the vision encoder of the model in the GGUF file ``path``.

    Returns:
        JSON-like data. ``kind`` is ``package`` or ``checkpoint``; `inspect_package` and `inspect_checkpoint` document
        the rest.

    Raises:
        VlpackError: the folder is neither a package nor a checkpoint, or cannot be read.
    """
    check_mmproj(path, mmproj)
    if is_hub_id(path) and not is_folder(path):
        from vlpack.export.description import inspect_checkpoint

        return inspect_checkpoint(resolve(os.fspath(path), patterns=SETTINGS).folder, weights=False)
    if gguf_in(path) and Path(path).expanduser().is_file():
        from vlpack.export.description import inspect_checkpoint

        return inspect_checkpoint(Path(path).expanduser(), mmproj=mmproj)
    folder = existing_folder(path, VlpackError, "Give the folder of a package or of a checkpoint, or a Hub id.")
    if (folder / MANIFEST).is_file():
        return inspect_package(folder, hashes=hashes)
    # imported late, because inspecting a package needs no code that builds
    from vlpack.export.description import inspect_checkpoint

    return inspect_checkpoint(folder, weights=_has_weights(folder), mmproj=mmproj)


def _has_weights(folder: Path) -> bool:
    """Whether a folder has files that look like weights of any kind, a weight index, or an adapter's config."""
    try:
        names = os.listdir(folder)
    except OSError:
        return True  # the error is reported when the checkpoint is opened
    return any(name.endswith((*_WEIGHTS, ".index.json")) or name == "adapter_config.json" for name in names)


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")
