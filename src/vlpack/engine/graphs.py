"""Plain onnxruntime sessions of a package's decoder and embedding, which run many sequences at a time."""

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
    """An input of the decoder for a layer's cached keys or values, with the output for the same cache after the call.

    Attributes:
        past: name of the input.
        present: name of the output.
        heads: number of key/value heads.
        channels: number of channels of a head.
        dtype: data type of the cache.
    """

    def __init__(self, past: str, present: str, port: Any) -> None:
        self.past, self.present = past, present
        self.heads, self.channels = int(port.shape[1]), int(port.shape[3])
        self.dtype = DTYPES[port.type]

    def row_bytes(self, tokens: int) -> int:
        """The bytes that ``tokens`` tokens of one sequence take in this cache."""
        return self.heads * self.channels * tokens * self.dtype.itemsize


class Graphs:
    """The sessions of a package's decoder and embedding, and the names of their inputs.

    Args:
        folder: folder of the package.
        model: ``model`` section of the package's genai_config.json.
        threads: number of threads of the decoder's session.

    Attributes:
        cache: the decoder's inputs for keys and values, layer by layer.
        image_width: number of channels of an image token's features in the embedding graph; 0 if it takes no images.

    Raises:
        PackageError: onnxruntime cannot load a graph, or the decoder is not one that vlpack writes.
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
            self.given = [name for name in self._ports if name not in known]  # tokens, as ids or as embeddings
            self.axes = len(self._ports["position_ids"].shape)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise PackageError(f"{self.path} is not a decoder as vlpack writes it: {error!r}.") from None
        self.every_logit = self.logits.shape[1] != 1
        self.vocab_size = int(self.logits.shape[2])
        self.embedding, self.image_width, self._no_features = None, 0, np.zeros((0, 0), np.float32)
        if "input_ids" not in self._ports:
            self._embedding_path = folder / str(model["embedding"]["filename"])
            self.embedding = _open(self._embedding_path, 1)  # a table lookup gains nothing from more threads
            port = next(port for port in self.embedding.get_inputs() if port.name == "image_features")
            self.image_width = int(port.shape[1])
            self._no_features = np.zeros((0, self.image_width), DTYPES[port.type])

    def tokens(self, ids: Array, features: Array | None = None) -> dict[str, Array]:
        """The decoder's input for tokens: their ids, or their embeddings if the package has an embedding graph.

        Args:
            ids: token ids ``[B, S]``, including placeholders of images.
            features: image features ``[F, W]`` of the placeholders, in order; None if there are no placeholders.

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
        """Runs the decoder once, on S new tokens of each of B sequences.

        Args:
            binding: I/O binding in which the sequences' cached keys and values are bound as inputs and outputs.
            tokens: decoder input for the new tokens, as `tokens` returns it.
            lengths: number of valid keys of each sequence after the call, new tokens included, ``[B]``.
            positions: positions of the new tokens, ``[axes, B, S]``.

        Returns:
            logits of the last new token of each sequence, fp32 ``[B, V]``.

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
