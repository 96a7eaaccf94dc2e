"""A GGUF file as a checkpoint: its tensors under Hugging Face's names, and a folder with its settings and tokenizer.

That folder is a temporary one with files such as config.json, so all code that reads a checkpoint's folder works
unchanged.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.checkpoint import Checkpoint, new_name
from vlpack.checkpoint.config import Section
from vlpack.checkpoint.files import FilePool, quote
from vlpack.checkpoint.gguf.header import Entry, read_header
from vlpack.checkpoint.gguf.joined import Joined, join, stored
from vlpack.checkpoint.gguf.names import ROPE_FACTORS, new_names, turned_heads
from vlpack.checkpoint.gguf.places import files_beside, given_encoder, model_in, settings_folder, several_encoders
from vlpack.checkpoint.gguf.settings import SEEING, architecture_of, model_config
from vlpack.checkpoint.gguf.tokenizer import tokenizer_files
from vlpack.checkpoint.gguf.types import BlockType
from vlpack.checkpoint.gguf.vision import (
    VISION,
    assumed,
    check_match,
    family_of,
    processor_files,
    token_ids,
    vision_config,
    whole_config,
)
from vlpack.checkpoint.gguf.vision_names import TEXT, vision_names
from vlpack.checkpoint.safetensors import TensorInfo
from vlpack.errors import CheckpointError, option

Array = npt.NDArray[Any]

MAX_EXPERTS = 1 << 12
"""Largest number of experts of a layer."""


@dataclass
class Contents:
    """The tensors of a checkpoint in GGUF files, by Hugging Face's names.

    Args:
        tensors: their entries; a matrix that is stored in blocks is one of bytes.
        blocks: types of the matrices that are stored in blocks.
        heads: numbers of heads of the tensors whose rows are in llama.cpp's order.
        joined: the parts of tensors that are stored in several.
    """

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    blocks: dict[str, BlockType] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    joined: dict[str, Joined] = field(default_factory=dict)

    def add(self, tensor: TensorInfo, kind: np.dtype[Any] | BlockType) -> None:
        """Adds a tensor whose values are of the given type.

        Raises:
            CheckpointError: there is one of this name.
        """
        if tensor.name in self.tensors:
            raise CheckpointError(f"{tensor.file} has {quote(tensor.name)} twice, under different names.")
        self.tensors[tensor.name] = tensor
        if isinstance(kind, BlockType):
            self.blocks[tensor.name] = kind


class Gguf(Checkpoint):
    """A checkpoint whose weights are in a GGUF file, or in two: the decoder's and the vision encoder's (mmproj).

    Args:
        folder: folder with config.json and the tokenizer's files.
        config: contents of config.json.
        contents: the tensors.
        paths: paths of the GGUF files, the decoder's first.
        pool: pool in which the files are open.
        notes: sentences for the user.

    Attributes:
        blocks: types of the matrices that are stored in blocks, by name; in `tensors` they are matrices of bytes.
        notes: sentences for the user.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        contents: Contents,
        paths: list[Path],
        pool: FilePool,
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(folder, config, contents.tensors, paths, pool)
        self.blocks: Mapping[str, BlockType] = contents.blocks
        self.notes = notes
        self._contents = contents
        # a view keeps the opened checkpoint alive, because the temporary folder is removed together with it
        self._opened: Gguf | None = None

    @classmethod
    def open(cls, place: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None = None) -> Gguf:
        """Opens and validates a GGUF file, or a folder with one.

        Args:
            place: path of the file or the folder.
            mmproj: path of the file with the vision encoder; by default the only one in the folder, if it is one.

        Raises:
            CheckpointError: the folder has no model or several, a file is damaged or not supported, or the files do
                not belong together.
        """
        path = Path(os.path.expanduser(place))
        pool, beside = FilePool(), path if path.is_dir() else None
        try:
            encoders: list[Path] = []
            if beside is not None:
                path, encoders = model_in(beside, pool)
            else:
                pool.add(path, path.resolve())
            model = _opened(path, pool)
            _check_whole(model)
            sees = architecture_of(model.metadata) in SEEING
            if mmproj is not None:
                encoders = [given_encoder(mmproj, path, pool)]
            elif sees and len(encoders) > 1:
                raise several_encoders(beside, encoders)
            notes = [_without_images(path, encoders, sees=sees)] if mmproj is None and not (sees and encoders) else []
            vision = None if notes else _opened(encoders[0], pool)
            return cls._of_files(model, vision, pool, beside, [note for note in notes if note])
        except BaseException:
            pool.close()
            raise

    @classmethod
    def _of_files(
        cls, model: _File, vision: _File | None, pool: FilePool, beside: Path | None, notes: list[str]
    ) -> Gguf:
        """The checkpoint of files whose headers were read.

        Args:
            model: the decoder's file.
            vision: the vision encoder's file; None for text alone.
            pool: pool in which the files are open.
            beside: folder whose other files replace those made from the metadata; None for none.
            notes: sentences for the user.
        """
        config = model_config(model.metadata, model.entries, _rope_factors(model.path, model.entries, pool))
        contents = _decoder(model, config, "model." if vision is None else TEXT)
        given = files_beside(beside, images=vision is not None)
        length, count = config["max_position_embeddings"], config["vocab_size"]
        made = tokenizer_files(model.metadata, count, length, settings_only="tokenizer.json" in given)
        if vision is not None:
            family = family_of(architecture_of(model.metadata), vision.metadata)
            encoder = vision_config(vision.metadata, vision.entries, family)
            check_match(model.metadata, vision.metadata, encoder)
            ids = token_ids(model.metadata, given.get("tokenizer.json"))
            config = whole_config(model.metadata, config, encoder, family, ids)
            made |= processor_files(vision.metadata, encoder, family)
            for name, parts in vision_names(vision.entries, family.names).items():
                tensor, joined = join(vision.path, name, [vision.entries[part] for part in parts])
                contents.add(tensor, vision.entries[parts[0]].kind)
                if joined is not None:
                    contents.joined[name] = joined
            notes = [*notes, *assumed(vision.path.name, vision.metadata, family, given, ids)]
        files = {**made, **given, "config.json": json.dumps(config, indent=2).encode()}
        folder = settings_folder(model.path, files)
        paths = [model.path] if vision is None else [model.path, vision.path]
        opened = cls(folder, config, contents, paths, pool, tuple(notes))
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

    def _view(self, tensors: dict[str, TensorInfo], blocks: dict[str, BlockType]) -> Gguf:
        contents = replace(self._contents, tensors=tensors, blocks=blocks)
        view = Gguf(self.folder, self.config, contents, self.weight_files(), self._pool, self.notes)
        view._opened = self._opened or self
        return view

    def _read(self, tensor: TensorInfo, shape: tuple[int, ...], offset: int) -> Array:
        """Reads rows of a tensor; joins its parts, and puts rows of Llama's queries and keys into the usual order."""
        count, joined = self._contents.heads.get(tensor.name, 0), self._contents.joined.get(tensor.name)
        if not (count or joined) or not shape or 0 in shape:
            return super()._read(tensor, shape, offset)
        row = tensor.nbytes // tensor.shape[0]
        start = (offset - tensor.offset) // row
        if joined is not None:
            stop = start + math.prod(shape) * tensor.dtype.itemsize // row
            return joined.rows(self._rows_of, start, stop, tensor.dtype).reshape(shape)
        half = tensor.shape[0] // count // 2
        head, place = np.divmod(np.arange(start, start + shape[0]), 2 * half)
        stored = head * 2 * half + 2 * (place % half) + place // half
        low, high = int(head[0]) * 2 * half, (int(head[-1]) + 1) * 2 * half
        whole = super()._read(tensor, (high - low, *shape[1:]), tensor.offset + low * row)
        taken: Array = whole[stored - low]
        return taken

    def _rows_of(self, tensor: TensorInfo, start: int, stop: int) -> Array:
        """Rows of a part of a joined tensor, as they are stored."""
        place = tensor.offset + start * (tensor.nbytes // tensor.shape[0])
        return super()._read(tensor, (stop - start, *tensor.shape[1:]), place)


@dataclass(frozen=True)
class _File:
    """A GGUF file whose header was read: its path, metadata, and the tensors by their names in the file."""

    path: Path
    metadata: Section
    entries: Mapping[str, Entry]


def _opened(path: Path, pool: FilePool) -> _File:
    """Reads the header of a file that is in the pool."""
    with pool.use(path) as file:
        header = read_header(file)
    metadata = Section(header.metadata, f"{path}: metadata")
    return _File(path, metadata, {entry.name: entry for entry in header.tensors})


def _without_images(path: Path, encoders: Sequence[Path], *, sees: bool) -> str:
    """The note about a decoder that is opened without a vision encoder; empty if there is nothing to say."""
    if sees:
        return (
            f"{path.name} has the decoder of a vision-language model, and the package is for text alone. For images, "
            f"give the model's vision encoder (mmproj-….gguf) with {option('mmproj')}, or one folder with both files."
        )
    names = ", ".join(encoder.name for encoder in encoders)
    return f"{path.name} is for text alone, so {names} is not read." if encoders else ""


def _check_whole(model: _File) -> None:
    """Raises a CheckpointError if a file has only a vision encoder, or only a part of a model."""
    if architecture_of(model.metadata) == VISION:
        raise CheckpointError(
            f"{model.path} has a vision encoder alone (mmproj), without a decoder.",
            f"Give the GGUF file of the model, and this one with {option('mmproj')}.",
        )
    count = model.metadata.integer("split.count", 1, low=0)
    if count > 1:
        raise CheckpointError(
            f"{model.path} is one of {count} parts of a model.",
            "Join them with llama.cpp: llama-gguf-split --merge FIRST_PART NEW_FILE.",
        )


def _decoder(model: _File, config: Mapping[str, Any], prefix: str) -> Contents:
    """The tensors of a decoder; those that are not the head's begin with ``prefix`` in place of ``model.``."""
    contents, name = Contents(), architecture_of(model.metadata)
    for entry in model.entries.values():
        if entry.name == ROPE_FACTORS:
            continue
        count = turned_heads(name, entry.name, config["num_attention_heads"], config["num_key_value_heads"])
        if count and entry.shape[0] % (2 * count):
            raise CheckpointError(
                f"{model.path}: the tensor {quote(entry.name)} has {entry.shape[0]} rows, which {count} heads do not "
                "divide."
            )
        for tensor in _tensors(model.path, entry):
            renamed = replace(tensor, name=new_name(tensor.name, {"model.": prefix}))
            contents.add(renamed, entry.kind)
            if count:
                contents.heads[renamed.name] = count
    return contents


def _tensors(path: Path, entry: Entry) -> list[TensorInfo]:
    """The entries of a tensor under Hugging Face's names, one for each expert; uint8 if it is stored in blocks."""
    shape = entry.shape
    experts = shape[0] if len(shape) == 3 and shape[0] <= MAX_EXPERTS else 0
    names = new_names(entry.name, experts) or [entry.name]
    if not experts or len(names) != experts:
        return [stored(path, entry, names[0])]
    each = entry.nbytes // experts
    parts = [replace(entry, shape=shape[1:], offset=entry.offset + i * each, nbytes=each) for i in range(experts)]
    return [stored(path, part, name) for part, name in zip(parts, names, strict=True)]


def _rope_factors(path: Path, entries: Mapping[str, Entry], pool: FilePool) -> Array | None:
    """The divisors of the rotary frequencies, float64 ``[head_dim / 2]``; None if the file has none."""
    entry = entries.get(ROPE_FACTORS)
    if entry is None:
        return None
    if isinstance(entry.kind, BlockType) or len(entry.shape) != 1 or entry.shape[0] > 1 << 12:
        raise CheckpointError(f"{path}: the tensor {ROPE_FACTORS} must have one number for each frequency.")
    with pool.use(path) as file:
        return np.frombuffer(file.read(entry.offset, entry.nbytes), entry.kind).astype(np.float64)
