"""Linear and embedding layers whose weight is stored, and multiplied, as the precision policy decides."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.checkpoint.rows import Rows, Source, stacked
from vlpack.layers import ops
from vlpack.layers.rotation import rotate
from vlpack.quantize.storage import Blocks, ChannelInt8, Float, Storage, Transposed


class Stored(nn.Module):
    """A module with one weight ``[rows, cols]`` whose storage is chosen after the module tree is complete.

    Args:
        rows: number of output features, or of a table's entries.
        cols: number of input features, or a table's width.
        stacked: names of the checkpoint's modules whose weights (and biases) are stacked to make this one, with their
            numbers of rows; empty if the checkpoint has the module itself.
        source_shape: shape of the checkpoint's weight if it is not ``[rows, cols]`` (a convolution's kernel).
        name: module name; a name with dots is the path in the checkpoint.
        tied_to: name of the checkpoint's tensor, if this weight is the same tensor as another module's.
        role: purpose of the weight, by which the policy chooses its storage (`vlpack.quantize.policy`).

    Attributes:
        rotation: size of the blocks of columns that are rotated in the stored weight, so that the graph rotates the
            layer's input (or rotates a table's output back); 1 for no rotation.
    """

    experts = 1
    """Number of experts whose matrices are stacked in the weight; 1 for a single matrix."""
    can_rotate = True
    """Whether the graph can rotate the input that the weight multiplies."""

    def __init__(
        self,
        rows: int,
        cols: int,
        stacked: Sequence[tuple[str, int]] = (),
        source_shape: Sequence[int] = (),
        name: str | None = None,
        tied_to: str | None = None,
        role: str = "linear",
    ) -> None:
        super().__init__(name)
        self.rows, self.cols, self.role = rows, cols, role
        self.stacked = tuple(stacked)
        self.tied_to = tied_to
        self.source_shape = tuple(source_shape) or (rows, cols)
        self.storage: Storage | None = None
        self.rotation = 1
        self.arrays: dict[str, nn.Parameter] = {}

    def source(self, path: str) -> Rows:
        """The checkpoint's rows that make the weight of the module at ``path``."""
        if self.tied_to:
            return Source(self.tied_to, (self.rows, self.cols))
        if self.stacked:
            parent = path.rpartition(".")[0]
            return stacked(Source(f"{parent}.{name}.weight", (rows, self.cols)) for name, rows in self.stacked)
        return Source(f"{path}.weight", self.source_shape)

    def store(self, storage: Storage) -> dict[str, nn.Parameter]:
        """Declare the graph initializers in which ``storage`` keeps the weight, and return them by array name."""
        self.storage = storage
        self.arrays = {}
        for name, (dtype, shape) in storage.arrays(self.rows, self.cols).items():
            self.arrays[name] = nn.Parameter(self.declared_shape(name, shape), ir.DataType.from_numpy(dtype), name=name)
            setattr(self, name, self.arrays[name])
        return self.arrays

    def declared_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the graph declares for an array of the storage; the bytes are the same."""
        return shape

    def operands(self, op: OpBuilder) -> list[ir.Value]:
        """The arrays in the form that kernels take. onnxruntime widens narrow scales once, when it loads the graph."""
        values: dict[str, ir.Value] = dict(self.arrays)
        if isinstance(self.storage, Blocks) and self.storage.narrow:
            values["scales"] = op.Mul(op.Cast(values["scales"], to=ops.FLOAT), values.pop("steps"))
        return list(values.values())


class Linear(Stored):
    """A linear layer ``y = x Wᵀ + b``, ``x [.., in_features] → y [.., out_features]``, in the weight's compute dtype.

    With ``fp16_safe``, input and output may exceed fp16's range even if the weight is multiplied in fp16: every row is
    divided by its largest magnitude before the product and multiplied back in fp32, and y is fp32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        stacked: Sequence[tuple[str, int]] = (),
        source_shape: Sequence[int] = (),
        tied_to: str | None = None,
        role: str = "linear",
        fp16_safe: bool = False,
    ) -> None:
        super().__init__(out_features, in_features, stacked, source_shape, tied_to=tied_to, role=role)
        self.bias = nn.Parameter([out_features], name="bias") if bias else None
        self.fp16_safe = fp16_safe

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        if self.fp16_safe and self._dtype == ir.DataType.FLOAT16:
            x, peak = ops.divide_by_peak(op, ops.cast(op, x, ops.FLOAT))
            y = op.Mul(ops.cast(op, self._product(op, x), ops.FLOAT), peak)
        else:
            y = self._product(op, x)
        return y if self.bias is None else op.Add(y, ops.cast(op, self.bias, ops.dtype_of(y)))

    @property
    def _dtype(self) -> ir.DataType:
        """The dtype in which the weight is multiplied."""
        match self.storage:
            case ChannelInt8():
                return ops.FLOAT
            case Blocks():
                return ops.FLOAT if self.storage.dtype == "float32" else ir.DataType.FLOAT16
            case _:
                return ops.dtype_of(self.arrays["weight"])

    def _product(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        weight = self.operands(op)
        x = rotate(op, ops.cast(op, x, self._dtype), self.rotation)
        match self.storage:
            case Transposed():
                return op.MatMul(x, weight[0])
            case Float():
                return self._tied_head(op, x, weight[0])
            case ChannelInt8():
                return ops.integer_mat_mul(op, x, weight, self.rows, self.storage)
            case Blocks():
                return ops.mat_mul_n_bits(op, x, weight, self.rows, self.cols, self.storage)
            case _:
                raise AssertionError(f"{self.name}: no way to multiply by {self.storage}")

    def _tied_head(self, op: OpBuilder, x: ir.Value, weight: ir.Value) -> ir.Value:
        """The product with a weight that is stored row by row, as the embedding of a tied head is.

        Gemm reads the weight transposed, so a tied head needs no transposed copy.
        """
        y = op.Gemm(op.Reshape(x, [-1, self.cols]), weight, transB=1)
        batch_and_sequence = op.Shape(x, start=0, end=-1)
        y = op.Reshape(y, op.Concat(batch_and_sequence, [self.rows], axis=0))
        return ops.typed(y, ops.dtype_of(x), ops.last_dim(x, self.rows))


class Table(Stored):
    """A weight whose rows are looked up."""

    def declared_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        # GatherBlockQuantized takes a row's blocks in one dimension, MatMulNBits in two
        return (shape[0], shape[1] * shape[2]) if name == "qweight" and len(shape) == 3 else shape

    def stored_rows(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        """The rows ``ids [..]`` as they are stored, perhaps rotated: ``[.., cols]``."""
        weight = self.operands(op)
        match self.storage:
            case Float():
                shape = [*ops.shape_of(ids), self.cols]
                return ops.typed(op.Gather(weight[0], ids, axis=0), ops.dtype_of(weight[0]), shape)
            case Blocks():
                return ops.gather_block_quantized(op, ids, weight, self.cols, self.storage)
            case _:
                raise AssertionError(f"{self.name}: no way to look up in {self.storage}")


class Embedding(Table):
    """An embedding: looks up rows of a table, ``ids [..] → [.., embedding_dim]``."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, name: str | None = None, role: str = "embedding"
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, name=name, role=role)

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        return rotate(op, self.stored_rows(op, ids), self.rotation, back=True)
