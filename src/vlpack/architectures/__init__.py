"""The supported model families, one file each, and the registry in which a checkpoint's family is looked up."""

from __future__ import annotations

from vlpack.architectures.base import Architecture
from vlpack.architectures.llama import Llama
from vlpack.architectures.ports import Part
from vlpack.architectures.qwen2 import Qwen2
from vlpack.architectures.qwen2_5_vl import Qwen25VL
from vlpack.architectures.qwen2_vl import Qwen2VL
from vlpack.architectures.qwen3 import Qwen3
from vlpack.architectures.qwen3_5 import Qwen35, Qwen35Text
from vlpack.architectures.qwen3_5_moe import Qwen35Moe, Qwen35MoeText
from vlpack.architectures.qwen3_moe import Qwen3Moe
from vlpack.architectures.qwen3_next import Qwen3Next
from vlpack.architectures.qwen3_vl import Qwen3VL
from vlpack.architectures.qwen3_vl_moe import Qwen3VLMoe
from vlpack.architectures.task import with_names_for, yes_no_token_ids
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats import detect, unpacked
from vlpack.errors import CheckpointError
from vlpack.tasks import EMBEDDING, GENERATE, RERANKER

ARCHITECTURES: dict[str, type[Architecture]] = {
    "Qwen3VLForConditionalGeneration": Qwen3VL,
    "Qwen3VLMoeForConditionalGeneration": Qwen3VLMoe,
    "Qwen2_5_VLForConditionalGeneration": Qwen25VL,
    "Qwen2VLForConditionalGeneration": Qwen2VL,
    "Qwen3_5ForConditionalGeneration": Qwen35,
    "Qwen3_5ForCausalLM": Qwen35Text,
    "Qwen3_5MoeForConditionalGeneration": Qwen35Moe,
    "Qwen3_5MoeForCausalLM": Qwen35MoeText,
    "Qwen3NextForCausalLM": Qwen3Next,
    "Qwen3ForCausalLM": Qwen3,
    "Qwen3MoeForCausalLM": Qwen3Moe,
    "Qwen2ForCausalLM": Qwen2,
    "LlamaForCausalLM": Llama,
}
"""Maps a name in config.json's ``architectures`` to the class that builds it. A new family adds one line here."""

HEADLESS = {
    "Qwen3VLModel": "Qwen3VLForConditionalGeneration",
    "Qwen3Model": "Qwen3ForCausalLM",
    "Qwen2Model": "Qwen2ForCausalLM",
}
"""Maps the architecture name of a model saved without a head (an embedding model) to the name with a head."""


def architecture_of(checkpoint: Checkpoint, task: str = GENERATE) -> tuple[Architecture, Checkpoint]:
    """The architecture of a checkpoint for a task, and the checkpoint with the tensor names that it expects.

    The given checkpoint is not changed; the returned one reads the same open files. A quantized checkpoint comes back
    as one that presents its weights dequantized (`vlpack.checkpoint.formats`).

    Raises:
        CheckpointError: the checkpoint is not supported, its config is not usable, or it lacks tensors or tokens that
            the task needs.
    """
    architecture = read_settings(checkpoint, task)
    architecture.task = task
    checkpoint = unpacked(checkpoint)
    named = with_names_for(architecture, checkpoint, task)
    if task == RERANKER:
        architecture.yes_no_ids = yes_no_token_ids(named)
    architecture.observe(named.tensors)
    return architecture, named


def read_settings(checkpoint: Checkpoint, task: str | None = None) -> Architecture:
    """The architecture that config.json describes; no weights are needed.

    Args:
        checkpoint: the checkpoint, perhaps without weights (`Checkpoint.open_settings`).
        task: the task that the package is built for; None if it is not known yet.

    Raises:
        CheckpointError: the checkpoint is not supported or already quantized, or its config is not usable.
    """
    name = checkpoint.architecture
    family = ARCHITECTURES.get(HEADLESS.get(name, name))
    if family is None:
        raise CheckpointError(
            f"{checkpoint.place}: the architecture {name} is not supported.",
            "Supported: " + ", ".join(sorted(ARCHITECTURES)) + ".",
        )
    detect(checkpoint)  # raises for a quantized checkpoint that cannot be read
    architecture = family(checkpoint.config)
    offered = (EMBEDDING,) if name in HEADLESS else family.tasks
    if task is not None and task not in offered:
        raise CheckpointError(
            f"{checkpoint.place}: {name} is not offered for the task {task}.",
            f"It is offered for {' and '.join(offered)}.",
        )
    refuse_bidirectional(checkpoint)
    return architecture


def refuse_bidirectional(checkpoint: Checkpoint) -> None:
    """Refuse a model whose tokens attend to later tokens, because vlpack's attention is causal.

    transformers computes such attention for ``is_causal: false``; embedding models may do so by code of their own.

    Raises:
        CheckpointError: the config asks for bidirectional attention.
    """
    marks = {"is_causal": False, "use_bidirectional_attention": True, "bidirectional": True}
    nested = checkpoint.config.get("text_config")
    for where, config in (("", checkpoint.config), (": text_config", nested if isinstance(nested, dict) else {})):
        for name, mark in marks.items():
            if bool(config.get(name, not mark)) is mark:
                raise CheckpointError(
                    f"{checkpoint.folder / 'config.json'}{where}: {name} is {str(mark).lower()}, which is not "
                    "supported: vlpack's attention is causal."
                )


def described() -> list[dict[str, str]]:
    """A description for people of every supported architecture: one dictionary for each entry of the registry."""
    return [
        {
            "architecture": name,
            "models": family.models,
            "tasks": ", ".join(family.tasks),
            "parts": "vision, embedding, decoder" if family.sees() else "text",
            "runs as": family.genai_type,
            "providers": ", ".join(family.providers),
            "needs": family.needs,
        }
        for name, family in ARCHITECTURES.items()
    ]


__all__ = ["ARCHITECTURES", "Architecture", "Part", "architecture_of", "described"]
