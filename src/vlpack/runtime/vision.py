"""A package's vision encoder in a separate onnxruntime session, which is created with the first image.

onnxruntime-genai would load the vision graph with the package, even if there are never images, and drop an image's
features with each generator. Therefore it gets a stand-in graph of a single Reshape, to which vlpack passes finished
features in place of the pixels. Their shape is ``[patches, W / merge²]``, and ``merge²`` rows are the W features of one
token. So the runtime's own bookkeeping still holds: an image has the patches that its grid says, and one token for
every ``merge²`` patches.
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
from vlpack.ort.session import kernel_session, ort
from vlpack.preprocess import Prompt

Array = npt.NDArray[Any]

STAND_IN = "vlpack-features.onnx"
"""File name under which the runtime gets the stand-in graph from memory; there is no such file."""

KEPT_BYTES = 1 << 28
"""Maximum bytes of cached features, 256 MiB: with a 2B model, eight or more images of 1024×768. The least recently used
ones are dropped."""

OpenSession = Callable[[Path, int], Any]
"""A function that creates an ``onnxruntime.InferenceSession`` from the path of a graph and a number of threads."""


class VisionEncoder:
    """A vision encoder with a cache of the features of recent images.

    Args:
        graph: path of the package's vision graph.
        width: W of its output ``image_features [tokens, W]``; a multiple of merge_size².
        dtype: type of the features, float32 or float16.
        merge_size: patches along an edge of the square that becomes one token.
        threads: number of threads of the session.
        open_session: function that creates the session.
        check: function that is called before and after the session is created, and raises an error if the graph's files
            are no longer those of the loaded package.
    """

    def __init__(
        self,
        graph: Path,
        width: int,
        dtype: npt.DTypeLike,
        merge_size: int,
        threads: int,
        open_session: OpenSession = kernel_session,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.width, self.dtype, self.merge_size = width, np.dtype(dtype), merge_size
        self._graph, self._threads, self._open = graph, threads, open_session
        self._check = check or (lambda: None)
        self._session: Any = None
        self._kept: OrderedDict[bytes, Array] = OrderedDict()
        self.stand_in = _stand_in(width, self.dtype, merge_size**2)

    def load(self) -> None:
        """Creates the session now instead of with the first image.

        Raises:
            PackageError: onnxruntime cannot load the graph, or the graph was replaced since the package was loaded.
        """
        if self._session is not None:
            return
        self._check()
        try:
            session = self._open(self._graph, self._threads)
        except Exception as error:  # onnxruntime's error classes have no common base
            self._check()
            raise PackageError(f"onnxruntime cannot load {self._graph}: {str(error).strip()[:500]}") from error
        self._check()  # again: the files may have been replaced while the session was created
        self._session = session

    def features(self, prompt: Prompt) -> Array:
        """The features ``[tokens, W]`` of a prompt's images, in order; those of recent images come from the cache.

        Raises:
            PackageError: onnxruntime cannot load the graph, or fails.
        """
        made = [self._of_image(pixels, grid) for pixels, grid in prompt.images()]
        return np.concatenate(made) if made else np.zeros((0, self.width), self.dtype)

    def runtime_arrays(self, prompt: Prompt) -> dict[str, Array]:
        """The inputs of `Prompt.named_arrays` for a runtime with the stand-in: features in place of the pixels."""
        arrays = prompt.named_arrays()
        if prompt.has_images:
            arrays["pixel_values"] = self.features(prompt).reshape(-1, self.width // self.merge_size**2)
        return arrays

    def forget(self) -> None:
        """Drops all cached features."""
        self._kept.clear()

    def _of_image(self, pixels: npt.NDArray[np.float32], grid: npt.NDArray[np.int64]) -> Array:
        key = hashlib.sha256(grid.tobytes())
        key.update(np.ascontiguousarray(pixels).data)
        found = self._kept.pop(key.digest(), None)
        if found is None:
            found = self._run(pixels, grid)
        self._kept[key.digest()] = found  # at the end: the most recently used
        while len(self._kept) > 1 and sum(features.nbytes for features in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return found

    def _run(self, pixels: npt.NDArray[np.float32], grid: npt.NDArray[np.int64]) -> Array:
        options = ort.RunOptions()
        # Free the hundreds of MB that a large image's attention scores take, so that the decoder can use them.
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.load()
        inputs = {"pixel_values": pixels, "image_grid_thw": grid}
        try:
            with ThreadPoolExecutor(1) as worker:  # the calling thread only waits, so that Control-C can interrupt it
                try:
                    running = worker.submit(self._session.run, None, inputs, options)
                    while not wait([running], timeout=0.1).done:  # on Windows, a wait without timeout ignores Control-C
                        pass
                    (features,) = running.result()
                except BaseException:
                    options.terminate = True  # has an effect only after an interruption, when the run still goes on
                    raise
        except Exception as error:
            raise PackageError(f"onnxruntime fails at {self._graph}: {str(error).strip()[:500]}") from error
        return np.asarray(features)


def features_port(graph: Path) -> tuple[int, np.dtype[Any]] | None:
    """Width and type of the input ``image_features`` of an embedding graph; None if the width is not static.

    Raises:
        PackageError: the graph cannot be read.
    """
    try:
        inputs = onnx.load(graph, load_external_data=False).graph.input
    except Exception as error:  # protobuf has its own error classes
        raise PackageError(f"{graph} cannot be read: {str(error)[:200]}.", "Build the package again.") from None
    for port in inputs:
        tensor = port.type.tensor_type
        if port.name == "image_features" and len(tensor.shape.dim) == 2 and tensor.shape.dim[1].dim_value > 0:
            return tensor.shape.dim[1].dim_value, helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return None


def _stand_in(width: int, dtype: np.dtype[Any], patches: int) -> bytes:
    """A stand-in for the vision graph, serialized: it reshapes its input, ``patches`` rows per token, to features."""
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
