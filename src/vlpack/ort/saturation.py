"""A check whether this processor multiplies unsigned by signed bytes exactly.

x86 without VNNI or AMX adds two such products in 16 bits, which saturate: 255 · 127 + 255 · 127 becomes 32767. The
check runs one product in onnxruntime's own kernel, so that no list of processors is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from vlpack.errors import VlpackWarning, option
from vlpack.quantize.storage import ChannelInt8

HINT = option("extra.weight_type", "uint8")


class SaturationWarning(VlpackWarning):
    """A warning that integer products of a package may saturate on this processor."""


@cache
def saturates() -> bool:
    """Whether sums of unsigned by signed 8-bit products saturate on this processor."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    size = 64
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "saturation",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, size])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, size])],
        [numpy_helper.from_array(np.full((size, size), 127, np.int8), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.full((1, size), 255, np.uint8)})
    return bool((product != size * 255 * 127).any())


def warn_of_saturation(manifest: Mapping[str, Any]) -> None:
    """Issue a `SaturationWarning` if a package has signed 8-bit matrices and this processor saturates their products.

    Args:
        manifest: the package's manifest.
    """
    rules = manifest.get("policy")
    labels = (
        {str(rule.get("storage")) for rule in rules if isinstance(rule, dict)} if isinstance(rules, list) else set()
    )
    signed = {
        ChannelInt8(calibrated=calibrated, kept=kept).label for calibrated in (False, True) for kept in (False, True)
    }
    if signed & labels and saturates():
        warnings.warn(
            "This processor lacks VNNI, so products of the package's int8 weights may saturate, and answers may be "
            f"slightly worse. For such processors, build the package with {HINT}.",
            SaturationWarning,
            stacklevel=3,
        )
