"""Measures every kernel that can multiply by one matrix: speed for many rows and for one row, and the error.

The error is against the fp32 product with fp32 weights, so it includes the rounding of weights and of activations.

Usage: python benchmarks/kernels.py [--rows 512] [--in-features 2048] [--out-features 6144] [--threads 2]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from vlpack.quantize.blocks import quantize_blocks
from vlpack.quantize.channels import quantize_rows, unsigned

MICROSOFT = "com.microsoft"


def session(op_type: str, weights: dict[str, np.ndarray], threads: int, **attributes: object) -> ort.InferenceSession:
    """A session of a graph with one node: ``y = op(x, *weights)``."""
    domain = "" if op_type == "MatMul" else MICROSOFT
    node = helper.make_node(op_type, ["x", *weights], ["y"], domain=domain, **attributes)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "size"]) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "kernel", value[:1], value[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def kernels(weight: np.ndarray, threads: int) -> dict[str, ort.InferenceSession]:
    rows, cols = weight.shape
    codes, scales = quantize_rows(weight.copy())
    signed = np.ascontiguousarray(codes.T)
    seven = np.abs(weight).max(axis=1) / np.float32(63)
    seven_bits = np.ascontiguousarray(np.rint(weight / seven[:, None]).astype(np.int8).T)
    zeros = np.zeros(rows, np.int8)
    dynamic = "DynamicQuantizeMatMul"
    made = {
        "MatMul fp32": session("MatMul", {"w": np.ascontiguousarray(weight.T)}, threads),
        f"{dynamic} int8": session(dynamic, {"w": signed, "s": scales, "z": zeros}, threads),
        f"{dynamic} int8, 7 bits": session(dynamic, {"w": seven_bits, "s": seven, "z": zeros}, threads),
        f"{dynamic} uint8": session(
            dynamic,
            {"w": unsigned(signed), "s": scales, "z": np.full(rows, 128, np.uint8)},
            threads,
        ),
    }
    sizes = [(4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 128)]
    for bits, block_size, symmetric in [*((*size, True) for size in sizes), (4, 64, False), (4, 128, False)]:
        blocks = quantize_blocks(weight, bits, block_size, symmetric)
        weights = {"w": blocks.qweight, "s": blocks.scales}
        if blocks.zero_points is not None:
            weights["z"] = blocks.zero_points
        made[f"MatMulNBits {bits} bits, block {block_size}{'' if symmetric else ', zero points'}"] = session(
            "MatMulNBits",
            weights,
            threads,
            K=cols,
            N=rows,
            bits=bits,
            block_size=block_size,
            accuracy_level=4,
        )
    return made


def best_seconds(run: ort.InferenceSession, x: np.ndarray, repeats: int = 10) -> float:
    run.run(None, {"x": x})
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run.run(None, {"x": x})
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--in-features", type=int, default=2048)
    parser.add_argument("--out-features", type=int, default=6144)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((arguments.out_features, arguments.in_features)) * 0.02).astype(np.float32)
    x = rng.standard_normal((arguments.rows, arguments.in_features)).astype(np.float32)
    x /= np.abs(x).max(axis=1, keepdims=True)  # scaled by row, as in vlpack's graphs
    exact = x @ weight.T
    print(f"| kernel | {arguments.rows} rows, GFLOP/s | 1 row, ms | error |\n| --- | --- | --- | --- |")
    for name, kernel in kernels(weight, arguments.threads).items():
        rate = 2 * x.shape[0] * weight.size / best_seconds(kernel, x) / 1e9
        one = best_seconds(kernel, x[:1], 50) * 1e3
        error = np.linalg.norm(kernel.run(None, {"x": x})[0] - exact) / np.linalg.norm(exact)
        print(f"| {name} | {rate:.0f} | {one:.2f} | {error:.4f} |", flush=True)


if __name__ == "__main__":
    main()
