"""Detects checkpoints that are already quantized, so that an error names the method and not the unexpected tensors."""

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
"""Objects in config.json that mark a quantized checkpoint, and their names in messages."""

FILES = {"hf_quant_config.json": "ModelOpt", "quantize_config.json": "AutoGPTQ", "quant_config.json": "AutoAWQ"}
"""Settings files of quantized checkpoints beside config.json, and the tools that write them."""

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
"""Endings of tensor names that no unquantized model of the supported families has, and the methods that use them."""


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises a CheckpointError if config, tensors or another tool's files show that a checkpoint is quantized."""
    found = _in_config(checkpoint.config) or _in_config(checkpoint.config.get("text_config"))
    found = found or _in_tensors(checkpoint) or _in_files(checkpoint)
    if found:
        raise CheckpointError(
            f"{checkpoint.folder}: the checkpoint is already quantized ({found}).",
            "Use the original checkpoint, in bfloat16 or float32.",
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
    """The method named in a tool's settings file. ModelOpt writes one for unquantized models too, without a method."""
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
