"""The weights that a package keeps of a checkpoint, in the checkpoint's own basis, and the inputs that it rounds.

Both follow from the checkpoint and the policy alone: weights are balanced and rotated, rounded, and brought back. No
graph is asked, so that one which does not undo what was done to its weights differs from transformers with these.
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
    """The values that ``storage`` keeps of a weight [rows, cols]."""
    if isinstance(storage, ChannelInt8):
        return dequantize_rows(*quantize_rows(weight))
    if isinstance(storage, Blocks):
        kind = {"rotated": storage.rotated, "narrow": storage.narrow}
        blocks = quantize_blocks(weight, storage.bits, storage.block_size, storage.symmetric, **kind)
        if not storage.narrow:
            blocks = blocks._replace(scales=blocks.scales.astype(storage.dtype))
        return dequantize_blocks(blocks, weight.shape[1], storage.bits)
    dtype: str = getattr(storage, "dtype")  # noqa: B009 (of the storages that are left)
    return weight.astype(dtype).astype(np.float32)


class Kept:
    """The matrices of a package of that precision, by the names of the checkpoint's tensors.

    A tied head has the name ``lm_head.weight``, as it may be stored otherwise than the embedding. The rows that score
    its likeliest tokens again are ``lm_head_candidates.weight``.

    Attributes:
        weights: name → the values that the package keeps, ``[rows, cols]``.
        declared: name → the weight of the graph that the tensor is, or is a part of.
        scales: of its balanced channels.
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
        """As `parity.Reference.with_weights` takes it: the values in place of ``weight [rows, cols]``."""
        assert self.weights[name].shape == weight.shape, name
        return self.weights[name]

    def inputs(self, name: str, rounding: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """What the package makes of a matrix's input, in the checkpoint's basis.

        Args:
            name: of the matrix.
            rounding: of a tensor ``[.., cols]`` of torch, to 8 bits.
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
        """``Σ xᵀx`` of what the package multiplies by a matrix, from that ``sums [cols, cols]`` of its input ``x``."""
        transform = self.declared[name].transform
        change = np.eye(len(sums))
        if transform.reads is not None:
            change *= transform.reads.along_columns(self.scales(transform.reads))[:, None]
        blocks = np.eye(len(sums) // transform.input_rotation)
        change = change @ np.kron(blocks, rotation_matrix(transform.input_rotation))
        return np.asarray(change.T @ sums @ change)


def named_rows(weight: Weight) -> Iterator[tuple[str, int, int]]:
    """The checkpoint's tensors that a weight contains, each with its rows; heads have names of their own."""
    if weight.path in ("lm_head", "lm_head_candidates"):
        yield f"{weight.path}.weight", 0, weight.rows
        return
    first = 0
    for part in weight.source.parts if isinstance(weight.source, Stacked) else (weight.source,):
        if isinstance(part, Source):
            yield part.name, first, first + part.rows
        first += part.rows
