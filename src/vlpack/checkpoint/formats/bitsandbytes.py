"""The formats of bitsandbytes: 4-bit indices into a codebook (nf4, fp4), and 8-bit integers with a scale per row.

A 4-bit weight ``X.weight`` is stored flat, uint8 [N · K / 2, 1] with the earlier code in the upper half of a byte,
beside ``X.weight.absmax`` (a factor for each block of the flat weight), ``X.weight.quant_map`` (the codebook) and
``X.weight.quant_state.bitsandbytes__nf4``, a JSON object in UTF-8 with shape, block size and dtype. With double
quantization, absmax is itself 8-bit codes of ``nested_quant_map`` with ``nested_absmax``. An 8-bit weight is int8
[N, K] with ``X.SCB`` [N], 127 times the scale. Source: bitsandbytes 0.50, ``functional.py`` and ``backends/``.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.config import Section, is_finite
from vlpack.checkpoint.files import parse_json
from vlpack.checkpoint.formats.detect import MAX_GROUP, Declared
from vlpack.checkpoint.formats.packed import DAMAGED, Grid, Gridded, Packed, check_scales, stored
from vlpack.errors import CheckpointError

Array = npt.NDArray[Any]

STATE = ".quant_state.bitsandbytes__"
"""Part of a tensor's name between the name of a 4-bit weight and the name of its codebook."""
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
"""Types to which the library rounds dequantized values."""
INVERSE_OF_127 = np.float32(7.874015718698502e-3)
"""The constant 1 / 127, in the digits of the library, by which it multiplies products of codes and ``SCB``."""
_OF = "the format bitsandbytes"
"""Name of the format in error messages."""


class CodebookWeight(Packed):
    """A weight of 4-bit indices into a codebook of 16 values, with a factor for each block of the flattened weight.

    Args:
        base: the checkpoint.
        name: name of the weight.
        kind: ``nf4`` or ``fp4``.

    Raises:
        CheckpointError: a tensor or a setting is missing, or does not fit the format.
    """

    obstacle = "the values of its codebook lie on no grid of integers"

    def __init__(self, base: Checkpoint, name: str, kind: str) -> None:
        self.label = f"bitsandbytes {kind}"
        state_name = f"{name}{STATE}{kind}"
        packed = stored(base, name, ["uint8"], of=_OF)
        state = _state(base, state_name)
        shape = state.integers("shape", low=1)
        if len(shape) != 2:
            raise CheckpointError(f"{state.where}: 'shape' must be that of a matrix.", DAMAGED)
        state.choice("quant_type", [kind], kind)
        self.block = state.integer("blocksize", high=MAX_GROUP)
        self.dtype = np.dtype(DTYPES[state.choice("dtype", list(DTYPES))])
        values = math.prod(shape)
        if math.prod(packed.shape) != -(-values // 2):
            raise CheckpointError(
                f"{packed.file}: the tensor {name} has {math.prod(packed.shape)} bytes; its shape {shape} needs "
                f"{-(-values // 2)}.",
                DAMAGED,
            )
        self.absmax, self.map = f"{name}.absmax", f"{name}.quant_map"
        blocks = -(-values // self.block)
        nested = f"{name}.nested_absmax" in base.tensors
        stored(base, self.absmax, ["uint8"] if nested else ["float32"], (blocks,), of=_OF)
        stored(base, self.map, ["float32"], (16,), of=_OF)
        parts = [name, self.absmax, self.map, state_name]
        self.nested = 0
        if nested:
            self.nested = state.integer("nested_blocksize", high=MAX_GROUP)
            offset = state.values.get("nested_offset")
            if not is_finite(offset):
                raise CheckpointError(f"{state.where}: 'nested_offset' must be a number.", DAMAGED)
            self.offset = np.float32(offset)
            stored(base, f"{name}.nested_absmax", ["float32"], (-(-blocks // self.nested),), of=_OF)
            stored(base, f"{name}.nested_quant_map", ["float32"], (256,), of=_OF)
            parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
        super().__init__(base, name, shape, parts)

    def rows(self, start: int, stop: int) -> Array:
        first, last = start * self.cols, stop * self.cols
        octets = self.base.rows(self.name, first // 2, -(-last // 2), width=1).reshape(-1)
        codes = np.stack([octets >> 4, octets & 15], axis=-1).reshape(-1)[first % 2 :][: last - first]
        values = self.base.read(self.map)[codes]
        low = first // self.block
        sizes = np.repeat(self._absmax(low, -(-last // self.block)), self.block)[first - low * self.block :]
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for infinite values
            values *= sizes[: len(values)]
            rounded: Array = values.astype(self.dtype).astype(np.float32)
        return rounded.reshape(stop - start, self.cols)

    def check(self) -> None:
        for name in self.parts:
            if name.endswith("quant_map"):
                check_scales(self, self.base.read(name)[None], 1.0)
        check_scales(self, self._absmax(0, self.base.tensors[self.absmax].shape[0])[None], 1.0)

    def _absmax(self, start: int, stop: int) -> Array:
        """The factors of blocks ``[start, stop)`` of the flat weight, float32 ``[stop - start]``."""
        stored_factors = self.base.rows(self.absmax, start, stop, width=1).reshape(-1)
        if not self.nested:
            return stored_factors
        low = start // self.nested
        outer = self.base.rows(f"{self.name}.nested_absmax", low, -(-stop // self.nested), width=1).reshape(-1)
        factors: Array = self.base.read(f"{self.name}.nested_quant_map")[stored_factors]
        with np.errstate(over="ignore", invalid="ignore"):
            factors *= np.repeat(outer, self.nested)[start - low * self.nested :][: len(factors)]
            factors += self.offset
        return factors


class Int8Weight(Gridded):
    """A weight of 8-bit integers with a scale per row (LLM.int8).

    Args:
        base: the checkpoint.
        module: name of the module.

    Raises:
        CheckpointError: a tensor is missing, or does not fit the format.
    """

    label, bits, groups = "bitsandbytes int8", 8, 1

    def __init__(self, base: Checkpoint, module: str) -> None:
        self.code, self.scb = f"{module}.weight", f"{module}.SCB"
        packed = stored(base, self.code, ["int8"], of=_OF)
        if len(packed.shape) != 2 or 0 in packed.shape:
            raise CheckpointError(f"{packed.file}: the tensor {self.code} has the shape {list(packed.shape)}; only "
                                  "matrices are read.", DAMAGED)  # fmt: skip
        stored(base, self.scb, ["float32", "float16"], (packed.shape[0],), of=_OF)
        super().__init__(base, self.code, packed.shape, [self.code, self.scb])

    @property
    def grid(self) -> Grid:
        return Grid(8, self.cols, True, False)

    def rows(self, start: int, stop: int) -> Array:
        values: Array = self.base.rows(self.code, start, stop).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            values *= self.base.rows(self.scb, start, stop, width=1).astype(np.float32)
            values *= INVERSE_OF_127
        return values

    def codes(self, start: int, stop: int) -> Array:
        codes: Array = self.base.rows(self.code, start, stop).view(np.uint8) ^ np.uint8(128)
        return codes

    def scales(self, start: int, stop: int) -> Array:
        scales: Array = self.base.rows(self.scb, start, stop, width=1).astype(np.float32) * INVERSE_OF_127
        return scales

    def zeros(self, start: int, stop: int) -> Array:
        return np.full((stop - start, 1), 128, np.uint8)


def _state(base: Checkpoint, name: str) -> Section:
    """The settings of a 4-bit weight, from the tensor that holds them as JSON text."""
    tensor = stored(base, name, ["uint8"], of=_OF)
    if len(tensor.shape) != 1 or tensor.nbytes > 10_000:
        raise CheckpointError(f"{tensor.file}: the tensor {name} is not a short text.", DAMAGED)
    where = f"{tensor.file}: {name}"
    return Section(parse_json(base.read(name).tobytes(), where), where)


def find(base: Checkpoint, declared: Declared) -> dict[str, Packed]:
    """The weights of a checkpoint that bitsandbytes quantized, by name.

    Raises:
        CheckpointError: a weight uses a codebook that is not read, or its tensors do not fit the format.
    """
    weights: dict[str, Packed] = {}
    for name in base.tensors:
        weight, state, kind = name.rpartition(STATE)
        if state:
            if kind not in ("nf4", "fp4"):
                raise CheckpointError(f"{base.folder}: the tensor {name} is of a kind that vlpack does not read.")
            weights[weight] = CodebookWeight(base, weight, kind)
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            weights[f"{module}.weight"] = Int8Weight(base, module)
    return weights
