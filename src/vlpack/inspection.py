"""`vlpack.inspect`: a package, a checkpoint's folder or a Hub id, described as data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlpack.checkpoint.files import existing_folder
from vlpack.checkpoint.hub import SETTINGS, is_folder, is_hub_id, resolve
from vlpack.errors import VlpackError
from vlpack.package.description import inspect_package
from vlpack.package.manifest import MANIFEST


def inspect(path: str | os.PathLike[str], *, hashes: bool = True) -> dict[str, Any]:
    """Describe a package (hashes checked) or a checkpoint.

    Args:
        path: of its folder; or the Hub id of a checkpoint, of which no weights are downloaded.
        hashes: of a package's files are compared.

    Returns:
        JSON-like: ``kind`` is ``package`` or ``checkpoint``; see `inspect_package` and `inspect_checkpoint`.

    Raises:
        VlpackError: it is neither, or cannot be read.
    """
    if is_hub_id(path) and not is_folder(path):
        from vlpack.export.description import inspect_checkpoint

        return inspect_checkpoint(resolve(os.fspath(path), patterns=SETTINGS).folder, weights=False)
    folder = existing_folder(path, VlpackError, "Give the folder of a package or of a checkpoint, or a Hub id.")
    if (folder / MANIFEST).is_file():
        return inspect_package(folder, hashes=hashes)
    from vlpack.export.description import inspect_checkpoint  # late: a package needs none of what builds

    return inspect_checkpoint(folder, weights=_has_weights(folder))


def _has_weights(folder: Path) -> bool:
    """Whether anything in a folder looks like weights, of whatever kind, or should: an index lists them."""
    try:
        names = os.listdir(folder)
    except OSError:
        return True  # which is told when it is opened
    return any(name.endswith((*_WEIGHTS, ".index.json")) or name == "adapter_config.json" for name in names)


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")
