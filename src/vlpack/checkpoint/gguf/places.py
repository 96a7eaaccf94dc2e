"""The files of a checkpoint in GGUF format: which of a folder is the model, and a folder with the settings inside."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlpack.checkpoint.files import FilePool, locate, quote_error, read_small
from vlpack.checkpoint.gguf.header import read_header
from vlpack.checkpoint.gguf.vision import IMAGES, VIDEOS, VISION
from vlpack.errors import CheckpointError, OptionError, option

END = ".gguf"
"""Ending of the names of GGUF files."""
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files beside a GGUF file that replace those that are made from its metadata."""
BESIDE_IMAGES = ("processor_config.json", IMAGES, VIDEOS)
"""Files that do the same for a model with a vision encoder."""
MAX_BESIDE_BYTES = 100_000_000
"""Largest size of a file of `BESIDE` that is read, in bytes."""


def gguf_in(place: str | os.PathLike[str]) -> bool:
    """Whether a path is a GGUF file, or a folder with such files and with neither other weights nor a config.json."""
    path = Path(os.path.expanduser(place))
    try:
        if path.is_file():
            return path.suffix == END
        names = os.listdir(path) if path.is_dir() else []
    except (OSError, ValueError):
        return False
    return any(name.endswith(END) for name in names) and not any(
        name.endswith((".safetensors", ".index.json")) or name in ("adapter_config.json", "config.json")
        for name in names
    )


def check_mmproj(place: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None) -> None:
    """Raises an OptionError if a vision encoder's file is given for a checkpoint that is not in GGUF files."""
    if mmproj is not None and not gguf_in(place):
        raise OptionError(
            f"{option('mmproj')} is the vision encoder of a GGUF file, and {os.fspath(place)[:200]} is none.",
            f"Leave {option('mmproj')} out: other checkpoints have their vision encoder inside.",
        )


def model_in(folder: Path, pool: FilePool) -> tuple[Path, list[Path]]:
    """The path of the only model among the GGUF files of a folder, and the paths of the vision encoders beside it.

    Raises:
        CheckpointError: there is no model, or several.
    """
    models: list[str] = []
    others: list[str] = []
    for name in sorted(name for name in os.listdir(folder) if name.endswith(END)):
        target = locate(folder, name)
        if target is None:
            continue
        pool.add(folder / name, target)
        with pool.use(folder / name) as file:
            metadata = read_header(file).metadata
        (others if metadata.get("general.architecture") == VISION else models).append(name)
    if len(models) != 1:
        shown = ", ".join(models[:4]) + (" and others" if len(models) > 4 else "")
        what = (
            f"{len(models)} models in GGUF files: {shown}" if models else f"only vision encoders: {', '.join(others)}"
        )
        raise CheckpointError(f"{folder} has {what}.", "Give the GGUF file of one model.")
    return folder / models[0], [folder / name for name in others]


def given_encoder(mmproj: str | os.PathLike[str], model: Path, pool: FilePool) -> Path:
    """The path of the vision encoder's file that the user named, which is added to the pool.

    Raises:
        CheckpointError: there is no such file, or it has the name of the model's file.
    """
    path = Path(os.path.expanduser(mmproj))
    try:
        if not path.is_file():
            raise CheckpointError(f"There is no file {path}.", f"Give a file with {option('mmproj')}.")
        target = path.resolve()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{os.fspath(mmproj)[:200]!r} cannot be opened: {quote_error(error)}.") from None
    if path.name == model.name:
        # a package's manifest lists its sources by their names
        raise CheckpointError(
            f"The model and its vision encoder are both called {path.name}.",
            f"Give different files; {option('mmproj')} is the one that is usually called mmproj-….gguf.",
        )
    pool.add(path, target)
    return path


def several_encoders(folder: Path | None, encoders: Sequence[Path]) -> CheckpointError:
    """The error for a folder with a model and several vision encoders."""
    names = ", ".join(encoder.name for encoder in encoders[:4]) + (" and others" if len(encoders) > 4 else "")
    return CheckpointError(
        f"{folder} has {len(encoders)} vision encoders: {names}.", f"Choose one of them with {option('mmproj')}."
    )


def files_beside(folder: Path | None, *, images: bool) -> dict[str, bytes]:
    """The contents of the files in a folder that replace those made from the metadata, by name.

    Args:
        folder: the folder; None for none.
        images: whether the settings of images and videos are among them.
    """
    if folder is None:
        return {}
    found = {name: locate(folder, name) for name in (*BESIDE, *(BESIDE_IMAGES if images else ()))}
    return {
        name: read_small(folder / name, target, MAX_BESIDE_BYTES)
        for name, target in found.items()
        if target is not None
    }


def settings_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    """Makes a temporary folder with the given files; messages show its name, which is that of the GGUF file."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="vlpack-gguf-")) / path.name
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise CheckpointError(f"A temporary folder for the settings of {path} cannot be written: {error}.") from None
    return folder
