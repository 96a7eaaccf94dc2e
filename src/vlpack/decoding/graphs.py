"""Plain onnxruntime sessions of a package's decoder and embedding, which run many sequences at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from vlpack.decoding.packing import PACKING_INPUTS, WANTED, Edits, Packing, edit_decoder
from vlpack.decoding.states import STATE_INPUTS, state_inputs, state_ports
from vlpack.errors import PackageError
from vlpack.ort.session import kernel_session, ort

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(np.uint16),  # numpy has no such type; only keys and values have it
    "tensor(int8)": np.dtype(np.int8),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
}
"""Numpy dtypes of onnxruntime's types of tensors."""


class CachePort:
    """An input of the decoder for a layer's cached keys or values, with the output for the same cache after the call.

    Args:
        past: name of the input.
        present: name of the output.
        port: onnxruntime's description of the input, which has the shape ``[B, heads, tokens, channels]``.

    Attributes:
        past: name of the input.
        present: name of the output.
        heads: number of key/value heads.
        channels: number of channels of a head.
        dtype: data type of the cache; for bfloat16, an integer type of the same size.
    """

    def __init__(self, past: str, present: str, port: Any) -> None:
        self.past, self.present = past, present
        self.heads, self.channels = int(port.shape[1]), int(port.shape[3])
        self.dtype = DTYPES[port.type]
        self._narrow = port.type == "tensor(bfloat16)"

    def value(self, buffer: Array) -> Any:
        """An onnxruntime value for the cache in this memory, ``[B, heads, tokens, channels]``."""
        if self._narrow:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(buffer, onnx.TensorProto.BFLOAT16)
        return ort.OrtValue.ortvalue_from_numpy(buffer)

    def row_bytes(self, tokens: int) -> int:
        """The bytes that ``tokens`` tokens of one sequence take in this cache."""
        return self.heads * self.channels * tokens * self.dtype.itemsize


class Graphs:
    """The sessions of a package's decoder and embedding, and the names of their inputs.

    Args:
        folder: folder of the package.
        model: ``model`` section of the package's genai_config.json.
        threads: number of threads of the decoder's session.
        several: whether calls can take several sequences. For one sequence, the decoder's graph needs no edits, and a
            token of a model with linear attention takes less time.

    Attributes:
        cache: the decoder's inputs for keys and values, layer by layer.
        vocab_size: number of logits of a token.
        image_width: number of channels of an image token's features in the embedding graph; 0 if it takes no images.
        packed: whether a call takes any number of new tokens of each sequence; otherwise a call takes new tokens of one
            sequence, or at most one new token of each.
        states: the decoder's inputs for states of linear-attention layers; empty if it has no such layers.

    Raises:
        PackageError: onnxruntime cannot load a graph, or the decoder is not one that vlpack writes.
    """

    def __init__(self, folder: Path, model: dict[str, Any], threads: int, *, several: bool = True) -> None:
        decoder = model["decoder"]
        self.path = folder / str(decoder["filename"])
        self.decoder, (self.packed, self.states) = _open_decoder(self.path, threads, several)
        self._ports = {port.name: port for port in self.decoder.get_inputs()}
        outputs = {port.name: port for port in self.decoder.get_outputs()}
        self.cache: list[CachePort] = []
        try:
            kept = {port.past for port in self.states}
            for layer in range(int(decoder["num_hidden_layers"])):
                if self.states and decoder["inputs"]["past_recurrent_names"].replace("%d", str(layer)) in kept:
                    continue
                for kind in ("key", "value"):
                    past = decoder["inputs"][f"past_{kind}_names"].replace("%d", str(layer))
                    present = decoder["outputs"][f"present_{kind}_names"].replace("%d", str(layer))
                    self.cache.append(CachePort(past, outputs[present].name, self._ports[past]))
            self.logits = outputs["logits"]
            known = {"attention_mask", "position_ids", *PACKING_INPUTS, *STATE_INPUTS, *kept}
            known |= {port.past for port in self.cache}
            self.given = [name for name in self._ports if name not in known]  # inputs for ids or embeddings
            self.axes = len(self._ports["position_ids"].shape)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise PackageError(f"{self.path} is not a decoder as vlpack writes it: {error!r}.") from None
        self.every_logit = self.logits.shape[1] not in (1, WANTED)
        self.vocab_size = int(self.logits.shape[2])
        self.embedding, self.image_width, self._no_features = None, 0, np.zeros((0, 0), np.float32)
        if "input_ids" not in self._ports:
            self._embedding_path = folder / str(model["embedding"]["filename"])
            self.embedding = _open(self._embedding_path, 1)  # a table lookup gains nothing from more threads
            port = next(port for port in self.embedding.get_inputs() if port.name == "image_features")
            self.image_width = int(port.shape[1])
            self._no_features = np.zeros((0, self.image_width), DTYPES[port.type])

    @property
    def rewinds(self) -> bool:
        """Whether tokens of a call can be rejected afterwards, so that a step can check several draft tokens."""
        return self.packed and not self.states

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

    def run(
        self, binding: Any, tokens: dict[str, Array], counts: Array, held: Array, positions: Array, wanted: Array
    ) -> Array:
        """Runs the decoder once, on N new tokens of B sequences.

        Args:
            binding: I/O binding in which the sequences' cached keys and values are bound as inputs and outputs.
            tokens: decoder inputs for the new tokens of all sequences, one sequence after the other, ``[1, N]``, as
                the method `tokens` returns them.
            counts: number of new tokens of each sequence, ``[B]``. A graph that is not packed takes tokens of one
                sequence only, or at most one of each; for a sequence without a new token, it writes one key after
                those of the sequence.
            held: number of cached keys of each sequence before the call, ``[B]``.
            positions: positions of the new tokens, ``[3, N]``.
            wanted: indices of the tokens whose logits are returned, ``[K]``; for a graph that is not packed, the last
                token of each sequence.

        Returns:
            Logits of the wanted tokens, fp32 ``[K, V]``.

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
        if "present_tokens" in self._ports:  # the graph was edited to keep states
            window = next(port.shape[-1] for port in self.states if not port.in_place)
            given |= state_inputs(counts, window, self.packed)
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


def _open_decoder(path: Path, threads: int, several: bool) -> tuple[Any, Edits]:
    """Opens the decoder's session, with the graph edited in memory if necessary, and returns it with the edits."""
    made = Edits(False, [])

    def edit(model: onnx.ModelProto) -> None:
        nonlocal made
        made = edit_decoder(model) if several else Edits(False, state_ports(model))

    try:
        session = kernel_session(path, threads, edit)
    except PackageError:
        raise
    except Exception as error:  # onnxruntime has a class for each of its codes, without a common one
        raise _failed_to_load(path, error) from error
    return session, made


def _open(path: Path, threads: int) -> Any:
    """Opens the session of a graph that is not edited."""
    try:
        return kernel_session(path, threads)
    except PackageError:
        raise
    except Exception as error:
        raise _failed_to_load(path, error) from error


def _failed_to_load(path: Path, error: Exception) -> PackageError:
    return PackageError(f"onnxruntime cannot load {path}: {str(error).strip()[:500]}")


def _failed(path: Path, error: Exception) -> PackageError:
    return PackageError(f"onnxruntime fails at {path}: {str(error).strip()[:500]}")
