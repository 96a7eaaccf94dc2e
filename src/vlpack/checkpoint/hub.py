"""Resolves the source of a checkpoint: an existing folder, or a Hub id, downloaded into the Hugging Face cache."""

from __future__ import annotations

import errno
import os
import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlpack.errors import CheckpointError, OptionError, option

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.json", "tokenizer.*")
"""Names of the files that vlpack needs from a repository: weights, configs and the tokenizer."""
SETTINGS = tuple(pattern for pattern in PATTERNS if pattern != "*.safetensors")
"""Names of the small files, which show most reasons against a build before any weights are downloaded."""
IGNORED = ("[!1]*/*", "1[!_]*/*", "*.bin")
"""Names that the patterns above match but that are not needed: copies in subfolders (`original/`, `onnx/`) and pickles.
The small subfolders `1_…` are kept: sentence-transformers stores there how a model pools or scores."""

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>.*))?", re.ASCII | re.DOTALL)
_HUB_PAGE = re.compile(
    r"https?://[\w.:-]+/(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(tree|blob|resolve)/(?P<revision>[\w.+-]+))?([/?#].*)?",
    re.ASCII,
)
_GGUF_ID = re.compile(
    r"(https?://)?((hf\.co|huggingface\.co)/)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*):(?P<kind>[\w.-]+)",
    re.ASCII,
)
"""A repository with a quantization, as llama.cpp and Ollama name a GGUF file on the Hub."""
_REVISION = re.compile(r"[A-Za-z0-9][\w.+-]*(/[\w.+-]+)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ResolvedSource:
    """A checkpoint's folder and, if it came from the Hub, its repository and commit."""

    folder: Path
    repo_id: str | None
    commit: str | None

    @property
    def name(self) -> str:
        """The repository's id, or the folder's name without its path, which is private."""
        return self.repo_id or self.folder.resolve().name.encode(errors="replace").decode()

    def described(self) -> dict[str, str | None]:
        """The origin as a package's manifest records it: repository and commit, or the folder's name."""
        return {"repo_id": self.repo_id, "commit": self.commit} if self.repo_id else {"name": self.name}


def resolve(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    offline: bool | None = None,
    patterns: Sequence[str] = PATTERNS,
) -> ResolvedSource:
    """Finds the local folder of a checkpoint and downloads it first if necessary.

    Args:
        source: an existing folder, a GGUF file, or a Hub id `org/name`, optionally with `@revision`. An existing folder
            of that name takes precedence.
        revision: a branch, tag or commit of the Hub repository; the same as `@revision`.
        cache_dir: the Hugging Face cache to use; by default that of `HF_HOME` or `HF_HUB_CACHE`.
        token: a Hub token; by default that of `HF_TOKEN` or of `hf auth login`.
        offline: whether to use only the cache and never the network; by default the value of `HF_HUB_OFFLINE`.
        patterns: name patterns of the files to download; subfolders other than `1_…` are skipped.

    An interrupted download continues where it stopped when this is called again.
    """
    text = os.fspath(source)
    folder = _existing_folder(text)
    if folder is not None:
        if revision is not None:
            raise OptionError(
                f"A revision ({revision}) can be chosen for a Hub id only, but {folder} is a folder.",
                f"Leave out {option('revision')}, or give a Hub id such as Qwen/Qwen3-VL-4B-Instruct.",
            )
        return ResolvedSource(folder, *_origin(folder))

    repo_id, revision = hub_id(source, revision)
    downloaded = _download(
        repo_id, revision, cache_dir=cache_dir, token=token, offline=is_offline(offline), patterns=list(patterns)
    )
    found = ResolvedSource(downloaded, repo_id, _origin(downloaded)[1])
    if not is_offline(offline) and _lacks(downloaded, patterns):
        _refuse_gguf(repo_id, found.commit or revision, token)
    return found


def hub_id(source: str | os.PathLike[str], revision: str | None = None) -> tuple[str, str | None]:
    """The repository and the revision of a source that is not an existing folder.

    Args:
        source: a Hub id `org/name`, optionally with `@revision`.
        revision: the revision, if it is given separately.

    Raises:
        CheckpointError: the source is not a Hub id, or the revision is not one.
        OptionError: two different revisions are given.
    """
    text = os.fspath(source)
    match = _HUB_ID.fullmatch(text)
    is_path = isinstance(source, os.PathLike) or _looks_like_path(text)
    if match is None or is_path:
        if gguf := _GGUF_ID.fullmatch(text):
            raise CheckpointError(
                f"{text[:200]!r} names GGUF files of a repository by their quantization, and vlpack takes such a file.",
                f"Download it: hf download {gguf['repo']} --include '*{gguf['kind']}*.gguf' --local-dir FOLDER (for "
                "images also the mmproj file), and give the file, or the folder.",
            )
        page = _HUB_PAGE.fullmatch(text)
        raise CheckpointError(
            f"There is no folder {text[:200]!r}{'' if is_path else ', and it is not a Hub id'}.",
            f"Give the id of that page: {page['repo']}{'@' + page['revision'] if page['revision'] else ''}."
            if page
            else "Give an existing folder, or a Hub id such as Qwen/Qwen3-VL-4B-Instruct.",
        )
    repo_id, in_source = match["repo"], match["revision"]
    if in_source is not None and revision is not None and in_source != revision:
        raise OptionError(f"Two revisions are given: {in_source!r} in {text!r}, and {revision!r}.", "Give one of them.")
    revision = in_source if revision is None else revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise CheckpointError(f"{revision!r} is not a revision.", "Give a branch, a tag or a commit's 40 digits.")
    return repo_id, revision


def is_folder(source: str | os.PathLike[str]) -> bool:
    """Whether a source is an existing folder or GGUF file, as opposed to a Hub id."""
    return _existing_folder(os.fspath(source)) is not None


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Whether a source has the form of a Hub id, ``org/name`` or ``org/name@revision``."""
    text = os.fspath(source)
    return _HUB_ID.fullmatch(text) is not None and not _looks_like_path(text)


def is_offline(offline: bool | None = None) -> bool:
    """Whether the network must not be used: ``offline`` if it is given, or else the value of `HF_HUB_OFFLINE`."""
    if offline is not None:
        return offline
    from huggingface_hub import constants

    # The library reads the variable once, when it is imported; a program may set it later.
    in_environment = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return in_environment or bool(constants.HF_HUB_OFFLINE)


def _existing_folder(text: str) -> Path | None:
    if not text:  # Path("") is the current folder, which an empty variable never means
        return None
    try:
        path = Path(text).expanduser()
        if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
            return path
        is_file = path.exists()
    except (OSError, ValueError, RuntimeError):  # name too long, a null byte, no such ~user: no folder in any case
        return None
    if is_file:
        raise CheckpointError(
            f"{path} is a file, not a folder.", f"Give the folder it is in: {path.absolute().parent}."
        )
    return None


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or text.partition("@")[0].count("/") > 1
        or Path(text).is_absolute()
    )


def _origin(folder: Path) -> tuple[str | None, str | None]:
    """Repository and commit of a folder in the cache, `models--org--name/snapshots/<commit>`, or None and None."""
    snapshot = folder.resolve()
    kind, *names = snapshot.parent.parent.name.split("--")
    if kind != "models" or not names or snapshot.parent.name != "snapshots" or not _COMMIT.fullmatch(snapshot.name):
        return None, None
    return "/".join(names), snapshot.name


def _download(
    repo_id: str,
    revision: str | None,
    *,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    offline: bool,
    patterns: list[str],
) -> Path:
    # Imported here, because it is slow to import and a build from a folder does not need it.
    from huggingface_hub import snapshot_download

    with reported(repo_id, revision, offline=offline):
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=None if cache_dir is None else os.path.expanduser(cache_dir),
                token=token,
                local_files_only=offline,
                allow_patterns=patterns,
                ignore_patterns=list(IGNORED),
            )
        )


def _lacks(folder: Path, patterns: Sequence[str]) -> bool:
    """Whether a downloaded folder has no config.json, or no weights although the patterns ask for them."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False  # reported when the checkpoint is opened
    if "config.json" not in names and {"config.json", "*.json"} & set(patterns):
        return True
    return "*.safetensors" in patterns and not any(name.endswith((".safetensors", ".index.json")) for name in names)


def _refuse_gguf(repo_id: str, revision: str | None, token: str | bool | None) -> None:
    """Raises a CheckpointError if a repository has its weights in GGUF files only; silent if the Hub does not tell."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(repo_id, revision=revision, token=token)
    except Exception:  # the reason for asking is reported in another way
        return
    found = sorted(name for name in names if name.endswith(".gguf") and name.isprintable())
    if not found or any(name.endswith(".safetensors") for name in names):
        return
    first = next((name for name in found if "mmproj" not in name.lower()), found[0])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise CheckpointError(
        f"{repo_id} has its weights in GGUF files: {', '.join(map(ascii, found[:3]))}{more}.",
        f"Download one of them, for instance with: hf download {repo_id} {shlex.quote(first)} --local-dir FOLDER (for "
        "images also its mmproj file), and give the file, or the folder.",
    )


@contextmanager
def reported(repo_id: str, revision: str | None, *, offline: bool) -> Iterator[None]:
    """Turns errors of the Hub library in the block into a CheckpointError that says what to do."""
    from huggingface_hub import errors

    what = repo_id if revision is None else f"{repo_id} at revision {revision}"
    try:
        yield
    except errors.GatedRepoError as error:  # caught before RepositoryNotFoundError, its base class
        raise CheckpointError(
            f"{repo_id} is gated: its authors require that you accept their terms.",
            f"Accept the terms on https://huggingface.co/{repo_id}, then set HF_TOKEN or run `hf auth login`.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is neither a folder {repo_id} nor a model of that name on the Hub that you can access.",
            "Check the spelling; for a private model set HF_TOKEN or run `hf auth login`.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} has no revision {revision}.",
            f"Its revisions are listed on https://huggingface.co/{repo_id}/commits/main.",
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{repo_id} is neither a folder nor a valid Hub id: {_short(error)}",
            "Give an existing folder, or a Hub id such as Qwen/Qwen3-VL-4B-Instruct.",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if offline:
            raise CheckpointError(
                f"{what} is not, or not completely, in the Hugging Face cache, and the network must not be used.",
                "Download it once online (unset HF_HUB_OFFLINE), or give a folder.",
            ) from error
        raise CheckpointError(
            f"The Hub cannot be reached, and {what} is not in the Hugging Face cache: {_short(error)}",
            "Check the network, or HF_ENDPOINT and the proxy if you use them; or give a folder.",
        ) from error
    except Exception as error:  # HTTP, disk and transfer errors, of classes that differ between versions of the library
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            hint = (
                "Free some space, or set HF_HOME to a folder on a larger disk. The download continues where it stopped."
            )
        else:
            hint = "Try again: the download continues where it stopped."
        raise CheckpointError(
            f"{what} could not be downloaded: {type(error).__name__}: {_short(error)}", hint
        ) from error


def _short(error: Exception) -> str:
    """The first line of the library's message; the rest can be a page long and repeat vlpack's own message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return textwrap.shorten(lines[0].removeprefix("Got: "), 200, placeholder=" …").rstrip(".") + "."
