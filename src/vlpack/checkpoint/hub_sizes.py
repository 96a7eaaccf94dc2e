"""How much of a Hub repository is still to be downloaded, before the download begins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from vlpack.checkpoint.hub import IGNORED, PATTERNS, is_offline, reported


@dataclass(frozen=True)
class Download:
    """The files of a repository that vlpack needs.

    Args:
        missing: size of those that are not in the Hugging Face cache yet, in bytes.
        weights: size of the files with weights, in bytes.
        cache: the Hugging Face cache.
        address: address of the Hub.
    """

    missing: int
    weights: int
    cache: str
    address: str


def plan_download(
    repo_id: str,
    commit: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Download:
    """Asks the Hub for the sizes of the files that are needed, and looks which of them are in the cache.

    Args:
        repo_id: repository, ``org/name``.
        commit: commit of the repository.
        cache_dir: the Hugging Face cache; by default that of ``HF_HOME`` or ``HF_HUB_CACHE``.
        token: a Hub token; by default that of ``HF_TOKEN`` or of ``hf auth login``.

    Raises:
        CheckpointError: the Hub cannot be asked.
    """
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    cache = str(constants.HF_HUB_CACHE if cache_dir is None else os.path.expanduser(cache_dir))
    offline = is_offline()
    with reported(repo_id, commit, offline=offline):
        if offline:  # the library itself may have been imported before HF_HUB_OFFLINE was set
            raise errors.OfflineModeIsEnabled("offline")
        files = HfApi().model_info(repo_id, revision=commit, files_metadata=True, token=token).siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files}
    needed = [name for name in sizes if _matches(name, PATTERNS) and not _matches(name, IGNORED)]
    missing = [
        name
        for name in needed
        if not isinstance(try_to_load_from_cache(repo_id, name, cache_dir=cache, revision=commit), str)
    ]
    return Download(
        missing=sum(sizes[name] for name in missing),
        weights=sum(sizes[name] for name in needed if name.endswith(".safetensors")),
        cache=cache,
        address=str(constants.ENDPOINT),
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's path in the repository matches one of the patterns, as the Hub library matches them."""
    return any(fnmatch(name, pattern) for pattern in patterns)
