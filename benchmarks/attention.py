"""Measures several forms of the vision encoder's attention on the CPU: speed, and the error against the fused form.

- fused: MultiHeadAttention in fp32, which packages have. Without a mask it keeps a tile of scores in the cache (flash).
- plain: MatMul, Softmax, MatMul; all scores are in memory.
- sliced: like plain, but for slices of the queries of one head at a time.
- int8: like sliced, with a scale for the queries of a slice, one per key and one per channel of the values;
  exp(score - largest) is rounded to 255 steps, and the sum is computed before rounding.

q, k and v are Gaussian, so that attention is spread over many keys, which is the worst case for rounding.

Usage: python benchmarks/attention.py [--patches 3072] [--heads 16] [--head-size 64] [--threads 2] [--rounds 10]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import onnxruntime as ort
from onnx import helper, parser

PLAIN = "p = Softmax<axis = -1>(s)\n o = MatMul(p, v0)"

SLICES = """
  s1 = Scan<num_scan_inputs = 3,
      body = heads (float[N, B, D] q1, float[D, S] k1, float[S, D] v1) => (float[N, B, D] o1) {
    o1 = Scan<num_scan_inputs = 1, body = slices (float[B, D] q2) => (float[B, D] o2) {
      s = MatMul(q2, k1)
      p = Softmax<axis = -1>(s)
      o2 = MatMul(p, v1)
    }>(q1)
  }>(q0, k0, v0)
"""

INT8 = """
  # onnxruntime multiplies uint8 by int8: queries are around 128, exp's codes have no sign
  step = Constant<value = float {0.007874016}>()
  byte = Constant<value = float {0.003921569}>()
  around = Constant<value = uint8 {128}>()
  zero = Constant<value = uint8 {0}>()
  signed = Constant<value = int8 {0}>()
  last = Constant<value_ints = [-1]>()
  rows = Constant<value_ints = [-2]>()
  q_abs = Abs(q0)
  q_row = ReduceMax(q_abs, last)
  q_peak = ReduceMax(q_row, rows)
  q_divided = Div(q0, q_peak)
  q8 = QuantizeLinear(q_divided, step, around)
  q_scale = Mul(q_peak, step)
  k_abs = Abs(k0)
  k_peak = ReduceMax(k_abs, rows)
  k_divided = Div(k0, k_peak)
  k8 = QuantizeLinear(k_divided, step, signed)
  k_step = Mul(k_peak, step)
  k_scale = Squeeze(k_step, rows)
  v_abs = Abs(v0)
  v_peak = ReduceMax(v_abs, rows)
  v_divided = Div(v0, v_peak)
  v8 = QuantizeLinear(v_divided, step, signed)
  v_step = Mul(v_peak, step)
  v_scale = Squeeze(v_step, rows)
  s1 = Scan<num_scan_inputs = 6, body = heads (uint8[N, B, D] q1, float[N, 1, 1] qs1, int8[D, S] k1, float[S] ks1,
      int8[S, D] v1, float[D] vs1) => (float[N, B, D] o1) {
    o1 = Scan<num_scan_inputs = 2, body = slices (uint8[B, D] q2, float[1, 1] qs2) => (float[B, D] o2) {
      qs3 = Squeeze(qs2)
      s = com.microsoft.MatMulIntegerToFloat(q2, k1, qs3, ks1, around, signed)
      largest = ReduceMax(s, last)
      below = Sub(s, largest)
      e = Exp(below)
      sum = ReduceSum(e, last)
      e8 = QuantizeLinear(e, byte, zero)
      o = com.microsoft.MatMulIntegerToFloat(e8, v1, byte, vs1, zero, signed)
      o2 = Div(o, sum)
    }>(q1, qs1)
  }>(q8, q_scale, k8, k_scale, v8, v_scale)
"""

FUSED = "y = com.microsoft.MultiHeadAttention<num_heads = HEADS>(q, k, v)"

SPLIT = """
  scale = Constant<value = float {SCALE}>()
  shape = Constant<value_ints = [0, HEADS, SIZE]>()
  joined = Constant<value_ints = [-1, WIDTH]>()
  first = Constant<value_ints = [0]>()
  sliced = Constant<value_ints = [HEADS, -1, SLICE, SIZE]>()
  q_row0 = Squeeze(q, first)
  k_row0 = Squeeze(k, first)
  v_row0 = Squeeze(v, first)
  q_scaled = Mul(q_row0, scale)
  q_heads = Reshape(q_scaled, shape)
  k_heads = Reshape(k_row0, shape)
  v_heads = Reshape(v_row0, shape)
  q_first = Transpose<perm = [1, 0, 2]>(q_heads)
  k0 = Transpose<perm = [1, 2, 0]>(k_heads)
  v0 = Transpose<perm = [1, 0, 2]>(v_heads)
"""

JOIN_SLICES = """
  o_first = Transpose<perm = [1, 2, 0, 3]>(s1)
  o_row = Reshape(o_first, joined)
  y = Unsqueeze(o_row, first)
"""

FORMS = {
    "fused": FUSED,
    "plain": f"""{SPLIT}
  s = MatMul(q_first, k0)
  {PLAIN}
  o_first = Transpose<perm = [1, 0, 2]>(o)
  o_row = Reshape(o_first, joined)
  y = Unsqueeze(o_row, first)""",
    "sliced": f"{SPLIT}\n q0 = Reshape(q_first, sliced)\n {SLICES} {JOIN_SLICES}",
    "int8": f"{SPLIT}\n q0 = Reshape(q_first, sliced)\n {INT8} {JOIN_SLICES}",
}


def session(form: str, heads: int, size: int, slice_rows: int, threads: int) -> ort.InferenceSession:
    """A session that computes attention ``y`` from ``q``, ``k`` and ``v``, all ``[1, S, heads · size]``."""
    body = FORMS[form]
    sizes = {"HEADS": heads, "SIZE": size, "WIDTH": heads * size, "SLICE": slice_rows, "SCALE": size**-0.5}
    for name, value in sizes.items():
        body = body.replace(name, str(value))
    lines = "\n".join(line for line in body.splitlines() if not line.strip().startswith("#"))
    kind = f"float[1, S, {heads * size}]"
    graph = parser.parse_graph(f"attention ({kind} q, {kind} k, {kind} v) => ({kind} y) {{ {lines} }}")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # each initializer that is moved out of a subgraph would give a warning
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"patches": 3072, "heads": 16, "head-size": 64, "threads": 2, "rounds": 10}.items():
        arguments.add_argument(f"--{name}", type=int, default=value)
    given = arguments.parse_args()
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, given.patches, given.heads * given.head_size)).astype(np.float32)
    inputs = {"q": 2 * q, "k": k, "v": v}
    slices = [rows for rows in (128, 384) if given.patches % rows == 0]
    forms = [("fused", 0), ("plain", 0), *((form, rows) for form in ("sliced", "int8") for rows in slices)]
    made = {key: session(key[0], given.heads, given.head_size, key[1], given.threads) for key in forms}
    (expected,) = made["fused", 0].run(None, inputs)
    wall = dict.fromkeys(forms, np.inf)
    cpu, error = dict(wall), dict(wall)
    for _ in range(given.rounds):  # the forms take turns, so that other load affects all of them
        for key, run in made.items():
            started, worked = time.perf_counter(), time.process_time()
            (found,) = run.run(None, inputs)
            wall[key] = min(wall[key], time.perf_counter() - started)
            cpu[key] = min(cpu[key], time.process_time() - worked)
            error[key] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    for form, rows in forms:
        of = wall[form, rows] / wall["fused", 0]
        print(
            f"{form:7} {rows or '':4} {1e3 * wall[form, rows]:7.1f} ms, {of:.2f} of fused, processor "
            f"{1e3 * cpu[form, rows]:7.1f} ms, error {error[form, rows]:.1e}"
        )


if __name__ == "__main__":
    main()
