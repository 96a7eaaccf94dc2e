"""Compares the weights of a package with those of the checkpoint it was built from, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlpack.architectures import Architecture
from vlpack.architectures.ports import GraphOptions, Part
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.rows import Shifted, Source, Stacked
from vlpack.errors import PackageError, VerifyError, VlpackError
from vlpack.export.graph import Weight, declare
from vlpack.export.weights import encode
from vlpack.layers.candidates import CANDIDATES
from vlpack.layers.candidates import NAME as CANDIDATES_PATH
from vlpack.quantize.kept import holds
from vlpack.quantize.policy import Policy, PrecisionFacts, QuantizationOptions, make_policy
from vlpack.quantize.storage import is_kept, slabs
from vlpack.quantize.transforms import ChannelScales, Transform, unpacked_scales
from vlpack.tasks import EMBEDDING, GENERATE
from vlpack.verification.metrics import Gap
from vlpack.verification.result import WeightResult

Array = npt.NDArray[Any]

CALIBRATED_SLACK = 4
"""Largest ratio of a calibrated weight's error to that of rounding to nearest, in relative L2, because calibration does
not choose the nearest codes. The codes of another weight have a ratio of 10."""


def policy_of(manifest: Mapping[str, Any], facts: PrecisionFacts) -> Policy:
    """The precision policy that a package was built with.

    Raises:
        PackageError: the manifest contains no policy, or one that this version of vlpack does not know.
    """
    # packages of earlier versions lack these settings: they are neither balanced nor rotated, and have fp32 scales
    before = {"balance": False, "rotation": False, "narrow_scales": False, "eight_bits": {}}
    try:
        options = QuantizationOptions(**{**before, **manifest["quantization"]})
        policy = make_policy(manifest["precision"], manifest["execution_provider"], options, facts)
    except (KeyError, TypeError, ValueError, AttributeError, VlpackError):
        raise PackageError(
            "vlpack.json does not say how the weights are stored, or says it in a way that this vlpack does not know.",
            "Build the package again.",
        ) from None
    if policy.described() != manifest.get("policy"):
        raise PackageError(
            "The policy in vlpack.json is not the one that this version of vlpack makes for the reference.",
            "Give the checkpoint that the package was built from, or build the package again.",
        )
    return policy


class Weights:
    """All weights of a model, both as the checkpoint has them and as a package stores them.

    Args:
        architecture: architecture of both.
        checkpoint: the reference.
        policy: the package's precision policy.
        graphs: the package's graph of each part, without loaded weights.
        balanced: the manifest's entry with the channel scales, about calibration or the import of a quantized
            checkpoint; None if the scales follow from the checkpoint.

    Raises:
        PackageError: the channel scales in the manifest are damaged.
    """

    def __init__(
        self,
        architecture: Architecture,
        checkpoint: Checkpoint,
        policy: Policy,
        graphs: Mapping[str, ir.Model],
        balanced: Any = None,
    ) -> None:
        self.checkpoint, self.graphs = checkpoint, graphs
        self.by_part: dict[str, list[Weight]] = {}
        for part in _parts(architecture, policy, graphs):
            self.by_part[part.name] = declare(part, policy)
        known = _known_scales(balanced, [weight.transform for _, weight in self.all()])
        self.scales = ChannelScales(checkpoint, known=known)

    def head(self, task: str, *, stored: bool) -> Callable[[Array], Array] | None:
        """The function from the last token's hidden state ``[H]`` to the result of an embedding model or reranker.

        Args:
            task: the package's task.
            stored: whether the rows of yes and no have the package's values instead of the checkpoint's.

        Returns:
            the function; None for a model that generates.
        """
        if task == GENERATE:
            return None
        if task == EMBEDDING:
            return lambda state: state / np.linalg.norm(state)
        # the module of the rows of yes and no is called "answers" in the package format
        part, weight = next(found for found in self.all() if found[1].path.endswith(".answers"))
        rows = self.stored(part, weight) if stored else self.original(weight)  # [2, H]

        def probabilities(state: Array) -> Array:
            logits = rows @ state
            shares = np.exp(logits - logits.max())
            return np.asarray(shares / shares.sum())

        return probabilities

    def second_stage(self) -> Callable[[Array, Array], Array] | None:
        """The second stage of a 4-bit head (`vlpack.layers.candidates`), with the package's values.

        Returns:
            the function from logits ``[S, V]`` and inputs of the head ``[S, H]`` to the logits in which the likeliest
            tokens are scored again; None if the head has one stage.
        """
        found = [(part, weight) for part, weight in self.all() if weight.path.endswith(CANDIDATES_PATH)]
        if not found:
            return None

        def scored_again(logits: Array, states: Array) -> Array:
            rows = self.stored(*found[0])  # [V, H]
            result: Array = logits.copy()
            for line, state in zip(result, states, strict=True):
                ids = np.argsort(-line, kind="stable")[:CANDIDATES]
                line[ids] = rows[ids] @ state
            return result

        return scored_again

    def all(self) -> Iterator[tuple[str, Weight]]:
        """All weights with the name of their part; a weight that two parts share comes twice."""
        for part, weights in self.by_part.items():
            for weight in weights:
                yield part, weight

    def original(self, weight: Weight) -> Array:
        """The checkpoint's values of a weight, float32 ``[rows, cols]``."""
        return weight.source.read(self.checkpoint, 0, weight.rows).astype(np.float32)

    def held(self, part: str, weight: Weight) -> dict[str, Array]:
        """The arrays in which the package stores a weight, by name.

        Raises:
            PackageError: the graph lacks an array, or the array has another type or size.
        """
        arrays = {}
        initializers = self.graphs[part].graph.initializers
        for name, (dtype, shape) in weight.storage.arrays(weight.rows, weight.cols).items():
            own = f"{weight.path}.{name}"
            if weight.path in initializers:  # a parameter by itself, which has no module below which it is stored
                own = weight.path
            value = initializers.get(own)
            array = None if value is None or value.const_value is None else value.const_value.numpy()
            if array is None or array.dtype != dtype or array.size != np.prod(shape):
                raise PackageError(f"The {part} graph has no {own} of the type {dtype} and the shape {list(shape)}.")
            arrays[name] = array.reshape(shape)
        return arrays

    def stored(self, part: str, weight: Weight) -> Array:
        """A weight of the package after dequantization, without balance and rotation, float32 ``[rows, cols]``."""
        values = weight.storage.values(self.held(part, weight), weight.rows, weight.cols)
        return weight.transform.undo(values, self.scales)

    def compare(self) -> Iterator[WeightResult]:
        """Compares every weight of the package with the checkpoint, and with what a build would store."""
        for part, weight in self.all():
            held = self.held(part, weight)
            if is_kept(weight.storage) and not holds(weight.storage, weight.source, self.checkpoint):
                error = self._error(weight, held)  # another checkpoint's codes
                yield WeightResult(weight.path, part, weight.storage.label, error, 0.0, False)
                continue
            same, error = self._same(weight, held), self._error(weight, held)
            expected = error
            if weight.calibrated or not same:
                expected = self._error(weight, _collect(encode(self.checkpoint, weight, self.scales)))
            same = same and error <= expected * (CALIBRATED_SLACK if weight.calibrated else 1)
            yield WeightResult(weight.path, part, weight.storage.label, error, expected, same)

    def _same(self, weight: Weight, held: Mapping[str, Array]) -> bool:
        """Whether the arrays are byte for byte those of a build; the codes of calibrated weights are not compared."""
        done = dict.fromkeys(held, 0)
        for name, chunk in encode(self.checkpoint, weight, self.scales):
            if weight.calibrated and name == "qweight":
                continue
            start, done[name] = done[name], done[name] + chunk.size
            if not np.array_equal(held[name].reshape(-1)[start : done[name]], chunk.reshape(-1)):
                return False
        return True

    def _error(self, weight: Weight, arrays: Mapping[str, Array]) -> float:
        """The relative L2 error of stored arrays against the checkpoint's values, after the same balance and rotation.

        Only a slab of rows is in memory at a time.
        """
        gap, rows, cols = Gap(), weight.rows, weight.cols
        read = weight.reader(self.checkpoint, self.scales)
        for start, stop in slabs(rows, cols):
            stored = weight.storage.values(arrays, rows, cols, start, stop)
            gap.add(stored, read(start, stop).astype(np.float32))
        return gap.difference.relative


def _known_scales(balanced: Any, transforms: Sequence[Transform]) -> dict[str, Array]:
    """The scales by which a package's channels were balanced; empty if they follow from the checkpoint.

    Raises:
        PackageError: the manifest's entry is damaged, or does not fit these transforms.
    """
    if balanced is None:
        return {}
    try:
        known = unpacked_scales(balanced["scales"])
        for channels in {side for one in transforms for side in (one.reads, one.writes) if side is not None}:
            if len(known[channels.name]) != channels.count:
                raise ValueError(f"{channels.name} has {channels.count} channels")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PackageError(
            f"The channel scales in vlpack.json cannot be used: {error}.", "Build the package again."
        ) from None
    return known


def _collect(chunks: Iterator[tuple[str, Array]]) -> dict[str, Array]:
    pieces: dict[str, list[Array]] = {}
    for name, chunk in chunks:
        pieces.setdefault(name, []).append(chunk.reshape(-1))
    return {name: np.concatenate(parts) for name, parts in pieces.items()}


def _parts(architecture: Architecture, policy: Policy, graphs: Mapping[str, ir.Model]) -> list[Part]:
    options = GraphOptions.of_policy(policy)
    if "text" in graphs:
        return [architecture.text_part(options)]
    return [part for part in architecture.parts(options) if part.name in graphs]


class Parameters:
    """The weights under the names of transformers' parameters.

    Args:
        weights: the model's weights.
        stored: whether to give the package's values instead of the checkpoint's.
    """

    def __init__(self, weights: Weights, *, stored: bool) -> None:
        self.weights, self.from_package = weights, stored
        self._places: dict[str, tuple[str, Weight, int, int]] = {}
        self._fused: dict[str, tuple[str, Weight]] = {}
        self._last: tuple[Any, Array] | None = None
        for part, weight in weights.all():
            self._places.setdefault(_own_name(weight), (part, weight, 0, weight.rows))
            if ".experts." in weight.path:
                self._fused[weight.path] = (part, weight)
        # after all modules' own names: a tied head reads the embedding's tensor, but may be stored in fewer bits
        for part, weight in weights.all():
            for name, first, stop in _tensors_of(weight):
                self._places.setdefault(name, (part, weight, first, stop))

    def __call__(self, name: str, shape: tuple[int, ...]) -> Array:
        """The values of a parameter, float32, in the shape that transformers' module has.

        Raises:
            VerifyError: the model has no such weight.
        """
        if name in self._fused:
            return self._experts(name, shape)
        if name not in self._places:
            raise VerifyError(f"The reference has a parameter {name}, but the package has no such weight.")
        part, weight, first, stop = self._places[name]
        return np.ascontiguousarray(self._matrix(part, weight)[first:stop]).reshape(shape)

    def forget(self) -> None:
        """Release the matrix that was read last, which may have gigabytes."""
        self._last = None

    def _experts(self, name: str, shape: tuple[int, ...]) -> Array:
        """The fused weights of all experts: ``[E, 2 · I, H]`` or ``[E, H, I]``.

        In the former, transformers has all gate rows before the up rows; in the package they alternate.
        """
        matrix = self._matrix(*self._fused[name]).reshape(shape)
        if name.endswith("gate_up_proj"):
            matrix = np.concatenate([matrix[:, 0::2], matrix[:, 1::2]], axis=1)
        return matrix

    def _matrix(self, part: str, weight: Weight) -> Array:
        # q, k and v are parameters of one weight and are read one after the other, so the last matrix is kept
        key = (part, weight.path)
        if self._last is None or self._last[0] != key:
            self._last = None
            values = self.weights.stored(part, weight) if self.from_package else self.weights.original(weight)
            if isinstance(weight.source, Shifted):  # transformers adds the offset itself
                values = values - np.float32(weight.source.offset)
            self._last = (key, values)
        return self._last[1]


def _own_name(weight: Weight) -> str:
    """The name of a weight's parameter in transformers, if it is one parameter there."""
    return weight.path if isinstance(weight.source, Shifted) or weight.cols == 1 else f"{weight.path}.weight"


def _tensors_of(weight: Weight) -> Iterator[tuple[str, int, int]]:
    """The checkpoint's tensors that make a weight: name, first row and end row of each."""
    source, first = weight.source, 0
    for part in source.parts if isinstance(source, Stacked) else (source,):
        if isinstance(part, Source):
            yield part.name, first, first + part.rows
        first += part.rows
