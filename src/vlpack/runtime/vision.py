"""A package's vision encoder in an onnxruntime session of its own, which is made when the first image comes.

onnxruntime-genai has a session of its own for it, loaded with the package whether images come or not, and forgets what
it made of an image with the generator. Here it gets a stand-in: a graph of one Reshape that hands on features made
before. They come as what it takes for pixels, ``[patches, W / merge²]``, of which ``merge²`` rows are one token's W
features, so that its own bookkeeping (patches of an image by its grid, tokens by the grid through ``merge²``) stays.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from vlpack.errors import PackageError
from vlpack.ort.session import cpu_session, ort
from vlpack.preprocess import Prompt

Array = npt.NDArray[Any]

STAND_IN = "vlpack-features.onnx"
"""The stand-in's name for the runtime; there is no such file."""

KEPT_BYTES = 1 << 28
"""Features that are kept, the last ones used: 256 MiB, eight or more images of 1024×768 of a 2B model."""

OpenSession = Callable[[Path, int], Any]
"""Makes an ``onnxruntime.InferenceSession`` of a graph's path and a number of threads."""


class VisionEncoder:
    """What a vision graph makes of images, each of them once.

    Args:
        graph: path of the package's vision graph.
        width: W, of its ``image_features [tokens, W]``; merge_size² divides it.
        dtype: of the features, float32 or float16.
        merge_size: patches along an edge of what becomes one token.
        threads: of the session.
        open_session: makes it.
        check: called before and after the session is made; it raises where the graph's files are not those of the
            package that was loaded.
    """

    def __init__(
        self,
        graph: Path,
        width: int,
        dtype: npt.DTypeLike,
        merge_size: int,
        threads: int,
        open_session: OpenSession = cpu_session,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.width, self.dtype, self.merge_size = width, np.dtype(dtype), merge_size
        self._graph, self._threads, self._open = graph, threads, open_session
        self._check = check or (lambda: None)
        self._session: Any = None
        self._kept: OrderedDict[bytes, Array] = OrderedDict()
        self.stand_in = _stand_in(width, self.dtype, merge_size**2)

    def load(self) -> None:
        """Make the session now, not with the first image.

        Raises:
            PackageError: onnxruntime cannot load the graph, or it is another one than when the package was loaded.
        """
        if self._session is not None:
            return
        self._check()
        try:
            session = self._open(self._graph, self._threads)
        except Exception as error:  # onnxruntime has a class for each of its codes, without a common one
            self._check()
            raise PackageError(f"onnxruntime cannot load {self._graph}: {str(error).strip()[:500]}") from error
        self._check()  # once more: it may have been replaced between
        self._session = session

    def features(self, prompt: Prompt) -> Array:
        """``image_features [tokens, W]`` of a prompt's images in their order; those seen lately are not made again.

        Raises:
            PackageError: onnxruntime cannot load the graph, or fails.
        """
        made = [self._of_image(pixels, grid) for pixels, grid in prompt.images()]
        return np.concatenate(made) if made else np.zeros((0, self.width), self.dtype)

    def runtime_arrays(self, prompt: Prompt) -> dict[str, Array]:
        """`Prompt.named_arrays` for a runtime that has the stand-in."""
        arrays = prompt.named_arrays()
        if prompt.has_images:
            arrays["pixel_values"] = self.features(prompt).reshape(-1, self.width // self.merge_size**2)
        return arrays

    def forget(self) -> None:
        """Keep no features."""
        self._kept.clear()

    def _of_image(self, pixels: npt.NDArray[np.float32], grid: npt.NDArray[np.int64]) -> Array:
        key = hashlib.sha256(grid.tobytes())
        key.update(np.ascontiguousarray(pixels).data)
        found = self._kept.pop(key.digest(), None)
        if found is None:
            found = self._run(pixels, grid)
        self._kept[key.digest()] = found  # the youngest
        while len(self._kept) > 1 and sum(features.nbytes for features in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return found

    def _run(self, pixels: npt.NDArray[np.float32], grid: npt.NDArray[np.int64]) -> Array:
        options = ort.RunOptions()
        # scores and layers of a large image take hundreds of MB, which the decoder's answer does not need
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.load()
        inputs = {"pixel_values": pixels, "image_grid_thw": grid}
        try:
            with ThreadPoolExecutor(1) as worker:  # the program's own thread must wait to be interrupted
                try:
                    running = worker.submit(self._session.run, None, inputs, options)
                    while not wait([running], timeout=0.1).done:  # Windows hears nothing in a wait without an end
                        pass
                    (features,) = running.result()
                except BaseException:
                    options.terminate = True  # which nothing but an interruption finds still running
                    raise
        except Exception as error:
            raise PackageError(f"onnxruntime fails at {self._graph}: {str(error).strip()[:500]}") from error
        return np.asarray(features)


def features_port(graph: Path) -> tuple[int, np.dtype[Any]] | None:
    """Width and type of ``image_features`` as an embedding graph takes it; None where the width is not static.

    Raises:
        PackageError: the graph cannot be read.
    """
    try:
        inputs = onnx.load(graph, load_external_data=False).graph.input
    except Exception as error:  # protobuf's own kinds
        raise PackageError(f"{graph} cannot be read: {str(error)[:200]}.", "Build it again.") from None
    for port in inputs:
        tensor = port.type.tensor_type
        if port.name == "image_features" and len(tensor.shape.dim) == 2 and tensor.shape.dim[1].dim_value > 0:
            return tensor.shape.dim[1].dim_value, helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return None


def _stand_in(width: int, dtype: np.dtype[Any], patches: int) -> bytes:
    """A vision graph whose pixels are the features, ``patches`` rows of them for each token."""
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["pixel_values", "shape"], ["image_features"])],
        "features",
        [
            helper.make_tensor_value_info("pixel_values", kind, ["patches", width // patches]),
            helper.make_tensor_value_info("image_grid_thw", TensorProto.INT64, ["images", 3]),
        ],
        [helper.make_tensor_value_info("image_features", kind, ["tokens", width])],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [-1, width])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    serialized: bytes = model.SerializeToString()
    return serialized
