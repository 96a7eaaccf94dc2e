"""The supported model families: one file each, and the registry that finds them."""

from __future__ import annotations

from vlpack.architectures.base import Architecture, Part
from vlpack.architectures.qwen2 import Qwen2
from vlpack.architectures.qwen2_5_vl import Qwen25VL
from vlpack.architectures.qwen2_vl import Qwen2VL
from vlpack.architectures.qwen3 import Qwen3
from vlpack.architectures.qwen3_moe import Qwen3Moe
from vlpack.architectures.qwen3_vl import Qwen3VL
from vlpack.architectures.qwen3_vl_moe import Qwen3VLMoe
from vlpack.checkpoint import Checkpoint
from vlpack.errors import CheckpointError

ARCHITECTURES: dict[str, type[Architecture]] = {
    "Qwen3VLForConditionalGeneration": Qwen3VL,
    "Qwen3VLMoeForConditionalGeneration": Qwen3VLMoe,
    "Qwen2_5_VLForConditionalGeneration": Qwen25VL,
    "Qwen2VLForConditionalGeneration": Qwen2VL,
    "Qwen3ForCausalLM": Qwen3,
    "Qwen3MoeForCausalLM": Qwen3Moe,
    "Qwen2ForCausalLM": Qwen2,
}
"""Name in config.json's ``architectures`` → the class that builds it. A new family is one line here."""


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a checkpoint, its config read and checked, its tensors called by today's names.

    Raises:
        CheckpointError: it is not supported, or its config is not usable.
    """
    name = checkpoint.architecture
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{checkpoint.folder}: the architecture {name} is not supported.",
            "Supported: " + ", ".join(sorted(ARCHITECTURES)) + ".",
        )
    architecture = ARCHITECTURES[name](checkpoint.config)
    checkpoint.rename(architecture.renamed)
    architecture.observe(checkpoint.tensors)
    return architecture


def described() -> list[dict[str, str]]:
    """What is supported, for people: an entry for each architecture of the registry."""
    return [
        {
            "architecture": name,
            "models": family.models,
            "parts": "vision, embedding, decoder" if family.sees() else "text",
            "runs as": family.genai_type,
            "providers": ", ".join(family.providers),
            "needs": family.needs,
        }
        for name, family in ARCHITECTURES.items()
    ]


__all__ = ["ARCHITECTURES", "Architecture", "Part", "architecture_of", "described"]
