"""Sessions of one operator each, and the instruction set that is tested.

The variable VLPACK_KERNELS_ISA chooses the instruction set; .ci/run runs these tests once for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import vlpack_kernels
from onnx import TensorProto, helper, numpy_helper

DOMAIN = "vlpack"


def pytest_report_header() -> str:
    return f"vlpack-kernels: {vlpack_kernels.instruction_set()}"


@pytest.fixture(autouse=True)
def _needs_the_instruction_set() -> None:
    if vlpack_kernels.instruction_set() is None:
        pytest.skip("the processor does not have the instruction set")


def session(
    operator: str,
    inputs: list[str],
    constants: dict[str, Any],
    threads: int = 1,
    domain: str = DOMAIN,
    outputs: Sequence[str] = ("y",),
    narrow: Sequence[str] = (),
    **attributes: Any,
) -> ort.InferenceSession:
    """A session of one node, whose inputs are fp32 tensors of any shape and then the constants; None is no input.

    Inputs and outputs whose names are in ``narrow`` are bfloat16.
    """
    kinds = {name: TensorProto.BFLOAT16 if name in narrow else TensorProto.FLOAT for name in (*inputs, *outputs)}
    names = [*inputs, *("" if value is None else name for name, value in constants.items())]
    node = helper.make_node(operator, names, outputs, domain=domain, **attributes)
    ports = [helper.make_tensor_value_info(name, kinds[name], None) for name in inputs]
    weights = [numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items() if x is not None]
    results = [helper.make_tensor_value_info(name, kinds[name], None) for name in outputs]
    graph = helper.make_graph([node], "graph", ports, results, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if domain == DOMAIN:
        options.register_custom_ops_library(str(vlpack_kernels.library()))
    text = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(text, options, providers=["CPUExecutionProvider"])
