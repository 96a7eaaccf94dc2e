"""A package's decoder and embedding in plain onnxruntime sessions, many sequences at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.engine.packing import PACKING_INPUTS, WANTED, Packing, packed
from vlpack.errors import PackageError
from vlpack.ort.session import cpu_session, ort, session_options

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
        packed: whether each sequence may have any number of new tokens in a call; otherwise a call is for one sequence,
            or for one new token of each.

    Raises:
        PackageError: onnxruntime cannot load a graph, or it is not one that many sequences can share.
    """

    def __init__(self, folder: Path, model: dict[str, Any], threads: int) -> None:
        decoder = model["decoder"]
        self.path = folder / str(decoder["filename"])
        self.decoder, self.packed = _open_decoder(self.path, threads)
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
            known = {"attention_mask", "position_ids", *PACKING_INPUTS, *(port.past for port in self.cache)}
            self.given = [name for name in self._ports if name not in known]  # tokens, in whatever form
            self.axes = len(self._ports["position_ids"].shape)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise PackageError(f"{self.path} is not a decoder as vlpack writes it: {error!r}.") from None
        self.every_logit = self.logits.shape[1] not in (1, WANTED)
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

    def run(
        self, binding: Any, tokens: dict[str, Array], counts: Array, held: Array, positions: Array, wanted: Array
    ) -> Array:
        """One call of the decoder.

        Args:
            binding: keys and values of B sequences, bound in place as inputs and outputs.
            tokens: the N new tokens of all sequences, one sequence after the other, ``[1, N]``; see `tokens`.
            counts: ``[B]``, how many of them are of each sequence. Of a graph that is not packed, all of one sequence,
                or at most one of each; a sequence without any writes one key behind those that it holds.
            held: ``[B]``, how many keys each sequence holds before.
            positions: ``[3, N]`` of the tokens.
            wanted: ``[K]``, the tokens whose logits are wanted; of a graph that is not packed, each sequence's last.

        Returns:
            logits ``[K, V]``, floats as fp32.

        Raises:
            PackageError: onnxruntime fails.
        """
        packing, new = Packing.of(counts), int(counts.max())
        given = dict(tokens)
        if self.packed:
            lengths = np.where(counts > 0, held + counts, 1)
            given |= packing.inputs(counts, wanted)
            positions = positions[:, None]
        else:
            lengths = held + new
            given = {name: array[0][packing.spread] for name, array in tokens.items()}
            positions = positions[:, packing.spread]
        given["attention_mask"] = (np.arange(int(lengths.max())) < lengths[:, None]).astype(np.int64)
        given["position_ids"] = np.ascontiguousarray(positions if self.axes == 3 else positions[0])
        size = positions.shape[2] if self.every_logit else len(wanted) if self.packed else 1
        logits = np.empty((1 if self.packed else len(counts), size, self.vocab_size), DTYPES[self.logits.type])
        try:
            for name, array in given.items():
                binding.bind_cpu_input(name, array)
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
            self.decoder.run_with_iobinding(binding)
        except Exception as error:
            raise _failed(self.path, error) from error
        chosen = logits[0] if self.packed else logits[counts > 0, -1]
        if self.packed and self.every_logit:
            chosen = chosen[wanted]
        values: Array = chosen.astype(np.float32, copy=False)
        return values


def _open_decoder(path: Path, threads: int) -> tuple[Any, bool]:
    """A session of the packed decoder and True; of the decoder as it is, and False, where it cannot be packed."""
    try:
        graph = packed(path)
    except Exception as error:  # protobuf has its own error classes
        raise PackageError(f"{path} cannot be read: {str(error)[:300]}") from error
    if graph is None:
        return _open(path, threads), False
    options = session_options(threads)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]), True
    except Exception as error:
        raise _failed_to_load(path, error) from error


def _open(path: Path, threads: int) -> Any:
    try:
        return cpu_session(path, threads)
    except Exception as error:
        raise _failed_to_load(path, error) from error


def _failed_to_load(path: Path, error: Exception) -> PackageError:
    return PackageError(f"onnxruntime cannot load {path}: {str(error).strip()[:500]}")


def _failed(path: Path, error: Exception) -> PackageError:
    return PackageError(f"onnxruntime fails at {path}: {str(error).strip()[:500]}")
