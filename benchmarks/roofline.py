"""Measures each operator of vlpack-kernels alone, and what share it reaches of what the processor can do at most.

Operators have the sizes of a 2B model. The nodes of onnxruntime that an operator replaces are measured in turns with
it, in sessions of one node. For a few rows, a session has so many copies of the node, with weights or cached keys and
values of their own, that these come from memory as in a model, and the time of one copy counts.

The peaks are measured by ``peak.c``: multiplications of each kind, and reading from memory. A call's limit is the one
of the two that takes longer, for its products or for its weights or cache. Its peak is measured again in turns with the
call, because it changes with time on a virtual machine. Only products of matrices count, in causal attention only those
that a token attends to; rotating and rounding do not count.

Usage: python benchmarks/roofline.py [--threads 1 2] [--seconds 0.25] [--only Linear8 ...] [--output result.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser
from peak import KINDS, Peaks
from quiet import Others

from vlpack.ort.causal_attention import narrowed_attention, replaced_attention
from vlpack.ort.kernels import DOMAIN, Library, library, use_kernels
from vlpack.ort.session import ort, session_options
from vlpack.quantize.rotate import rotation_matrix

Arrays = dict[str, Any]

COLD = 3 << 26
"""Bytes of the weights or caches of all copies of a node, more than the processor's caches hold."""

NUMBERS = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) / 2
BYTES = np.random.default_rng(1).integers(0, 256, 1 << 20).astype(np.uint8)

TEXT, VISION = [(2048, 2048), (2048, 6144), (6144, 2048)], [(1024, 3072), (1024, 4096), (4096, 1024)]
HEADS, KEY_HEADS, SIZE = 16, 8, 128

# The nodes that operators replace; # stands for the number of a copy.
TURN = "groups# = Reshape(x#, parts) turned# = MatMul(groups#, rotation) start# = Reshape(turned#, whole)"
CHANNELS = (
    " magnitude# = Abs(start#) largest# = ReduceMax<keepdims = 1>(magnitude#, axes) peak# = Add(largest#, least)"
    " divided# = Div(start#, peak#) rounded# = QuantizeLinear(divided#, step, zero)"
    " product# = com.microsoft.MatMulIntegerToFloat(rounded#, codes#, step, scales#, zero) "
)
BACK = ("y# = Mul(product#, peak#)", "back# = Mul(product#, peak#) y# = Add(back#, bias#)")
BLOCKS = "y# = com.microsoft.MatMulNBits<K = {}, N = {}, bits = {}, block_size = {}, accuracy_level = 4>"
CAUSAL = (
    f"y#, present_key#, present_value# = com.microsoft.GroupQueryAttention<num_heads = {HEADS}, "
    f"kv_num_heads = {KEY_HEADS}>(q#, k#, v#, past_key#, past_value#, last, total)"
)


class Case(NamedTuple):
    """An operator: its name and sizes, the kind of its products, a function that makes a graph of copies of the nodes
    that it replaces, and calls: name, rows of the input, and multiplications and bytes that are read of one copy.
    """

    operator: str
    sizes: str
    kind: str
    model: Callable[[], onnx.ModelProto]
    copies: int
    calls: list[tuple[str, int, float, float]]


def graph(body: str, ins: str, outs: str, copies: int, shared: Arrays, own: Arrays) -> onnx.ModelProto:
    """A graph of copies of nodes, with ``shared`` initializers, and ``own`` ones for each copy."""
    bodies, given, made = ([text.replace("#", str(copy)) for copy in range(copies)] for text in (body, ins, outs))
    found = parser.parse_graph(f"g ({', '.join(given)}) => ({', '.join(made)}) {{ {' '.join(bodies)} }}")
    found.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in shared.items())
    for copy in range(copies):
        for name, array in own.items():
            array.flat[0] = copy / (1e4 if array.dtype == np.float32 else 1)  # onnxruntime keeps equal weights once
            found.initializer.append(numpy_helper.from_array(array, f"{name}{copy}"))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(found, opset_imports=opsets, ir_version=10)


def product(operator: str, cols: int, rows: int, block: int = 0) -> Iterator[Case]:
    """Yields a product by a matrix, for few and for many rows of the input."""
    shared: Arrays = {"rotation": rotation_matrix(64), "parts": [0, cols // 64, 64], "whole": [0, cols]}
    own: Arrays = {"scales": np.resize(np.abs(NUMBERS) / 100, (rows, cols // block) if block else rows)}
    sizes = f"{cols} → {rows}"
    if block:
        bits = 4 if operator == "Linear4" else 8
        own["codes"] = np.resize(BYTES, (rows, cols // block, block * bits // 8))
        body = f"{TURN} {BLOCKS.format(cols, rows, bits, block)}(start#, codes#, scales#)"
        sizes += f", blocks of {block}"
    else:
        shared |= {"axes": [-1], "least": np.float32(1e-20), "step": np.float32(1 / 127), "zero": np.uint8(128)}
        own["codes"] = np.resize(BYTES.view(np.int8), (cols, rows))
        biased = (cols, rows) in VISION
        own |= {"bias": np.resize(NUMBERS, rows)} if biased else {}
        body = TURN + CHANNELS + BACK[biased]
    read = sum(array.nbytes for array in own.values())
    # the head is only computed for tokens that are sampled
    for counts in [(1, 8)] if operator == "Linear8Blocks" else [(1, 8), (512, 2048)]:
        copies = max(1, COLD // read) if counts[0] == 1 else 1
        model = partial(graph, body, f"float[rows, {cols}] x#", f"float[rows, {rows}] y#", copies, shared, own)
        calls = [(f"{n} row{'s'[: n > 1]}", n, float(n * cols * rows), read) for n in counts]
        yield Case(operator, sizes, "int8", model, copies, calls)


def causal(operator: str) -> Iterator[Case]:
    """Yields the decoder's attention for prompts, and for a token after others."""
    narrow, sizes = operator.startswith("Narrow"), f"{HEADS} and {KEY_HEADS} heads of {SIZE}"
    for new, past in [(512, 0), (2048, 0), (4096, 0), (1, 512), (1, 4096)]:
        keys = past + new
        read = 2 * KEY_HEADS * keys * SIZE * (2 if narrow else 4)
        copies = max(1, COLD // read) if past else 1
        cache = f"float[1, {KEY_HEADS}, {keys}, {SIZE}]"
        q, k, v, y = (f"float[1, rows, {SIZE * (HEADS if name in 'qy' else KEY_HEADS)}] {name}#" for name in "qkvy")
        ins, outs = (f"{cache} {time}_key#, {cache} {time}_value#" for time in ("past", "present"))
        lengths = {"last": np.array([keys - 1], np.int32), "total": np.int32(keys)}
        model = partial(graph, CAUSAL, f"{q}, {k}, {v}, {ins}", f"{y}, {outs}", copies, lengths, {})
        name = f"a token after {past}" if past else f"{new} tokens"
        products = 2 * HEADS * SIZE * (new * past + new * (new + 1) / 2)
        kind = "bfloat16" if narrow and new > 1 else "fp32"
        yield Case(operator, sizes, kind, model, copies, [(name, new, products, read)])


def cases(instruction_set: str) -> Iterator[Case]:
    """Yields all operators that are used with an instruction set."""
    for operator, block in (("Linear8", 0), ("Linear4", 32), ("Linear4", 128)):
        for cols, rows in (*TEXT, *VISION):
            yield from product(operator, cols, rows, block)
    yield from product("Linear8Blocks", 2048, 151936, 64)
    yield from causal("GroupQueryAttention")
    if instruction_set == "avx512_bf16":
        yield from causal("NarrowGroupQueryAttention")
        q, k, v, y = (f"float[1, rows, 1024] {name}#" for name in "qkvy")
        calls = [(f"{n} patches", n, 2.0 * n * n * 1024, 0.0) for n in (1200, 3072)]
        body = "y# = com.microsoft.MultiHeadAttention<num_heads = 16>(q#, k#, v#)"
        model = partial(graph, body, f"{q}, {k}, {v}", y, 1, {}, {})
        yield Case("Attention", "16 heads of 64", "bfloat16", model, 1, calls)


def replaced(case: Case, available: Library) -> onnx.ModelProto:
    """The graph of a case with the operators of the library."""
    model = case.model()
    model.graph.value_info.extend(model.graph.output)  # where types are looked for
    if case.operator.startswith("Narrow"):  # which is chosen only beside products that round activations to 8 bits
        nodes = replaced_attention(model.graph, available.instruction_set)
        for node in nodes:
            next(attribute for attribute in node.attribute if attribute.name == "exact").i = 0
        for node in narrowed_attention(model.graph, nodes):
            node.op_type, node.domain = case.operator, DOMAIN
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    else:
        assert use_kernels(model, available) == {case.operator: case.copies}
    del model.graph.value_info[:]
    return model


def bound(session: Any, rows: int) -> tuple[Any, Any, list[np.ndarray]]:
    """An I/O binding with random inputs and fixed outputs, the first output, and the arrays that hold them."""
    binding, values, arrays = session.io_binding(), dict[str, Any](), []
    for port in (*session.get_inputs(), *session.get_outputs()):
        shape = [rows if isinstance(size, str) else size for size in port.shape]
        if port.name.startswith("present"):  # in the place of past keys and values
            binding.bind_ortvalue_output(port.name, values[port.name.replace("present", "past")])
            continue
        array = np.resize(NUMBERS, shape)
        if port.type == "tensor(bfloat16)":
            array = array.astype(ml_dtypes.bfloat16).view(np.uint16)
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, TensorProto.BFLOAT16)
        else:
            value = ort.OrtValue.ortvalue_from_numpy(array)
        (binding.bind_ortvalue_output if port.name[0] == "y" else binding.bind_ortvalue_input)(port.name, value)
        values[port.name] = value
        arrays.append(array)
    return binding, values["y0"], arrays


def measure(sessions: list[Any], rows: int, peak: Callable[[], float], at_least: float) -> tuple[float, float, float]:
    """The shortest times of a call of the stock and of the native session, in seconds, and a peak, in turns."""
    bindings = [bound(session, rows) for session in sessions]
    best, most, end, rounds = [np.inf, np.inf], 0.0, time.perf_counter() + at_least, 0
    while rounds < 3 or time.perf_counter() < end:
        most = max(most, peak())
        for place, session in enumerate(sessions):
            start = time.perf_counter()
            session.run_with_iobinding(bindings[place][0])
            best[place] = min(best[place], time.perf_counter() - start)
        rounds += 1
    stock, native = (value.numpy() for _, value, _ in bindings)
    assert np.linalg.norm(native - stock) < 0.05 * np.linalg.norm(stock), "the results differ"
    return *best, most


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: milliseconds, in brackets those of onnxruntime, and the share of the limit."""
    columns, lines = list(dict.fromkeys(one["call"] for one in results)), dict[str, dict[str, str]]()
    for one in results:
        name = f"{one['operator']}, {one['sizes']}, {one['threads']} thread{'s'[: one['threads'] > 1]}"
        rate = f"{one['share'] * one['peak']:.0f} GB/s" if one["limit"] == "reading" else one["limit"]
        cell = f"{1e3 * one['native']:.3g} ({1e3 * one['stock']:.3g}), {rate} {one['share']:.0%}"
        lines.setdefault(name, {})[one["call"]] = cell
    rows = [[name, *(cells.get(column, "") for column in columns)] for name, cells in lines.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [["", *columns], ["---"] * (len(columns) + 1), *rows])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--seconds", type=float, default=0.25, help="least time for a call in both sessions")
    arguments.add_argument("--only", nargs="+", default=[], help="names of operators")
    arguments.add_argument("--output", type=Path)
    given, available = arguments.parse_args(), library()
    if available is None or available.instruction_set == "avx2":
        sys.exit("No operator is used: vlpack-kernels is not installed, or this processor lacks AVX-512 with VNNI.")
    found, peaks = list[dict[str, Any]](), Peaks()
    with Others() as others:
        limits = {threads: {kind: peaks.rate(kind, threads, 10) for kind in KINDS} for threads in given.threads}
        for case in cases(available.instruction_set):
            if given.only and case.operator not in given.only:
                continue
            texts = [model.SerializeToString() for model in (case.model(), replaced(case, available))]
            for threads, peak in limits.items():
                options = session_options(threads)
                options.register_custom_ops_library(available.path)
                sessions = [ort.InferenceSession(text, options, ["CPUExecutionProvider"]) for text in texts]
                for name, rows, products, read in case.calls:
                    work = {case.kind: products / 1e9, "reading": read / 1e9}
                    limit = max(work, key=lambda kind, work=work, peak=peak: work[kind] / peak[kind])
                    again = partial(peaks.rate, limit, threads)
                    stock, native, most = measure(sessions, rows, again, given.seconds)
                    one = {"operator": case.operator, "sizes": case.sizes, "call": name, "threads": threads}
                    one |= {"stock": stock / case.copies, "native": native / case.copies, "limit": limit, "peak": most}
                    found.append(one | {"share": work[limit] * case.copies / native / most})
    for threads, peak in limits.items():
        print(f"threads {threads}, 10⁹ a second at most: {', '.join(f'{name} {peak[name]:.1f}' for name in peak)}")
    print(f"{available.instruction_set}; other programs used {others.cores} cores")
    for _, group in groupby(found, lambda one: one["operator"][:6]):
        print(f"\n{table(list(group))}")
    if given.output:
        whole = {"peaks": limits, "others": others.cores, "results": found}
        given.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
