"""A package's decoder and embedding in plain onnxruntime sessions, many sequences at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.errors import PackageError
from vlpack.ort.session import cpu_session, ort

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
}


class CachePort:
    """One of the decoder's inputs of keys or values, with the output that takes its place.

    Attributes:
        past: the input's name.
        present: the output's name.
        heads: of keys.
        channels: of a head.
        dtype: of the numbers.
    """

    def __init__(self, past: str, present: str, port: Any) -> None:
        self.past, self.present = past, present
        self.heads, self.channels = int(port.shape[1]), int(port.shape[3])
        self.dtype = DTYPES[port.type]

    def row_bytes(self, tokens: int) -> int:
        """The bytes that so many tokens of one sequence take."""
        return self.heads * self.channels * tokens * self.dtype.itemsize


class Graphs:
    """The sessions, and what their inputs are called.

    Args:
        folder: the package.
        model: the section of its genai_config.json.
        threads: of the decoder's session.

    Attributes:
        cache: the decoder's inputs of keys and values, layer by layer.
        image_width: of a token's features as the embedding graph takes them; 0 where it takes none.

    Raises:
        PackageError: onnxruntime cannot load a graph, or it is not one that many sequences can share.
    """

    def __init__(self, folder: Path, model: dict[str, Any], threads: int) -> None:
        decoder = model["decoder"]
        self.path = folder / str(decoder["filename"])
        self.decoder = _open(self.path, threads)
        self._ports = {port.name: port for port in self.decoder.get_inputs()}
        outputs = {port.name: port for port in self.decoder.get_outputs()}
        self.cache: list[CachePort] = []
        try:
            for layer in range(int(decoder["num_hidden_layers"])):
                for kind in ("key", "value"):
                    past = decoder["inputs"][f"past_{kind}_names"].replace("%d", str(layer))
                    present = decoder["outputs"][f"present_{kind}_names"].replace("%d", str(layer))
                    self.cache.append(CachePort(past, outputs[present].name, self._ports[past]))
            self.logits = outputs["logits"]
            known = {"attention_mask", "position_ids", *(port.past for port in self.cache)}
            self.given = [name for name in self._ports if name not in known]  # tokens, in whatever form
            self.axes = len(self._ports["position_ids"].shape)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise PackageError(f"{self.path} is not a decoder as vlpack writes it: {error!r}.") from None
        self.every_logit = self.logits.shape[1] != 1
        self.vocab_size = int(self.logits.shape[2])
        self.embedding, self.image_width, self._no_features = None, 0, np.zeros((0, 0), np.float32)
        if "input_ids" not in self._ports:
            self._embedding_path = folder / str(model["embedding"]["filename"])
            self.embedding = _open(self._embedding_path, 1)  # it looks rows up
            port = next(port for port in self.embedding.get_inputs() if port.name == "image_features")
            self.image_width = int(port.shape[1])
            self._no_features = np.zeros((0, self.image_width), DTYPES[port.type])

    def tokens(self, ids: Array, features: Array | None = None) -> dict[str, Array]:
        """Token ids ``[B, S]`` as the decoder takes them.

        Args:
            ids: placeholders of images among them.
            features: ``[F, W]`` of the placeholders, in order.

        Raises:
            PackageError: onnxruntime fails.
        """
        ids = ids.astype(np.int64)
        if self.embedding is None:
            return {"input_ids": ids.astype(DTYPES[self._ports["input_ids"].type])}
        given = {"input_ids": ids, "image_features": self._no_features if features is None else features}
        try:
            values = self.embedding.run(self.given, given)
        except Exception as error:  # onnxruntime has a class for each of its codes, without a common one
            raise _failed(self._embedding_path, error) from error
        return dict(zip(self.given, values, strict=True))

    def run(self, binding: Any, tokens: dict[str, Array], lengths: Array, positions: Array) -> Array:
        """One call of the decoder.

        Args:
            binding: keys and values of the sequences, bound in place as inputs and outputs.
            tokens: the new ones of B sequences, S of each; see `tokens`.
            lengths: ``[B]``, how many keys of each sequence are valid then, the new ones among them.
            positions: ``[axes, B, S]`` of the new tokens.

        Returns:
            logits of the last new token of each sequence ``[B, V]``, floats as fp32.

        Raises:
            PackageError: onnxruntime fails.
        """
        _, rows, new = positions.shape
        total = np.arange(int(lengths.max()))
        given = {
            **tokens,
            "attention_mask": (total < lengths[:, None]).astype(np.int64),
            "position_ids": np.ascontiguousarray(positions if self.axes == 3 else positions[0]),
        }
        logits = np.empty((rows, new if self.every_logit else 1, self.vocab_size), DTYPES[self.logits.type])
        try:
            for name, array in given.items():
                binding.bind_cpu_input(name, array)
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
            self.decoder.run_with_iobinding(binding)
        except Exception as error:
            raise _failed(self.path, error) from error
        last: Array = logits[:, -1].astype(np.float32, copy=False)
        return last


def _open(path: Path, threads: int) -> Any:
    try:
        return cpu_session(path, threads)
    except Exception as error:
        raise PackageError(f"onnxruntime cannot load {path}: {str(error).strip()[:500]}") from error


def _failed(path: Path, error: Exception) -> PackageError:
    return PackageError(f"onnxruntime fails at {path}: {str(error).strip()[:500]}")
