"""Helpers: copies of the shipped checkpoint that tests may alter, and commands run in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from vlpack.cli import app as cli
from vlpack.package.manifest import MANIFEST, sealed, sha256_file

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = EXAMPLES / "digits-qwen3-vl"
IMAGES = EXAMPLES / "digits-images"
ANSWERS: dict[str, dict[str, str]] = json.loads((IMAGES / "answers.json").read_text(encoding="utf-8"))
READ, COUNT = "Read the digits.", "How many digits are there?"

EMBEDDING = "model.language_model.embed_tokens.weight"
QUERY = "model.language_model.layers.2.self_attn.q_proj.weight"


class Tensor(NamedTuple):
    """One tensor of a safetensors file, as raw bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Tensor]


def copy_digits(folder: Path) -> Path:
    """Copies the shipped checkpoint; weights are a hard link if possible, so replace that file, never write into it."""
    folder.mkdir(parents=True)
    for path in DIGITS.iterdir():
        if path.suffix == ".safetensors":
            try:
                os.link(path, folder / path.name)
                continue
            except OSError:
                pass
        shutil.copyfile(path, folder / path.name)
    return folder


def edit_json(path: Path, *keys: str, value: Any) -> None:
    """Sets the value at ``keys`` in a JSON file, or removes the last key if ``value`` is ``...``."""
    root = json.loads(path.read_text(encoding="utf-8"))
    place = root
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(root), encoding="utf-8")


def read_tensors(path: Path) -> Tensors:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), data[8 + length :][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def write_tensors(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {}
    position = 0
    for name, tensor in tensors.items():
        offsets = [position, position + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header).encode()
    path.unlink(missing_ok=True)  # the file may be a hard link
    path.write_bytes(b"".join([struct.pack("<Q", len(text)), text, *(tensor.data for tensor in tensors.values())]))


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Rewrites the weights after ``edit`` has changed the tensors."""
    path = folder / "model.safetensors"
    tensors = read_tensors(path)
    edit(tensors)
    write_tensors(path, tensors)


def floats(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The values of a bfloat16 tensor."""
    return (np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)


def poke(tensors: Tensors, name: str, index: int, value: float) -> None:
    """Sets one value of a bfloat16 tensor."""
    data = bytearray(tensors[name].data)
    data[2 * index : 2 * index + 2] = np.float32(value).tobytes()[2:]
    tensors[name] = tensors[name]._replace(data=bytes(data))


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Output(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


def vlpack(capsys: pytest.CaptureFixture[str], *arguments: object) -> Output:
    """Runs a command in this process; an exception that a user would see as a traceback fails the test."""
    capsys.readouterr()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    code = caught.value.code
    return Output(code if isinstance(code, int) else 0 if code is None else 1, *capsys.readouterr())


def seal(package: Path) -> None:
    """Makes the manifest agree with altered files, as an attacker would."""
    path = package / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, entry in manifest["files"].items():
        entry |= {"bytes": (package / name).stat().st_size, "sha256": sha256_file(package / name)}
    path.write_text(sealed(manifest), encoding="utf-8")
