"""Checkpoints that somebody quantized already: what they are is said, as their tensors look like damaged ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.files import quote
from vlpack.errors import CheckpointError

SECTIONS = {
    "quantization_config": "quantization_config",
    "compression_config": "compression_config of llm-compressor",
    "quantization": "quantization of MLX",
}
"""Objects in config.json that say so, and how they are called."""

FILES = {"hf_quant_config.json": "ModelOpt", "quantize_config.json": "AutoGPTQ", "quant_config.json": "AutoAWQ"}
"""Files beside config.json in which tools say so."""

ENDINGS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8 in blocks",
    ".weight_scale": "FP8, FP4 or INT8 with scales",
    ".weight_scale_2": "FP4 of ModelOpt",
    ".input_scale": "activations with scales",
    ".scales": "MLX, GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
}
"""Ends of tensors' names that no unquantized model of the supported families has, and what writes them."""


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises a CheckpointError where a checkpoint is quantized, by its config, other tools' files or its tensors."""
    found = _in_config(checkpoint.config) or _in_config(checkpoint.config.get("text_config"))
    found = found or _in_tensors(checkpoint) or _in_files(checkpoint)
    if found:
        raise CheckpointError(
            f"{checkpoint.folder}: the checkpoint is quantized already ({found}).",
            "Use the original one, in bfloat16 or float32.",
        )


def _in_config(config: Any) -> str | None:
    if isinstance(config, dict):
        for name, what in SECTIONS.items():
            if config.get(name) is not None:
                return f"{what} in config.json"
    return None


def _in_tensors(checkpoint: Checkpoint) -> str | None:
    for name in checkpoint.tensors:
        for end, what in ENDINGS.items():
            if name.endswith(end):
                return f"{what}: it has the tensor {quote(name)}"
    return None


def _in_files(checkpoint: Checkpoint) -> str | None:
    """A file alone counts only where it names a method: ModelOpt writes one for unquantized models, too."""
    for file, tool in FILES.items():
        settings = checkpoint.json(file) or {}
        nested = settings.get("quantization")
        method = _method(nested if isinstance(nested, dict) else settings)
        if method is not None:
            return f"{method}, as {tool}'s {file} says"
    return None


def _method(settings: Mapping[str, Any]) -> str | None:
    for name in ("quant_algo", "quant_method", "bits", "w_bit"):
        value = settings.get(name)
        if value is not None:
            return f"{value} bits" if isinstance(value, int) else quote(value)
    return None
