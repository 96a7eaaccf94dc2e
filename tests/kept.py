"""The dequantized weights of a package in the checkpoint's own basis, and its rounded inputs, for comparisons.

Both are computed from the checkpoint and the policy alone: weights are balanced, rotated, rounded and transformed back.
Graphs are not used, so a graph that does not undo the transforms of its weights differs from transformers with these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlpack.architectures import architecture_of
from vlpack.architectures.ports import GraphOptions
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.rows import Source, Stacked
from vlpack.export.graph import Weight, declare
from vlpack.quantize.blocks import dequantize_blocks, quantize_blocks
from vlpack.quantize.channels import dequantize_rows, quantize_rows
from vlpack.quantize.policy import QuantizationOptions, make_policy
from vlpack.quantize.rotate import rotation_matrix
from vlpack.quantize.storage import Blocks, ChannelInt8, Storage
from vlpack.quantize.transforms import ChannelScales
from vlpack.tasks import GENERATE


def rounded(weight: np.ndarray, storage: Storage) -> np.ndarray:
    """A weight [rows, cols], encoded by ``storage`` and decoded again."""
    if isinstance(storage, ChannelInt8):
        return dequantize_rows(*quantize_rows(weight))
    if isinstance(storage, Blocks):
        kind = {"rotated": storage.rotated, "narrow": storage.narrow}
        blocks = quantize_blocks(weight, storage.bits, storage.block_size, storage.symmetric, **kind)
        if not storage.narrow:
            blocks = blocks._replace(scales=blocks.scales.astype(storage.dtype))
        return dequantize_blocks(blocks, weight.shape[1], storage.bits)
    dtype: str = getattr(storage, "dtype")  # noqa: B009 (all remaining storages have it)
    return weight.astype(dtype).astype(np.float32)


class Kept:
    """The dequantized matrices of a package, by the names of the checkpoint's tensors.

    A tied head has the name ``lm_head.weight``, because it may be stored differently than the embedding. The rows
    that score its likeliest tokens again are ``lm_head_candidates.weight``.

    Attributes:
        weights: dequantized values ``[rows, cols]`` by tensor name.
        declared: weights of the graph by the name of a tensor that they contain.
        scales: scales of the package's balanced channels.
    """

    def __init__(
        self, folder: Path, precision: str, provider: str = "cpu", task: str = GENERATE, **options: Any
    ) -> None:
        self.weights: dict[str, np.ndarray] = {}
        self.declared: dict[str, Weight] = {}
        with Checkpoint.open(folder) as opened:
            architecture, checkpoint = architecture_of(opened, task)
            quantization = QuantizationOptions(**options)
            policy = make_policy(precision, provider, quantization, architecture.precision_facts)
            self.scales = ChannelScales(checkpoint)
            for part in architecture.parts(GraphOptions.of_policy(policy)):
                for weight in declare(part, policy):
                    if weight.cols > 1:
                        self._add(weight, checkpoint)

    def _add(self, weight: Weight, checkpoint: Checkpoint) -> None:
        stored = rounded(weight.reader(checkpoint, self.scales)(0, weight.rows), weight.storage)
        values = weight.transform.undo(stored, self.scales)
        for name, first, stop in named_rows(weight):
            self.weights[name] = values[first:stop]
            self.declared[name] = weight

    def __call__(self, name: str, weight: np.ndarray) -> np.ndarray:
        """The values that replace ``weight [rows, cols]``; a function for `parity.Reference.with_weights`."""
        assert self.weights[name].shape == weight.shape, name
        return self.weights[name]

    def inputs(self, name: str, rounding: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A function that transforms and rounds a matrix's input as the package does, and transforms it back.

        Args:
            name: name of the matrix.
            rounding: function that rounds a torch tensor ``[.., cols]`` to 8 bits.
        """
        import torch

        transform = self.declared[name].transform
        size = transform.input_rotation
        matrix = torch.tensor(rotation_matrix(size))
        scales = torch.ones(1)
        if transform.reads is not None:
            scales = torch.tensor(transform.reads.along_columns(self.scales(transform.reads)))

        def kept(x: Any) -> Any:
            x = ((x * scales).unflatten(-1, (-1, size)) @ matrix).flatten(-2)
            return (rounding(x).unflatten(-1, (-1, size)) @ matrix.T).flatten(-2) / scales

        return kept

    def products(self, name: str, sums: np.ndarray) -> np.ndarray:
        """``Σ xᵀx`` of a matrix's transformed inputs, from the ``sums [cols, cols]`` of its original inputs."""
        transform = self.declared[name].transform
        change = np.eye(len(sums))
        if transform.reads is not None:
            change *= transform.reads.along_columns(self.scales(transform.reads))[:, None]
        blocks = np.eye(len(sums) // transform.input_rotation)
        change = change @ np.kron(blocks, rotation_matrix(transform.input_rotation))
        return np.asarray(change.T @ sums @ change)


def named_rows(weight: Weight) -> Iterator[tuple[str, int, int]]:
    """Yields the names and rows of the checkpoint tensors that a weight contains; heads have names of their own."""
    if weight.path in ("lm_head", "lm_head_candidates"):
        yield f"{weight.path}.weight", 0, weight.rows
        return
    first = 0
    for part in weight.source.parts if isinstance(weight.source, Stacked) else (weight.source,):
        if isinstance(part, Source):
            yield part.name, first, first + part.rows
        first += part.rows
