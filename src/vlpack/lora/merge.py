"""Merges LoRA adapters of peft into a checkpoint while its weights are read: ``W + scaling · B A``, slab by slab.

onnxruntime-genai ignores adapters on multimodal models, so their changes must be in the weights. A `Merged` is a
checkpoint whose tensors have the base's names and shapes; code that reads it needs no knowledge of adapters.

Source: Hu et al. 2021 (arXiv:2106.09685); ``merge_and_unload`` of peft.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vlpack.architectures import Architecture
from vlpack.checkpoint.checkpoint import Checkpoint, new_name
from vlpack.checkpoint.files import locate, quote, read_json
from vlpack.checkpoint.formats import Packed
from vlpack.checkpoint.hub import ResolvedSource, resolve
from vlpack.checkpoint.rows import check_finite
from vlpack.checkpoint.safetensors import TensorInfo
from vlpack.errors import CheckpointError
from vlpack.export.check import HEAD, UNUSED, check_equal
from vlpack.export.graph import Weight
from vlpack.lora.config import MERGE_WITH_PEFT, LoraConfig
from vlpack.quantize.storage import slabs
from vlpack.tasks import EMBEDDING

CONFIG, WEIGHTS, INDEX = "adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors.index.json"
FILES = (CONFIG, WEIGHTS, INDEX)
"""Files to download from an adapter's repository; the index only lets an error say that shards are not supported."""

A, B, B_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
PAIRS = {A: B, B: A, EMBEDDING_A: EMBEDDING_B, EMBEDDING_B: EMBEDDING_A}
ADAPTER_PREFIXES = ("base_model.model.", "base_model.")

Array = npt.NDArray[Any]


class Delta(Protocol):
    """A matrix that is added to a tensor of the base, computed by rows."""

    def rows(self, start: int, stop: int) -> Array:
        """Computes rows ``[start, stop)`` in fp32."""


@dataclass(frozen=True)
class LowRank:
    """The low-rank update ``scaling · B A``, transposed for an embedding (``turned``). A and B stay on disk."""

    weights: Checkpoint
    a: str  # [r, in]
    b: str  # [out, r]
    scaling: float
    turned: bool = False

    def rows(self, start: int, stop: int) -> Array:
        """Computes rows ``[start, stop)`` of the update in fp32."""
        a = _fp32(self.weights, self.a)
        product: Array
        if self.turned:
            product = a[:, start:stop].T @ _fp32(self.weights, self.b).T
        else:
            product = _fp32(self.weights, self.b, start, stop) @ a
        product *= np.float32(self.scaling)
        return product


@dataclass(frozen=True)
class BiasOfB:
    """The update ``scaling · b`` of a bias, from the bias ``b`` of a LoRA's B."""

    weights: Checkpoint
    name: str
    scaling: float

    def rows(self, start: int, stop: int) -> Array:
        """Computes rows ``[start, stop)`` of the update in fp32."""
        scaled: Array = _fp32(self.weights, self.name, start, stop) * np.float32(self.scaling)
        return scaled


class Adapter:
    """A validated LoRA adapter: settings, low-rank factors by module, and tensors that replace those of the base."""

    def __init__(self, found: ResolvedSource, weights: Checkpoint, config: LoraConfig) -> None:
        self.weights, self.config, self._found = weights, config, found
        self.parts: dict[str, dict[str, TensorInfo]] = {}  # module at training time → kind of tensor → tensor
        self.whole: dict[str, TensorInfo] = {}  # name at training time → tensor that replaces the base's
        for key, tensor in weights.tensors.items():
            self._sort(key, tensor)
        for module, parts in self.parts.items():
            for kind in parts:
                if PAIRS.get(kind, B) not in parts:
                    raise CheckpointError(f"{self.file} has {module}.{kind} without {PAIRS.get(kind, B)}.")

    @classmethod
    def open(cls, found: ResolvedSource) -> Adapter:
        """Opens and checks an adapter's folder.

        Raises:
            CheckpointError: it is not a LoRA adapter, is damaged, or uses a method that vlpack does not merge.
        """
        folder = found.folder
        place = locate(folder, CONFIG)
        if place is None:
            raise CheckpointError(
                f"{folder} has no {CONFIG}, so it is not an adapter.", "Give a folder that peft's save_pretrained made."
            )
        values = read_json(folder / CONFIG, place, strict=True)
        config = LoraConfig.read(values, str(folder / CONFIG))
        place = locate(folder, WEIGHTS)
        if place is None:
            what = "is in shards, which are not supported" if locate(folder, INDEX) else "may be a pickle, or missing"
            raise CheckpointError(
                f"{folder} has no {WEIGHTS}; the adapter {what}.",
                "If you trust its source, load it with peft and call save_pretrained, which writes one file.",
            )
        weights = Checkpoint.of_files(folder, values, {WEIGHTS: place})
        try:
            return cls(found, weights, config)
        except BaseException:
            weights.close()
            raise

    @property
    def file(self) -> str:
        """Path of the file with the tensors, for messages."""
        return str(self.weights.folder / WEIGHTS)

    @property
    def name(self) -> str:
        """The adapter's name for messages: its repository's id or its folder's name."""
        return self._found.name

    def described(self) -> dict[str, Any]:
        """The adapter's origin and the hashes of its files, for the manifest."""
        return {**self._found.described(), "files": {name: self.weights.sha256(name) for name in (CONFIG, WEIGHTS)}}

    def close(self) -> None:
        """Closes the file with the tensors."""
        self.weights.close()

    def _sort(self, key: str, tensor: TensorInfo) -> None:
        prefix = next((prefix for prefix in ADAPTER_PREFIXES if key.startswith(prefix)), None)
        where = f"{self.file}, tensor {quote(key)}"
        if prefix is None:
            raise CheckpointError(f"{where}: its name does not begin with {ADAPTER_PREFIXES[0]}, as peft's do.")
        if tensor.dtype.kind not in "fV" or tensor.dtype.itemsize < 2:
            raise CheckpointError(
                f"{where} is of type {tensor.dtype}; it must be bfloat16, float16, float32 or float64."
            )
        path = key.removeprefix(prefix)
        for kind in (*PAIRS, B_BIAS):
            if path.endswith(f".{kind}"):
                self.parts.setdefault(path.removesuffix(f".{kind}"), {})[kind] = tensor
                return
        if "lora_" in path or ".token_adapter." in path:
            raise CheckpointError(f"{where} belongs to a method that vlpack does not merge.", MERGE_WITH_PEFT)
        self.whole[path] = tensor


class Merged(Checkpoint):
    """A checkpoint with a LoRA adapter merged into it. The files of its base and its adapter must stay open."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        super().__init__(base.folder, base.config, dict(base.tensors), base.weight_files(), base._pool)
        self.adapter, self._base = adapter, base
        self._places: dict[str, tuple[Checkpoint, str]] = {}
        self._deltas: dict[str, Delta] = {}

    def take(self, name: str, source: Checkpoint, inner: str) -> None:
        """Replaces the tensor ``name`` by the tensor ``inner`` of ``source``."""
        self._places[name] = (source, inner)
        self.tensors = {**self.tensors, name: replace(source.tensors[inner], name=name)}

    def add(self, name: str, delta: Delta) -> None:
        """Adds ``delta`` to the tensor ``name``."""
        self._deltas[name] = delta

    @property
    def changed(self) -> set[str]:
        """Names of the tensors that differ from the base's."""
        return self._places.keys() | self._deltas.keys()

    def packed(self, name: str) -> Packed | None:
        """The quantized form of a tensor of the base; None if the adapter changes the tensor."""
        return None if name in self.changed else self._base.packed(name)

    def total_bytes(self) -> int:
        """Size of the base's tensors, in bytes."""
        return self._base.total_bytes()

    def rows(self, name: str, start: int, stop: int, *, width: int | None = None) -> Array:
        """Rows ``[start, stop)`` of a tensor as in `Checkpoint.rows`, but in fp32 if the adapter adds to the tensor."""
        source, inner = self._places.get(name, (self._base, name))
        delta = self._deltas.get(name)
        if delta is None or start >= stop:
            piece = source.rows(inner, start, stop, width=width)
            if name in self._places:
                check_finite(f"{inner} of {source.folder.name}", _matrix(piece), start)
            return piece
        cols = int(np.prod(self._tensor(name).shape[1:]))
        out = np.empty((stop - start, cols), np.float32)
        for low, high in slabs(stop - start, cols):
            out[low:high] = source.rows(inner, start + low, start + high, width=cols)
            with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for infinite values
                out[low:high] += delta.rows(start + low, start + high)
        return out if width is not None else out.reshape(stop - start, *self._tensor(name).shape[1:])

    def read(self, name: str) -> Array:
        """A whole tensor as in `Checkpoint.read`, but in fp32 if the adapter adds to the tensor."""
        shape = self._tensor(name).shape
        if name not in self.changed:
            return self._base.read(name)
        return self.rows(name, 0, shape[0]) if shape else self._places[name][0].read(self._places[name][1])


Place = str | os.PathLike[str]


def places_of(lora: Place | Sequence[Place]) -> Sequence[Place]:
    """The places of adapters as a sequence, from one place or several."""
    return [lora] if isinstance(lora, str | os.PathLike) else lora


def open_adapters(
    places: Sequence[Place],
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> list[Adapter]:
    """Opens and checks the adapters at the given folders or Hub ids.

    Raises:
        CheckpointError: an adapter cannot be found or downloaded, or is not usable.
    """
    return [Adapter.open(resolve(place, cache_dir=cache_dir, token=token, patterns=FILES)) for place in places]


def merge_all(base: Checkpoint, adapters: Sequence[Adapter], architecture: Architecture) -> list[Merged]:
    """Merges adapters one after another with `merge`. Returns every step; the last one has all adapters merged."""
    merged: list[Merged] = []
    for adapter in adapters:
        merged.append(merge(merged[-1] if merged else base, adapter, architecture))
    return merged


def adapter_notes(merged: Sequence[Merged], base: ResolvedSource, weights: Sequence[Weight]) -> list[str]:
    """Notes for the user on adapters that were trained on another model or that change none of ``weights``."""
    used = {tensor.name for weight in weights for tensor in weight.source.tensors()}
    notes = []
    for checkpoint in merged:
        adapter = checkpoint.adapter
        trained_on = adapter.config.base_model_name_or_path
        if trained_on and _last_part(trained_on) != _last_part(base.repo_id or str(base.folder.resolve())):
            notes.append(f"The adapter {adapter.name} says that it was trained on {quote(trained_on)}.")
        if not used & checkpoint.changed:
            notes.append(f"The adapter {adapter.name} changes nothing in the parts that are built.")
    return notes


def _last_part(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def merge(base: Checkpoint, adapter: Adapter, architecture: Architecture) -> Merged:
    """Merges a LoRA adapter into a checkpoint.

    Args:
        base: the checkpoint, which `vlpack.export.check.check_tensors` has accepted.
        adapter: the adapter, which is checked against the base.
        architecture: the base's architecture; its embedding and head are untied if the adapter trained them separately.

    Raises:
        CheckpointError: a tensor has no counterpart in the base or another shape, ranks disagree, or peft's merge would
            differ from the model that was trained.
    """
    merged = Merged(base, adapter)
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    embedding = f"{architecture.decoder.prefix}.embed_tokens.weight"
    tied = architecture.tied and architecture.task != EMBEDDING  # an embedding model has no head
    if tied:
        shapes.setdefault(HEAD, shapes[embedding])
    names = _Names(adapter, shapes, architecture.renamed)
    for path, tensor in adapter.whole.items():
        name = names.whole(path)
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{adapter.file}: {path} has the shape {list(tensor.shape)}, {name} of the base {list(shapes[name])}.",
                "The adapter is of another model, or its vocabulary was resized; neither can be merged.",
            )
        merged.take(name, adapter.weights, tensor.name)
    for module, parts in adapter.parts.items():
        name = names.find(f"{module}.weight")
        if tied and name in (HEAD, embedding):
            raise CheckpointError(
                f"{adapter.file} has LoRA on {module}, which is tied to another module. Merging it would change "
                "both, which is not the model that was trained (peft's issue 2777).",
                "Save the base with a separate head and tie_word_embeddings false, and build from that.",
            )
        merged.add(name, _low_rank(adapter, module, parts, name, shapes[name]))
        if B_BIAS in parts:
            bias = names.find(f"{module}.bias")
            _check_shape(adapter, f"{module}.{B_BIAS}", parts[B_BIAS], shapes[bias])
            merged.add(bias, BiasOfB(adapter.weights, parts[B_BIAS].name, adapter.config.scaling(module)))
    missing = [n for n in shapes if adapter.config.saves(n) and n not in merged.changed and not _is_unused(n)]
    if missing:
        raise CheckpointError(f"{adapter.file} lacks {missing[0]}, which modules_to_save in {CONFIG} covers.")
    if tied:
        _settle_tie(merged, base, adapter, architecture, embedding)
    return merged


def _settle_tie(merged: Merged, base: Checkpoint, adapter: Adapter, architecture: Architecture, embedding: str) -> None:
    """Unties the embedding and the head if the adapter trained them separately; otherwise they must stay equal."""
    if not {HEAD, embedding} & merged.changed:
        return
    apart = any(
        adapter.config.saves(path) for path in adapter.whole if path.endswith(("embed_tokens.weight", "lm_head.weight"))
    )
    if apart and not adapter.config.ensure_weight_tying:
        if HEAD not in merged.changed:
            merged.take(HEAD, base, embedding)
        architecture.untie()
    elif HEAD in merged.changed:
        check_equal(merged, embedding)


def _low_rank(
    adapter: Adapter, module: str, parts: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]
) -> LowRank:
    """The low-rank update of one weight, after its shapes and ranks were checked against the base and the config."""
    turned = EMBEDDING_A in parts
    first, second = (EMBEDDING_A, EMBEDDING_B) if turned else (A, B)
    if len(shape) != 2 or (turned and A in parts):
        what = "a convolution or a stack of experts" if len(shape) > 2 else "not one matrix"
        raise CheckpointError(
            f"{adapter.file} has LoRA on {module}, which is {what}; vlpack does not merge that.", MERGE_WITH_PEFT
        )
    if not turned and (B_BIAS in parts) != adapter.config.lora_bias:
        raise CheckpointError(f"{adapter.file}: {module} and lora_bias in {CONFIG} disagree on a bias of lora_B.")
    a, b, rank = parts[first], parts[second], adapter.config.rank(module)
    ranks = [a.shape[:1], b.shape[1:2], (rank,)]
    if len(set(ranks)) > 1:
        raise CheckpointError(
            f"{adapter.file}: the rank of {module} is {' '.join(map(str, ranks[0]))} in {first}, "
            f"{' '.join(map(str, ranks[1]))} in {second} and {rank} by {CONFIG}; they must be equal."
        )
    out, inner = shape[::-1] if turned else shape
    _check_shape(adapter, f"{module}.{first}", a, (rank, inner))
    _check_shape(adapter, f"{module}.{second}", b, (out, rank))
    return LowRank(adapter.weights, a.name, b.name, adapter.config.scaling(module), turned)


def _check_shape(adapter: Adapter, path: str, tensor: TensorInfo, wanted: tuple[int, ...]) -> None:
    if tensor.shape != wanted:
        raise CheckpointError(
            f"{adapter.file}: {path} has the shape {list(tensor.shape)}; this base needs {list(wanted)}.",
            "The adapter was trained on another model.",
        )


class _Names:
    """Maps an adapter's tensor names, which depend on the transformers version that trained it, to the base's names."""

    def __init__(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], renamed: Mapping[str, str]) -> None:
        self._adapter, self._shapes, self._renamed = adapter, shapes, renamed
        self._found: dict[str, str] = {}

    def whole(self, path: str) -> str:
        """The name that a tensor, which the adapter replaces, has in the base model."""
        module, _, kind = path.rpartition(".")
        plain = module.removesuffix(".base_layer")
        if (plain != module) != (plain in self._adapter.parts):
            raise CheckpointError(
                f"{self._adapter.file}: {path} is not a name that peft uses, so peft would not load it."
            )
        name = self.find(f"{plain}.{kind}")
        if len(self._shapes[name]) == 3:  # stored in one of two layouts, see layers/moe.py
            raise CheckpointError(f"{self._adapter.file}: {path} is a stack of experts, which vlpack does not replace.")
        return name

    def find(self, path: str) -> str:
        """The base's name of a tensor that the adapter changes; each may be changed under one name only.

        Raises:
            CheckpointError: the base has no such tensor, or the adapter changes it under another name too.
        """
        name = next((name for name in self._candidates(path) if name in self._shapes), None)
        if name is None:
            near = difflib.get_close_matches(path, self._shapes, n=1)
            raise CheckpointError(
                f"{self._adapter.file} changes {quote(path)}, which the base does not have.",
                f"The nearest name is {quote(near[0])}." if near else "The adapter was trained on another model.",
            )
        if self._found.setdefault(name, path) != path:
            raise CheckpointError(f"{self._adapter.file} changes {name} as {path} and as {self._found[name]}.")
        return name

    def _candidates(self, path: str) -> Iterator[str]:
        # transformers before 4.52 used `language_model.model` in some classes; a bare model has no prefix `model.`
        turned = path.replace("language_model.model.", "model.language_model.", 1).replace("language_model.lm_", "lm_")
        for form in (path, f"model.{path}", turned):
            yield form
            yield new_name(form, self._renamed)


def _matrix(piece: Array) -> Array:
    return piece.reshape(len(piece), int(np.prod(piece.shape[1:])))  # not -1, which fails if there are no rows


def _is_unused(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in UNUSED)


def _fp32(weights: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Array:
    """Reads rows ``[start, stop)`` of an adapter's tensor as an fp32 matrix ``[rows, cols]``."""
    shape = weights.tensors[name].shape
    piece = weights.rows(name, start, shape[0] if stop is None else stop, width=int(np.prod(shape[1:])))
    check_finite(f"{name} of {weights.folder.name}", piece, start)
    return piece.astype(np.float32, copy=False)
