"""`vlpack.load`, which loads a package as a `Model`, `Embedder` or `Reranker`, depending on its task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vlpack.errors import OptionError, option
from vlpack.package.manifest import whole_package
from vlpack.tasks import EMBEDDING, GENERATE, manifest_task

if TYPE_CHECKING:
    from vlpack.runtime.model import Model
    from vlpack.runtime.retrieval import Embedder, Reranker


def load(
    folder: str | os.PathLike[str],
    *,
    threads: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    vision_provider: str | None = None,
) -> Model | Embedder | Reranker:
    """Loads a package: a `Model` if it generates text, an `Embedder` or a `Reranker` if it is for that task.

    Args:
        folder: folder of the package.
        threads: number of threads of the runtime; None for all cores.
        min_pixels: smallest image area in square pixels; None for the package's.
        max_pixels: largest image area in square pixels; None for the package's. Smaller is faster.
        vision_provider: where a `Model` encodes images, ``cpu`` or ``runtime``; `Model` documents both.

    Raises:
        OptionError: an option is out of range or has no effect on the package.
        PackageError: the folder is not a complete package, or the runtime cannot load it.
    """
    path = Path(os.path.expanduser(folder))
    task = manifest_task(path, whole_package(path))
    if task == GENERATE:
        from vlpack.runtime.model import Model

        return Model(
            path, threads=threads, min_pixels=min_pixels, max_pixels=max_pixels, vision_provider=vision_provider
        )
    if vision_provider is not None:
        raise OptionError(f"{option('vision_provider')} has no effect on a model for the task {task}.", "Leave it out.")
    from vlpack.runtime.retrieval import Embedder, Reranker

    kind = Embedder if task == EMBEDDING else Reranker
    return kind(path, threads=threads, min_pixels=min_pixels, max_pixels=max_pixels)
