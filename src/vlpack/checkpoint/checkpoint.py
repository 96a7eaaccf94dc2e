"""A Hugging Face checkpoint, its config and weights: validated when opened, read lazily, never loaded whole."""

from __future__ import annotations

import difflib
import math
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from vlpack.checkpoint.files import (
    MAX_JSON_BYTES,
    FilePool,
    check_plain_name,
    existing_folder,
    locate,
    quote,
    read_json,
    sha256_file,
)
from vlpack.checkpoint.safetensors import MAX_TENSORS, TensorInfo, read_header
from vlpack.checkpoint.weight_files import find_weights, is_adapter
from vlpack.errors import CheckpointError

if TYPE_CHECKING:
    from vlpack.checkpoint.formats.packed import Packed

__all__ = ["Checkpoint", "TensorInfo"]

_MIXED = "Files of different downloads seem to be mixed: download the checkpoint again into an empty folder."


class Checkpoint:
    """A Hugging Face checkpoint: an untrusted folder with `config.json` and safetensors files.

    Opening it checks everything except the values of the tensors. Their bytes stay on disk until `rows` or `read` asks
    for some. Several threads may read at once. `renamed` and `without` return views of the same open files, which are
    closed together with the checkpoint that opened them.

    Attributes:
        folder: the folder as it was given.
        config: the parsed `config.json`.
        tensors: the tensors by name, in the order of their bytes; reading them in this order reads the disk from front
            to back.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()
    """Sentences about the checkpoint that the user should read."""

    def __init__(
        self, folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo], files: list[Path], pool: FilePool
    ) -> None:
        self.folder, self.config, self.tensors = folder, config, MappingProxyType(tensors)
        self._files, self._pool = files, pool

    @classmethod
    def open(cls, folder: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None = None) -> Checkpoint:
        """Opens and validates a folder or a GGUF file.

        Args:
            folder: the folder or the file.
            mmproj: GGUF file with the vision encoder of the model in another GGUF file.

        Raises:
            CheckpointError: it is not usable; the message says what is wrong, where, and what to do.
            OptionError: ``mmproj`` is given for another checkpoint than one in GGUF format.
        """
        if (gguf := _as_gguf(folder, mmproj)) is not None:
            return gguf
        settings = cls.open_settings(folder)
        return cls.of_files(settings.folder, settings.config, *find_weights(settings.folder, settings.config))

    @classmethod
    def open_settings(cls, folder: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None = None) -> Checkpoint:
        """Opens only config.json and the other small files: weights are not looked for, and `tensors` is empty.

        A GGUF file has its settings and the table of its tensors in one place, so it is opened as by `open`.
        """
        if (gguf := _as_gguf(folder, mmproj)) is not None:
            return gguf
        folder = existing_folder(folder, hint="Give a folder that holds config.json and model*.safetensors.")
        config = _read_json(folder, "config.json")
        if config is None and locate(folder, "adapter_config.json"):
            raise is_adapter(folder)
        if config is None:
            raise CheckpointError(
                f"{folder} has no config.json, so it is not a Hugging Face checkpoint.",
                "Give the folder that holds config.json and model*.safetensors.",
            )
        return cls(folder, config, {}, [], FilePool())

    @classmethod
    def has_weights(cls, folder: str | os.PathLike[str]) -> bool:
        """Whether all weight files of a checkpoint are present. Their contents are not checked."""
        settings = cls.open_settings(folder)
        try:
            return bool(find_weights(settings.folder, settings.config))
        except CheckpointError:
            return False

    @classmethod
    def of_files(
        cls, folder: Path, config: dict[str, Any], files: Mapping[str, Path], weight_map: dict[str, str] | None = None
    ) -> Checkpoint:
        """Opens and validates the given weight files of a folder.

        Args:
            folder: the checkpoint's folder.
            config: the parsed config.json.
            files: file name → real path, as `vlpack.checkpoint.files.locate` returns it.
            weight_map: tensor name → file name, for weights in several shards.
        """
        pool = FilePool()
        try:
            headers = {}
            for name, target in files.items():
                pool.add(folder / name, target)
                with pool.use(folder / name) as file:
                    headers[name] = read_header(file)
                if sum(map(len, headers.values())) > MAX_TENSORS:
                    raise CheckpointError(f"{folder} has more than {MAX_TENSORS} tensors.")
            tensors = _merge(folder, headers, weight_map)
        except BaseException:
            pool.close()
            raise
        return cls(folder, config, tensors, [folder / name for name in files], pool)

    @property
    def place(self) -> Path:
        """The path that opens the same checkpoint again: the folder, or the GGUF file."""
        return next((path for path in self._files if path.suffix == ".gguf"), self.folder)

    @property
    def architecture(self) -> str:
        """The model's class in transformers, such as `Qwen3VLForConditionalGeneration`."""
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise CheckpointError(
                f"{self.folder / 'config.json'} does not say which architecture the model has.",
                'It needs an entry such as "architectures": ["Qwen3VLForConditionalGeneration"].',
            )
        return names[0]

    def renamed(self, prefixes: Mapping[str, str]) -> Checkpoint:
        """A view of the same files with renamed tensors: a prefix that is a key of ``prefixes`` becomes its value.

        Raises:
            CheckpointError: two tensors would have the same name.
        """
        renamed: dict[str, TensorInfo] = {}
        for name, tensor in self.tensors.items():
            new = new_name(name, prefixes)
            if new in renamed:
                raise CheckpointError(f"{self.folder} holds the tensor {quote(new)} under an old and a new name.")
            renamed[new] = tensor
        return Checkpoint(self.folder, self.config, renamed, self._files, self._pool)

    def without(self, name: str) -> Checkpoint:
        """A view of the same files without the tensor ``name``, if there is one."""
        kept = {key: tensor for key, tensor in self.tensors.items() if key != name}
        return Checkpoint(self.folder, self.config, kept, self._files, self._pool)

    def json(self, name: str, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
        """The object in another JSON file of the folder, such as `generation_config.json`; None when there is no file.

        Raise `limit` for files that are large by nature (a `tokenizer.json` is 11 MB).
        """
        return _read_json(self.folder, name, limit=limit)

    def rows(self, name: str, start: int, stop: int, *, width: int | None = None) -> np.ndarray[Any, Any]:
        """Rows [start, stop) of a tensor as a new array. No other bytes are read.

        Args:
            name: name of the tensor.
            start: first row.
            stop: the row after the last.
            width: number of values in a row, for a tensor read as a matrix; by default rows go along the first axis.
        """
        tensor = self._tensor(name)
        if not tensor.shape:
            raise CheckpointError(f"{tensor.file}, tensor {quote(name)} is a scalar and has no rows.")
        start, stop = operator.index(start), operator.index(stop)
        row = tensor.shape[1:] if width is None else (width,)
        values, per_row = math.prod(tensor.shape), math.prod(row)
        count = tensor.shape[0] if width is None else values // max(width, 1)
        if not 0 <= start <= stop <= count or count * per_row != values:
            raise CheckpointError(
                f"{tensor.file}, tensor {quote(name)} has {count} rows of {per_row} values; rows {start} to {stop} do "
                "not exist."
            )
        return self._read(tensor, (stop - start, *row), tensor.offset + start * per_row * tensor.dtype.itemsize)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """A whole tensor as a new array."""
        tensor = self._tensor(name)
        return self._read(tensor, tensor.shape, tensor.offset)

    def packed(self, name: str) -> Packed | None:
        """The quantized form of a tensor (`vlpack.checkpoint.formats`); None for a tensor that is not quantized."""
        return None

    def is_void(self, name: str) -> bool:
        """Whether a tensor may be left out, because a tool adds it to every module whether the model has it or not."""
        return False

    def weight_files(self) -> list[Path]:
        """Paths of the safetensors files, sorted by name."""
        return list(self._files)

    def total_bytes(self) -> int:
        """Size of all tensors together, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def sha256(self, path: str | os.PathLike[str]) -> str:
        """The SHA-256 of a file of the folder, given by name or path, in hexadecimal."""
        path = Path(path)
        if path not in self._files:
            if path.parent not in {Path("."), self.folder}:
                raise CheckpointError(f"{path} is not a file of {self.folder}.")
            path = self.folder / path.name
        if path in self._files:
            with self._pool.use(path) as file:
                return file.sha256()
        target = locate(self.folder, check_plain_name(path.name, str(self.folder)))
        if target is None:
            raise CheckpointError(f"{self.folder} has no file {quote(path.name)}.")
        return sha256_file(target)

    def close(self) -> None:
        """Closes the files; reading afterwards raises a ValueError."""
        self._pool.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}, {len(self.tensors)} tensors, {self.total_bytes()} bytes)"

    def _tensor(self, name: str) -> TensorInfo:
        tensor = self.tensors.get(name)
        if tensor is None:
            close = difflib.get_close_matches(name, self.tensors, n=1)
            raise CheckpointError(
                f"{self.folder} has no tensor {quote(name)}.",
                f"The nearest name is {quote(close[0])}." if close else None,
            )
        return tensor

    def _read(self, tensor: TensorInfo, shape: tuple[int, ...], offset: int) -> np.ndarray[Any, Any]:
        try:
            array = np.empty(shape, tensor.dtype)
        except MemoryError as error:
            raise CheckpointError(
                f"{tensor.file}, tensor {quote(tensor.name)}: there is not enough memory for its {tensor.nbytes} bytes."
            ) from error
        with self._pool.use(tensor.file) as file:
            if array.nbytes:  # an empty array has no buffer to read into
                file.read_into(array.reshape(-1).view(np.uint8).data, offset)
        return array


def _as_gguf(place: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None) -> Checkpoint | None:
    """The checkpoint in a GGUF file, or in the one of a folder without other weights; None for all other places."""
    from vlpack.checkpoint.gguf import Gguf, check_mmproj, gguf_in  # imported late, because it is a subclass

    check_mmproj(place, mmproj)
    return Gguf.open(place, mmproj) if gguf_in(place) else None


def new_name(name: str, prefixes: Mapping[str, str]) -> str:
    """``name`` with its prefix replaced: the first key of ``prefixes`` that it begins with becomes that key's value."""
    old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return name if old is None else prefixes[old] + name[len(old) :]


def _read_json(folder: Path, name: str, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    target = locate(folder, check_plain_name(name, str(folder)))
    return None if target is None else read_json(folder / name, target, limit=limit)


def _merge(
    folder: Path, headers: dict[str, list[TensorInfo]], weight_map: dict[str, str] | None
) -> dict[str, TensorInfo]:
    """Joins the tensors of all files in one dictionary and checks that they are exactly those that the index lists."""
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for tensor in header:
            where = f"{tensor.file}, tensor {quote(tensor.name)}"
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{where} is also in {tensors[tensor.name].file.name}: one of them is wrong.", _MIXED
                )
            if weight_map is not None and weight_map.get(tensor.name) != file:
                listed = weight_map.get(tensor.name)
                raise CheckpointError(
                    f"{where} is not in the index." if listed is None else f"{where} should be in {listed}.", _MIXED
                )
            tensors[tensor.name] = tensor
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder / file} lacks the tensor {quote(name)} that the index lists for it.", _MIXED
            )
    if not tensors:
        raise CheckpointError(f"{folder} has weight files, but not one tensor in them.")
    return tensors
