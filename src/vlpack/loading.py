"""`vlpack.load`: a package in memory, as what it is for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlpack.cores import available_cores
from vlpack.errors import OptionError
from vlpack.package.manifest import whole_package
from vlpack.tasks import EMBEDDING, GENERATE, manifest_task

if TYPE_CHECKING:
    from vlpack.encoder import Embedder, Reranker
    from vlpack.runtime import Model


def load(folder: str | os.PathLike[str], **options: Any) -> Model | Embedder | Reranker:
    """Load a package: one that generates as a `Model`, an embedding model as an `Embedder`, else a `Reranker`.

    Args:
        folder: the package.
        **options: ``threads``, ``min_pixels`` and ``max_pixels``; see `Model`.

    Raises:
        PackageError: the folder is not a complete package, or the runtime cannot load it.
    """
    path = Path(os.path.expanduser(folder))
    task = manifest_task(path, whole_package(path))
    if task == GENERATE:
        from vlpack.runtime import Model

        return Model(path, **options)
    from vlpack.encoder import Embedder, Reranker

    return (Embedder if task == EMBEDDING else Reranker)(path, **options)


def checked_threads(threads: int | None) -> int:
    """The runtime's threads: all cores where ``threads`` is None (its own default is half of them).

    Raises:
        OptionError: absurdly many, or none.
    """
    cores = available_cores()
    if threads is not None and not 1 <= threads <= max(64, 4 * cores):
        raise OptionError(f"threads is {threads}; this process may use {cores} cores.")
    return threads or cores


def check_pixel_limits(folder: Path, sees: bool, min_pixels: int | None, max_pixels: int | None) -> None:
    """Raises an OptionError where limits are given to a package that does not see."""
    if not sees and (min_pixels is not None or max_pixels is not None):
        raise OptionError(f"min_pixels and max_pixels have no effect: {folder} has no vision encoder.")
