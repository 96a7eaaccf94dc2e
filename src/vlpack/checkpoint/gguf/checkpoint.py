"""A GGUF file as a checkpoint: its tensors under Hugging Face's names, and a folder with its settings and tokenizer.

That folder is a temporary one with files such as config.json, so all code that reads a checkpoint's folder works
unchanged.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.checkpoint import Checkpoint, new_name
from vlpack.checkpoint.config import Section
from vlpack.checkpoint.files import FilePool, locate, quote, read_small
from vlpack.checkpoint.gguf.header import Entry, Header, read_header
from vlpack.checkpoint.gguf.names import ROPE_FACTORS, new_names, turned_heads
from vlpack.checkpoint.gguf.settings import SEEING, architecture_of, model_config
from vlpack.checkpoint.gguf.tokenizer import tokenizer_files
from vlpack.checkpoint.gguf.types import BlockType
from vlpack.checkpoint.safetensors import TensorInfo
from vlpack.errors import CheckpointError

Array = npt.NDArray[Any]

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
MAX_EXPERTS = 1 << 12
"""Largest number of experts of a layer."""
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


class Gguf(Checkpoint):
    """A checkpoint whose weights are in a GGUF file.

    Args:
        folder: folder with config.json and the tokenizer's files.
        config: contents of config.json.
        tensors: entries of the tensors, by Hugging Face's names.
        path: path of the GGUF file.
        pool: pool in which the file is open.
        blocks: types of the matrices that are stored in blocks, by name.
        heads: numbers of heads of the tensors whose rows are in llama.cpp's order, by name.
        notes: sentences for the user.

    Attributes:
        blocks: types of the matrices that are stored in blocks, by name; in `tensors` they are matrices of bytes.
        notes: sentences for the user.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        tensors: dict[str, TensorInfo],
        path: Path,
        pool: FilePool,
        blocks: Mapping[str, BlockType],
        heads: Mapping[str, int],
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(folder, config, tensors, [path], pool)
        self.blocks, self.notes = blocks, notes
        self._heads = heads
        # a view keeps the opened checkpoint alive, because the temporary folder is removed together with it
        self._opened: Gguf | None = None

    @classmethod
    def open(cls, place: str | os.PathLike[str]) -> Gguf:
        """Opens and validates a GGUF file, or a folder with one.

        Raises:
            CheckpointError: the folder has no model or several, or the file is damaged or not supported.
        """
        path = Path(os.path.expanduser(place))
        pool, beside = FilePool(), path if path.is_dir() else None
        try:
            if beside is not None:
                path, skipped = _model_of(beside, pool)
            else:
                pool.add(path, path.resolve())
                skipped = []
            with pool.use(path) as file:
                header = read_header(file)
            return cls._of_header(path, header, pool, beside, skipped)
        except BaseException:
            pool.close()
            raise

    @classmethod
    def _of_header(cls, path: Path, header: Header, pool: FilePool, beside: Path | None, skipped: list[str]) -> Gguf:
        """The checkpoint of a file whose header was read.

        Args:
            path: path of the file.
            header: its header.
            pool: pool in which the file is open.
            beside: folder whose other files replace those made from the metadata; None for none.
            skipped: names of files with vision encoders, which are not read.
        """
        metadata = Section(header.metadata, f"{path}: metadata")
        _check_whole(metadata, path)
        entries = {entry.name: entry for entry in header.tensors}
        config = model_config(metadata, entries, _rope_factors(path, entries, pool))
        name = architecture_of(metadata)
        tensors: dict[str, TensorInfo] = {}
        blocks: dict[str, BlockType] = {}
        heads: dict[str, int] = {}
        for entry in header.tensors:
            if entry.name == ROPE_FACTORS:
                continue
            count = turned_heads(name, entry.name, config["num_attention_heads"], config["num_key_value_heads"])
            if count and entry.shape[0] % (2 * count):
                raise CheckpointError(
                    f"{path}: the tensor {quote(entry.name)} has {entry.shape[0]} rows, which {count} heads do "
                    "not divide."
                )
            for tensor in _tensors(path, entry):
                if tensor.name in tensors:
                    raise CheckpointError(f"{path} has {quote(tensor.name)} twice, under different names.")
                tensors[tensor.name] = tensor
                if isinstance(entry.kind, BlockType):
                    blocks[tensor.name] = entry.kind
                if count:
                    heads[tensor.name] = count
        files = {"config.json": json.dumps(config, indent=2).encode(), **_beside(beside)}
        length = config["max_position_embeddings"]
        made = tokenizer_files(metadata, config["vocab_size"], length, settings_only="tokenizer.json" in files)
        folder = _folder_of(path, {**made, **files})
        notes = []
        if name in SEEING:
            images = f"; {', '.join(skipped)} is not read" if skipped else ""
            notes.append(
                f"{path.name} has the decoder of a vision-language model, and the package is for text alone{images}. "
                "For images, build from the model's checkpoint in safetensors."
            )
        opened = cls(folder, config, tensors, path, pool, blocks, heads, tuple(notes))
        weakref.finalize(opened, shutil.rmtree, folder.parent, ignore_errors=True)
        return opened

    def block_values(self) -> dict[BlockType, int]:
        """The number of values that are stored in each type of blocks, the most frequent type first."""
        values: dict[BlockType, int] = {}
        for name, kind in self.blocks.items():
            count = self.tensors[name].nbytes // kind.block.itemsize * kind.values
            values[kind] = values.get(kind, 0) + count
        return dict(sorted(values.items(), key=lambda item: -item[1]))

    def renamed(self, prefixes: Mapping[str, str]) -> Gguf:
        """A view of the same file with renamed tensors, as for any checkpoint."""
        plain = super().renamed(prefixes)
        return self._view(dict(plain.tensors), {new_name(name, prefixes): one for name, one in self.blocks.items()})

    def without(self, name: str) -> Gguf:
        """A view of the same file without the tensor ``name``, if there is one."""
        plain = super().without(name)
        return self._view(dict(plain.tensors), {key: one for key, one in self.blocks.items() if key != name})

    def _view(self, tensors: dict[str, TensorInfo], blocks: Mapping[str, BlockType]) -> Gguf:
        path, pool = self.weight_files()[0], self._pool
        view = Gguf(self.folder, self.config, tensors, path, pool, blocks, self._heads, self.notes)
        view._opened = self._opened or self
        return view

    def _read(self, tensor: TensorInfo, shape: tuple[int, ...], offset: int) -> Array:
        """Reads rows of a tensor, and puts those of Llama's queries and keys into Hugging Face's order."""
        count = self._heads.get(tensor.name, 0)
        if not count or not shape or 0 in shape:
            return super()._read(tensor, shape, offset)
        row = tensor.nbytes // tensor.shape[0]
        start, half = (offset - tensor.offset) // row, tensor.shape[0] // count // 2
        head, place = np.divmod(np.arange(start, start + shape[0]), 2 * half)
        stored = head * 2 * half + 2 * (place % half) + place // half
        low, high = int(head[0]) * 2 * half, (int(head[-1]) + 1) * 2 * half
        whole = super()._read(tensor, (high - low, *shape[1:]), tensor.offset + low * row)
        taken: Array = whole[stored - low]
        return taken


def _model_of(folder: Path, pool: FilePool) -> tuple[Path, list[str]]:
    """The path of the only model among the GGUF files of a folder, and the names of the vision encoders beside it.

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
        (others if metadata.get("general.architecture") == "clip" else models).append(name)
    if len(models) != 1:
        shown = ", ".join(models[:4]) + (" and others" if len(models) > 4 else "")
        what = (
            f"{len(models)} models in GGUF files: {shown}" if models else f"only vision encoders: {', '.join(others)}"
        )
        raise CheckpointError(f"{folder} has {what}.", "Give the GGUF file of one model.")
    return folder / models[0], others


def _check_whole(metadata: Section, path: Path) -> None:
    """Raises a CheckpointError if a file has only a vision encoder, or only a part of a model."""
    if architecture_of(metadata) == "clip":
        raise CheckpointError(
            f"{path} has a vision encoder alone (mmproj), without a decoder.", "Give the GGUF file of the model."
        )
    count = metadata.integer("split.count", 1, low=0)
    if count > 1:
        raise CheckpointError(
            f"{path} is one of {count} parts of a model.",
            "Join them with llama.cpp: llama-gguf-split --merge FIRST_PART NEW_FILE.",
        )


def _tensors(path: Path, entry: Entry) -> list[TensorInfo]:
    """The entries of a tensor under Hugging Face's names, one for each expert; uint8 if it is stored in blocks."""
    shape = entry.shape
    experts = shape[0] if len(shape) == 3 and shape[0] <= MAX_EXPERTS else 0
    names = new_names(entry.name, experts) or [entry.name]
    if experts and len(names) == experts:
        shape = shape[1:]
    dtype: np.dtype[Any] = np.dtype(np.uint8)
    if isinstance(entry.kind, BlockType):
        if len(shape) != 2:
            raise CheckpointError(
                f"{path}: the tensor {quote(entry.name)} is stored as {entry.kind.name}, which only matrices can be; "
                f"it has the shape {list(shape)}."
            )
        shape = (shape[0], shape[1] // entry.kind.values * entry.kind.block.itemsize)
    else:
        dtype = entry.kind
    each = entry.nbytes // len(names)
    return [TensorInfo(name, dtype, shape, path, entry.offset + i * each, each) for i, name in enumerate(names)]


def _rope_factors(path: Path, entries: Mapping[str, Entry], pool: FilePool) -> Array | None:
    """The divisors of the rotary frequencies, float64 ``[head_dim / 2]``; None if the file has none."""
    entry = entries.get(ROPE_FACTORS)
    if entry is None:
        return None
    if isinstance(entry.kind, BlockType) or len(entry.shape) != 1 or entry.shape[0] > 1 << 12:
        raise CheckpointError(f"{path}: the tensor {ROPE_FACTORS} must have one number for each frequency.")
    with pool.use(path) as file:
        return np.frombuffer(file.read(entry.offset, entry.nbytes), entry.kind).astype(np.float64)


def _beside(folder: Path | None) -> dict[str, bytes]:
    """The contents of the files of `BESIDE` in a folder, by name."""
    found = {name: locate(folder, name) for name in BESIDE} if folder is not None else {}
    return {
        name: read_small(folder / name, target, MAX_BESIDE_BYTES)
        for name, target in found.items()
        if folder is not None and target is not None
    }


def _folder_of(path: Path, files: Mapping[str, bytes]) -> Path:
    """Makes a temporary folder with the given files; messages show its name, which is that of the GGUF file."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="vlpack-gguf-")) / path.name
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise CheckpointError(f"A temporary folder for the settings of {path} cannot be written: {error}.") from None
    return folder
