"""Both sides of a parity test: a checkpoint in live transformers, and the graphs of its package in onnxruntime."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tiny import FIRST_SPECIAL, IMAGE, VISION_END, VISION_START, Tiny
from vlpack.layers.candidates import CANDIDATES

Grid = tuple[int, int, int]


def relative(value: Any, reference: Any) -> float:
    """The relative L2 error of an array: its distance from the reference, divided by the reference's norm."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape, f"{value.shape} is not {reference.shape}"
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


@dataclass(frozen=True)
class Inputs:
    """A prompt: ``ids [B, S]``, and ``pixels [patches, …]`` and ``grid [images, 3]``, which are empty for text."""

    ids: np.ndarray
    pixels: np.ndarray
    grid: np.ndarray


def make_inputs(tiny: Tiny, *rows: tuple[Grid, ...], text: int = 5, seed: int = 0) -> Inputs:
    """A batch of prompts with images between random words; all rows must have the same length."""
    key = repr((tiny.pixels, tiny.merge, rows, text, seed))
    random = np.random.default_rng(zlib.crc32(key.encode()))
    ids = []
    for grids in rows:
        row = list(random.integers(0, FIRST_SPECIAL, text))
        for frames, height, width in grids:
            # each temporal patch has markers of its own, as in Qwen3-VL's videos
            frame = [VISION_START, *[IMAGE] * (height * width // tiny.merge**2), VISION_END]
            row += frame * frames + list(random.integers(0, FIRST_SPECIAL, 2))
        ids.append(row)
    grid = np.array([g for grids in rows for g in grids], np.int64).reshape(-1, 3)
    pixels = random.normal(0, 1, (int(grid.prod(1).sum()), tiny.pixels)).astype(np.float32)
    return Inputs(np.array(ids, np.int64), pixels, grid)


@dataclass(frozen=True)
class Expected:
    """The outputs of transformers for a prompt."""

    merged: np.ndarray  # [tokens, H]
    levels: list[np.ndarray]  # features of the DeepStack levels, [tokens, H] each
    embeds: np.ndarray  # [B, S, H]
    logits: np.ndarray  # [B, S, V]
    positions: np.ndarray  # [3, B, S]


class Reference:
    """The reference: a checkpoint in transformers, in float32 with eager attention."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import Qwen3VLForConditionalGeneration

        self.model = Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._seen: dict[bytes, Expected] = {}

    def __call__(self, inputs: Inputs) -> Expected:
        """The outputs of a forward pass, which are cached."""
        key = inputs.ids.tobytes() + inputs.pixels.tobytes() + inputs.grid.tobytes()
        if key not in self._seen:
            self._seen[key] = self.forward(inputs)
        return self._seen[key]

    def forward(self, inputs: Inputs) -> Expected:
        import torch

        ids, core = torch.tensor(inputs.ids), self.model.model
        width = self.model.config.text_config.hidden_size
        with torch.no_grad():
            embeds = core.get_input_embeddings()(ids)
            merged, levels = np.zeros((0, width), np.float32), []
            arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
            positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
            if len(inputs.grid):
                pixels, grid = torch.tensor(inputs.pixels), torch.tensor(inputs.grid)
                kinds = (ids == IMAGE).int()
                vision = core.visual(pixels, grid_thw=grid)
                merged, levels = vision.pooler_output.numpy(), [x.numpy() for x in vision.deepstack_features]
                embeds = embeds.masked_scatter((ids == IMAGE)[..., None], vision.pooler_output)
                # in the prompt, every temporal patch is an image of its own
                frames = torch.repeat_interleave(grid, grid[:, 0], dim=0)
                frames[:, 0] = 1
                positions, _ = core.get_rope_index(ids, kinds, image_grid_thw=frames)
                core.rope_deltas = None
                arguments |= {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
            logits = self.model(**arguments, position_ids=positions).logits
        return Expected(merged, levels, embeds.numpy(), logits.numpy(), positions.numpy())

    def generate(self, arrays: Mapping[str, np.ndarray], tokens: int) -> list[int]:
        """The greedy answer to a prompt's arrays; end tokens do not end it."""
        import torch

        ids = torch.tensor(arrays["input_ids"]).long()
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "pixel_values" in arrays:
            arguments["pixel_values"] = torch.tensor(arrays["pixel_values"])
            arguments["image_grid_thw"] = torch.tensor(arrays["image_grid_thw"])
            arguments["mm_token_type_ids"] = (ids == IMAGE).int()
        out = self.model.generate(
            **arguments, do_sample=False, max_new_tokens=tokens, eos_token_id=None, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        best = torch.stack(out.scores)[:, 0].topk(2).values
        # two almost equal logits would make the comparison depend on rounding errors
        margin = float((best[:, 0] - best[:, 1]).min())
        assert margin > 1e-4, f"top two logits {margin:.1g} apart: choose another seed"
        return out.sequences[0, ids.shape[1] :].tolist()

    @contextmanager
    def with_weights(self, change: Callable[[str, np.ndarray], np.ndarray]) -> Iterator[None]:
        """A context in which every matrix is replaced by ``change(name, weight [out, in])``; a tied head is untied."""
        import torch

        head, embedding = self.model.lm_head, self.model.model.language_model.embed_tokens
        seen, self._seen = self._seen, {}
        old = {name: parameter.data for name, parameter in self.model.named_parameters()}
        tied = head.weight is embedding.weight
        if tied:
            head.weight = torch.nn.Parameter(head.weight.detach())
        try:
            for name, parameter in self.model.named_parameters():
                if parameter.ndim > 1:
                    rows = parameter.detach().numpy().reshape(parameter.shape[0], -1)
                    new = np.asarray(change(name, rows.copy()), np.float32)
                    parameter.data = torch.tensor(new).reshape(parameter.shape)
            yield
        finally:
            if tied:
                head.weight = embedding.weight
            for name, parameter in self.model.named_parameters():
                parameter.data = old[name]
            self._seen = seen

    @contextmanager
    def with_candidates(self, weight: np.ndarray) -> Iterator[None]:
        """A context in which the likeliest tokens have the logits that the head's ``weight [V, H]`` gives them."""
        import torch

        rows = torch.tensor(weight)

        def again(module: Any, inputs: Any, logits: Any) -> Any:
            ids = logits.topk(CANDIDATES, dim=-1).indices
            return logits.scatter(-1, ids, (inputs[0] @ rows.T).gather(-1, ids))

        hook = self.model.lm_head.register_forward_hook(again)
        try:
            yield
        finally:
            hook.remove()


def dtype_of(port: Any) -> type[np.generic]:
    """The dtype of a graph's cache input."""
    return np.int8 if port.type == "tensor(int8)" else np.float32


def nothing_yet(port: Any, batch: int) -> np.ndarray:
    """The value of a decoder's cache or state input before the first token: no keys, or zeros."""
    return np.zeros([batch, *(0 if isinstance(size, str) else size for size in port.shape[1:])], dtype_of(port))


class Package:
    """The graphs of a built package, each in a session on the CPU."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.sessions = {
            name: ort.InferenceSession(folder / config[name]["filename"], options, providers=["CPUExecutionProvider"])
            for name in ("vision", "embedding", "decoder")
            if name in config
        }

    def run(self, part: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one graph; floats are converted to the type of the input."""
        session = self.sessions[part]
        types = {port.name: port.type for port in session.get_inputs()}
        halves = {k: v.astype(np.float16) for k, v in inputs.items() if types.get(k) == "tensor(float16)"}
        names = [port.name for port in session.get_outputs()]
        return dict(zip(names, session.run(names, {**inputs, **halves}), strict=True))

    def features(self, inputs: Inputs, packed: bool = False) -> np.ndarray:
        """The ``image_features`` of all images, from one call or, as in the runtime for unequal images, several."""
        width = self.sessions["embedding"].get_inputs()[1].shape[1] if "embedding" in self.sessions else 0
        if not len(inputs.grid):
            return np.zeros((0, width), np.float32)
        if packed:
            return self.run("vision", pixel_values=inputs.pixels, image_grid_thw=inputs.grid)["image_features"]
        ends = np.cumsum(inputs.grid.prod(1))
        return np.concatenate(
            [
                self.run("vision", pixel_values=inputs.pixels[end - g.prod() : end], image_grid_thw=g[None])[
                    "image_features"
                ]
                for g, end in zip(inputs.grid, ends, strict=True)
            ]
        )

    def embed(self, ids: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
        """The embedding graph's outputs: ``inputs_embeds`` and, with DeepStack, ``per_layer_inputs``."""
        return self.run("embedding", input_ids=ids, image_features=features)

    def decode(
        self, tokens: Mapping[str, np.ndarray], positions: np.ndarray, past: Mapping[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The logits, and the cache for the next call; ``tokens`` are ids or outputs of `embed`."""
        batch, length = positions.shape[1:]
        ports = [p for p in self.sessions["decoder"].get_inputs() if p.name.startswith("past_key_values")]
        past = past or {p.name: nothing_yet(p, batch) for p in ports}
        keys = next(p.name for p in ports if p.name.endswith(".key"))
        mask = np.ones((batch, length + past[keys].shape[2]), np.int64)
        out = self.run("decoder", **tokens, attention_mask=mask, position_ids=positions, **past)
        logits = out.pop("logits")
        return logits, {name.replace("present", "past_key_values"): value for name, value in out.items()}

    def logits(self, inputs: Inputs, positions: np.ndarray, packed: bool = False) -> np.ndarray:
        """The logits of a prompt after all graphs, in one pass."""
        return self.decode(self.embed(inputs.ids, self.features(inputs, packed)), positions)[0]
