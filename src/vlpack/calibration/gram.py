"""Gram matrices ``Σ xᵀx`` of a layer's inputs, computed with 8-bit integers on processors that multiply these exactly.

Gram matrices are most of a calibration's arithmetic, and integer products are four times as fast as float32. Rows are
rounded to 8 bits, with a scale for each channel in each batch of rows. The result is the Gram matrix of the rounded
rows, and so positive semidefinite. A channel's sum of squares is off by less than 1 %, which is small against the 20 %
of the mean that GPTQ adds for damping (`vlpack.quantize.gptq.DAMPING`). If a channel has an outlier, its other values
are rounded coarsely; this changes its products with other channels by a few percent of the geometric mean of both sums
of squares.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlpack.ort.saturation import saturates
from vlpack.ort.session import ort, session_options
from vlpack.quantize.channels import ZERO_POINT
from vlpack.quantize.storage import transposed
from vlpack.system import available_cores

Array = npt.NDArray[Any]

ROWS = 4096
"""Number of rows that are multiplied at once; adding the product to the sum takes the same time for any number."""
STRIP = 1024
"""Number of columns that are multiplied at once with themselves and all columns before them. Products with later
columns are not computed, because the matrix is symmetric."""
SMALL = 512
"""Number of rows or columns below which float32 is as fast as 8-bit integers."""


class Gram:
    """A Gram matrix ``Σ xᵀx``, computed from rows that are added little by little.

    Attributes:
        rows: number of rows added so far; a row that is multiplied by a factor f counts f².
    """

    def __init__(self, cols: int) -> None:
        self.rows = 0.0
        self._cols = cols
        self._waiting: list[Array] = []
        self._total: Array | None = None  # only the lower triangle is filled where it was computed in strips

    def add(self, rows: Array, factors: Array | None = None) -> None:
        """Adds rows, float32 ``[tokens, cols]``, each multiplied by its factor in ``factors [tokens]``, if given."""
        if not len(rows):
            return
        self.rows += len(rows) if factors is None else float(np.square(factors).sum(dtype=np.float64))
        self._waiting.append(rows if factors is None else rows * factors[:, None])
        if sum(map(len, self._waiting)) >= ROWS:
            self._take()

    def total(self) -> Array:
        """The Gram matrix of all rows added so far, float32 ``[cols, cols]``; zeros if there were none."""
        self._take()
        if self._total is None:
            return np.zeros((self._cols, self._cols), np.float32)
        for start in range(0, self._cols, STRIP):
            strip = self._total[start : start + STRIP]
            corner = strip[:, start : start + STRIP]
            corner[...] = np.tril(corner) + np.tril(corner, -1).T
            self._total[:start, start : start + STRIP] = strip[:, :start].T
        return self._total

    def _take(self) -> None:
        if not self._waiting:
            return
        rows = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        self._waiting = []
        if min(rows.shape) < SMALL or saturates():
            product = rows.T @ rows
            self._total = product if self._total is None else np.add(self._total, product, out=self._total)
            return
        if self._total is None:
            self._total = np.zeros((self._cols, self._cols), np.float32)
        add_products(rows, self._total)


def add_products(rows: Array, total: Array) -> None:
    """Adds ``rowsᵀ rows``, computed with 8-bit integers, to ``total [cols, cols]`` on and below the diagonal."""
    steps = np.maximum(rows.max(axis=0), -rows.min(axis=0)) / np.float32(127)
    steps[steps == 0] = 1
    codes = np.empty(rows.shape, np.int8)
    if not np.isfinite(steps).all():  # 8-bit codes would hide these values; the caller reports them
        total += np.float32(np.nan)
        return
    for start in range(0, len(rows), 256):
        tile = rows[start : start + 256] / steps
        codes[start : start + 256] = np.rint(tile, out=tile)
    left = transposed(codes).view(np.uint8) ^ np.uint8(ZERO_POINT)
    session = _session()
    for start in range(0, len(left), STRIP):
        stop = min(start + STRIP, len(left))
        (product,) = session.run(
            None, {"left": left[start:stop], "right": np.ascontiguousarray(codes[:, :stop]), "steps": steps[:stop]}
        )
        product *= steps[start:stop, None]
        total[start:stop, :stop] += product


@cache
def _session() -> Any:
    """An onnxruntime session that computes ``(left - 128) · right · steps``.

    The inputs are uint8 ``left [m, k]``, int8 ``right [k, n]`` and float32 ``steps [n]``; the output is float32
    ``[m, n]``.
    """
    kinds = {"left": ir.DataType.UINT8, "right": ir.DataType.INT8, "steps": ir.DataType.FLOAT}
    shapes = {"left": ["m", "k"], "right": ["k", "n"], "steps": ["n"]}
    inputs = [ir.Value(name=name, shape=ir.Shape(shapes[name]), type=ir.TensorType(kinds[name])) for name in kinds]
    one = ir.Value(name="one", const_value=ir.tensor(np.float32(1), name="one"))
    zero = ir.Value(name="zero", const_value=ir.tensor(np.uint8(ZERO_POINT), name="zero"))
    node = ir.node("MatMulIntegerToFloat", [*inputs[:2], one, inputs[2], zero], domain="com.microsoft")
    product = node.outputs[0]
    product.name, product.shape, product.type = "product", ir.Shape(["m", "n"]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        inputs,
        [product],
        nodes=[node],
        initializers=[one, zero],
        opset_imports={"": 21, "com.microsoft": 1},
        name="gram",
    )
    text = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(text, session_options(available_cores()), providers=["CPUExecutionProvider"])
