"""`vlpack.load`: a package in memory, as what it is for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlpack.package.manifest import whole_package
from vlpack.tasks import EMBEDDING, GENERATE, manifest_task

if TYPE_CHECKING:
    from vlpack.encoder import Embedder, Reranker
    from vlpack.runtime import Model


def load(folder: str | os.PathLike[str], **options: Any) -> Model | Embedder | Reranker:
    """Load a package: one that generates as a `Model`, an embedding model as an `Embedder`, else a `Reranker`.

    Args:
        folder: the package.
        **options: ``threads``, ``min_pixels`` and ``max_pixels``, and ``vision_provider`` of a `Model`; see there.

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
