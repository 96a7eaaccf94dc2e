"""The supported model families: one file each, and the registry that finds them."""

from __future__ import annotations

from vlpack.architectures.base import Architecture
from vlpack.architectures.llama import Llama
from vlpack.architectures.ports import Part
from vlpack.architectures.qwen2 import Qwen2
from vlpack.architectures.qwen2_5_vl import Qwen25VL
from vlpack.architectures.qwen2_vl import Qwen2VL
from vlpack.architectures.qwen3 import Qwen3
from vlpack.architectures.qwen3_moe import Qwen3Moe
from vlpack.architectures.qwen3_vl import Qwen3VL
from vlpack.architectures.qwen3_vl_moe import Qwen3VLMoe
from vlpack.architectures.task import answer_ids, with_names_for
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.quantized import refuse_quantized
from vlpack.errors import CheckpointError
from vlpack.tasks import EMBEDDING, GENERATE, RERANKER

ARCHITECTURES: dict[str, type[Architecture]] = {
    "Qwen3VLForConditionalGeneration": Qwen3VL,
    "Qwen3VLMoeForConditionalGeneration": Qwen3VLMoe,
    "Qwen2_5_VLForConditionalGeneration": Qwen25VL,
    "Qwen2VLForConditionalGeneration": Qwen2VL,
    "Qwen3ForCausalLM": Qwen3,
    "Qwen3MoeForCausalLM": Qwen3Moe,
    "Qwen2ForCausalLM": Qwen2,
    "LlamaForCausalLM": Llama,
}
"""Name in config.json's ``architectures`` → the class that builds it. A new family is one line here."""

HEADLESS = {
    "Qwen3VLModel": "Qwen3VLForConditionalGeneration",
    "Qwen3Model": "Qwen3ForCausalLM",
    "Qwen2Model": "Qwen2ForCausalLM",
}
"""What embedding models are called that were saved without a head → what they are called with one."""


def architecture_of(checkpoint: Checkpoint, task: str = GENERATE) -> tuple[Architecture, Checkpoint]:
    """The architecture of a checkpoint for a task, and the checkpoint with the tensor names that it expects.

    The checkpoint that is given stays as it is; the one that is returned reads the same open files.

    Raises:
        CheckpointError: it is not supported, its config is not usable, or it lacks what the task needs.
    """
    architecture = read_settings(checkpoint, task)
    architecture.task = task
    named = with_names_for(architecture, checkpoint, task)
    if task == RERANKER:
        architecture.answers = answer_ids(named)
    architecture.observe(named.tensors)
    return architecture, named


def read_settings(checkpoint: Checkpoint, task: str | None = None) -> Architecture:
    """The architecture as config.json describes it, for which no weights need be there.

    Args:
        checkpoint: perhaps without weights (`Checkpoint.open_settings`).
        task: what it is to be for; None where that is not known yet.

    Raises:
        CheckpointError: it is not supported, quantized already, or its config is not usable.
    """
    name = checkpoint.architecture
    family = ARCHITECTURES.get(HEADLESS.get(name, name))
    if family is None:
        raise CheckpointError(
            f"{checkpoint.folder}: the architecture {name} is not supported.",
            "Supported: " + ", ".join(sorted(ARCHITECTURES)) + ".",
        )
    refuse_quantized(checkpoint)
    architecture = family(checkpoint.config)
    offered = (EMBEDDING,) if name in HEADLESS else family.tasks
    if task is not None and task not in offered:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is not offered for the task {task}.",
            f"Offered for {' and '.join(offered)}.",
        )
    refuse_bidirectional(checkpoint)
    return architecture


def refuse_bidirectional(checkpoint: Checkpoint) -> None:
    """Some models of these architectures let tokens see what follows them: transformers does at ``is_causal: false``,
    and embedding models may by code of their own.

    Raises:
        CheckpointError: the config says so.
    """
    marks = {"is_causal": False, "use_bidirectional_attention": True, "bidirectional": True}
    nested = checkpoint.config.get("text_config")
    for where, config in (("", checkpoint.config), (": text_config", nested if isinstance(nested, dict) else {})):
        for name, mark in marks.items():
            if bool(config.get(name, not mark)) is mark:
                raise CheckpointError(
                    f"{checkpoint.folder / 'config.json'}{where}: {name} is {str(mark).lower()}; vlpack's attention is "
                    "causal."
                )


def described() -> list[dict[str, str]]:
    """What is supported, for people: an entry for each architecture of the registry."""
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
