"""A quantized checkpoint, presented as an unquantized one: its tensors have the names and shapes of the original model.

Code that reads it needs no knowledge of quantization; `Checkpoint.packed` gives access to the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.checkpoint import Checkpoint, new_name
from vlpack.checkpoint.files import quote
from vlpack.checkpoint.formats import awq, bitsandbytes, compressed, fp8, gguf, gptq
from vlpack.checkpoint.formats.detect import ENDINGS, Declared, detect, refused
from vlpack.checkpoint.formats.packed import Packed
from vlpack.checkpoint.safetensors import TensorInfo
from vlpack.errors import CheckpointError

Array = npt.NDArray[Any]

FINDERS = {
    "compressed-tensors": (compressed.find, fp8.find),
    "awq": (awq.find,),
    "gptq": (gptq.find,),
    "fp8": (fp8.find,),
    "modelopt": (fp8.find,),
    "bitsandbytes": (bitsandbytes.find,),
    "gguf": (gguf.find,),
}
"""For each method, the functions that find the weights that it quantized."""

ACTIVATIONS = (
    ".input_scale", ".output_scale", ".input_zero_point", ".output_zero_point", ".activation_scale", ".q_scale",
    ".k_scale", ".v_scale", ".weight_format",
)  # fmt: skip
"""Endings of the names of tensors that are left out, because they do not affect the values of weights: they concern
activations, the cache or the memory layout."""


class Unpacked(Checkpoint):
    """A quantized checkpoint whose packed weights are presented as float32 tensors.

    Args:
        base: the quantized checkpoint, with its stored tensors.
        declared: the quantization that it declares.
        tensors: entries of the presented tensors, by name.
        weights: quantized weights, by name.

    Attributes:
        declared: the quantization that it declares.
    """

    def __init__(
        self, base: Checkpoint, declared: Declared, tensors: dict[str, TensorInfo], weights: Mapping[str, Packed]
    ) -> None:
        super().__init__(base.folder, base.config, tensors, base.weight_files(), base._pool)
        self.declared, self._base, self._weights = declared, base, dict(weights)

    def packed(self, name: str) -> Packed | None:
        return self._weights.get(name)

    def is_void(self, name: str) -> bool:
        module = name.removesuffix(".bias")
        if module == name or f"{module}.weight" not in self._weights:
            return False
        return not super().read(name).any()  # GPTQ's tools write biases of zeros

    def packed_weights(self) -> Mapping[str, Packed]:
        """All quantized weights, by name."""
        return self._weights

    def check_values(self) -> None:
        """Reads the scales of all quantized weights and checks them.

        Raises:
            CheckpointError: a scale is NaN, infinite or too large.
        """
        for weight in self._weights.values():
            weight.check()

    def renamed(self, prefixes: Mapping[str, str]) -> Unpacked:
        plain = super().renamed(prefixes)
        weights = {new_name(name, prefixes): weight for name, weight in self._weights.items()}
        return Unpacked(self._base, self.declared, dict(plain.tensors), weights)

    def without(self, name: str) -> Unpacked:
        plain = super().without(name)
        weights = {key: weight for key, weight in self._weights.items() if key != name}
        return Unpacked(self._base, self.declared, dict(plain.tensors), weights)

    def rows(self, name: str, start: int, stop: int, *, width: int | None = None) -> Array:
        weight = self._weights.get(name)
        if weight is None:
            return super().rows(name, start, stop, width=width)
        matrix = weight.cols if len(weight.shape) == 2 or width is not None else int(np.prod(weight.shape[1:]))
        if width not in (None, weight.cols):
            raise CheckpointError(f"The quantized tensor {quote(name)} has rows of {weight.cols} values, not {width}.")
        per_row = matrix // weight.cols
        if not 0 <= start <= stop <= weight.count // per_row:
            raise CheckpointError(f"The tensor {quote(name)} has no rows {start} to {stop}.")
        values = weight.rows(start * per_row, stop * per_row)
        return values if width is not None else values.reshape(stop - start, *weight.shape[1:])

    def read(self, name: str) -> Array:
        weight = self._weights.get(name)
        return super().read(name) if weight is None else weight.rows(0, weight.count).reshape(weight.shape)

    def total_bytes(self) -> int:
        return self._base.total_bytes()

    def _read(self, tensor: TensorInfo, shape: tuple[int, ...], offset: int) -> Array:
        return self._base._read(tensor, shape, offset)  # a GGUF file may have rows in another order


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """A view of a quantized checkpoint as an unquantized one; the checkpoint itself if it is not quantized.

    Raises:
        CheckpointError: it is quantized in a way that vlpack does not read, or its tensors do not fit what it declares.
    """
    declared = detect(checkpoint)
    if declared is None:
        return checkpoint
    weights: dict[str, Packed] = {}
    for find in FINDERS[declared.method]:
        weights |= find(checkpoint, declared)
    if not weights:
        raise refused(checkpoint, declared.where, "but none of its tensors is")
    used = {part for weight in weights.values() for part in weight.parts}
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in used or name.endswith(ACTIVATIONS):
            continue
        for end, what in ENDINGS.items():
            if name.endswith(end):
                raise refused(checkpoint, f"{what}: it has the tensor {quote(name)}", f"which {declared.label} has not")
        tensors[name] = tensor
    for name in weights:
        if name in tensors:
            raise CheckpointError(f"{checkpoint.folder} holds {quote(name)} twice, quantized and not quantized.")
    # in the order of the stored bytes, so that tensors that are read in this order are read sequentially from disk
    places = {weight.parts[0]: name for name, weight in weights.items()}
    ordered = {
        name if name in tensors else places[name]: tensors.get(name) or weights[places[name]].info
        for name in checkpoint.tensors
        if name in tensors or name in places
    }
    return Unpacked(checkpoint, declared, ordered, weights)
