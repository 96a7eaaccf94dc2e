"""The import of a quantized checkpoint: which matrices keep their codes in a package, and the notes about this."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlpack.architectures.base import Architecture
from vlpack.architectures.ports import GraphOptions
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats import Declared
from vlpack.errors import in_python
from vlpack.export.graph import declare
from vlpack.quantize.kept import as_rule, common_grid, kept_storage
from vlpack.quantize.policy import Policy, layer_and_name
from vlpack.quantize.storage import Blocks, ChannelInt8

OWN_BITS = (4, 8)
"""Numbers of bits of codes that are kept if the user chooses no precision."""
MATRICES_OF_EXPERTS = 2
"""Number of matrices in which a layer's experts are stored: gate and up, and down."""


@dataclass(frozen=True)
class Outcome:
    """The treatment of one quantized matrix: its codes are kept, or it is dequantized and perhaps rounded again.

    Args:
        path: path of the module.
        storage: the storage that keeps its codes; None if it is dequantized.
        why: reason why it is dequantized; empty if its codes are kept.
        rounded: whether the policy's storage for it is quantized, so that a dequantized matrix is rounded again.
    """

    path: str
    storage: Blocks | ChannelInt8 | None
    why: str
    rounded: bool

    @property
    def modules(self) -> str:
        """The path with the number of its layer replaced by ``*``."""
        layer, name = layer_and_name(self.path)
        return self.path if layer is None else f"{self.path[: -len(name) - len(str(layer)) - 1]}*.{name}"


def outcomes(
    architecture: Architecture,
    policy: Policy,
    base: Checkpoint,
    merged: Checkpoint,
    bits: Collection[int],
    given: str = "",
) -> list[Outcome]:
    """Decides for each quantized matrix of a checkpoint whether its codes are kept.

    Args:
        architecture: architecture of the model.
        policy: precision policy without kept matrices.
        base: the quantized checkpoint.
        merged: the same checkpoint with adapters merged; the base itself if there are none.
        bits: numbers of bits that are kept even if the policy gives a matrix another number.
        given: option that asks for other values than the checkpoint's; then no codes are kept. Empty if there is none.
    """
    found: dict[str, Outcome] = {}
    for part in architecture.parts(GraphOptions.of_policy(policy)):
        for weight in declare(part, policy):
            names = [tensor.name for tensor in weight.source.tensors() if base.packed(tensor.name)]
            if not names or weight.path in found:
                continue
            storage, (grid, why) = None, common_grid(weight.source, merged)
            if any(merged.packed(name) is None for name in names):
                why = "an adapter changes it"
            elif grid is not None and given:
                why = f"{given} asks for it"
            elif grid is not None:
                storage, why = kept_storage(grid, weight.cols, weight.storage, weight.role, policy.provider, bits)
            quantized = isinstance(weight.storage, Blocks | ChannelInt8)
            found[weight.path] = Outcome(weight.path, storage, why, quantized)
    return _with_equal_experts(list(found.values()))


def _with_equal_experts(found: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes, changed so that both matrices of a layer's experts have blocks of one size, or neither is kept.

    The kernel needs blocks of one size. A larger block is divided into smaller ones with the same scale, because sizes
    are powers of two.
    """
    layers: dict[str, list[Outcome]] = {}
    for one in found:
        if ".experts." in one.path:
            layers.setdefault(one.path.rpartition(".")[0], []).append(one)
    changed: dict[str, Outcome] = {}
    for pair in layers.values():
        storages = [one.storage for one in pair if isinstance(one.storage, Blocks)]
        fits = len(storages) == MATRICES_OF_EXPERTS and len({storage.bits for storage in storages}) == 1
        size = min((storage.block_size for storage in storages), default=0)
        for one in pair:
            if isinstance(one.storage, Blocks):
                storage = replace(one.storage, block_size=size) if fits else None
                why = "" if fits else "the other matrix of these experts has another grid"
                changed[one.path] = replace(one, storage=storage, why=why)
    return [changed.get(one.path, one) for one in found]


def kept_rules(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The rules of the matrices that keep their codes, for `vlpack.quantize.policy.QuantizationOptions`."""
    groups: dict[tuple[str, Blocks | ChannelInt8], list[int | None]] = {}
    for one in found:
        if one.storage is not None:
            groups.setdefault((one.modules, one.storage), []).append(layer_and_name(one.path)[0])
    return [
        as_rule(modules, None if None in layers else [one for one in layers if one is not None], storage)
        for (modules, storage), layers in groups.items()
    ]


def described(declared: Declared, found: Sequence[Outcome]) -> dict[str, Any]:
    """The import of a quantized checkpoint as JSON-like data: its format, and what was done with each group."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for one in found:
        done = "kept" if one.storage is not None else "rounded again" if one.rounded else "dequantized"
        storage = {} if one.storage is None else {"storage": one.storage.label}
        new = {"modules": one.modules, "count": 0, "done": done, "why": in_python(one.why), **storage}
        groups.setdefault((one.modules, done + one.why + str(storage)), new)["count"] += 1
    return {"format": declared.label, "bits": declared.bits, "groups": list(groups.values())}


def notes(declared: Declared, found: Sequence[Outcome]) -> list[str]:
    """Sentences for the user on how the quantized matrices were stored."""
    kept = [one for one in found if one.storage is not None]
    sentences = [f"The checkpoint is quantized: {declared.label}."]
    if kept:
        all_of = f"All {len(kept)}" if len(kept) == len(found) else f"{len(kept)} of {len(found)}"
        sentences[0] += f" {all_of} quantized matrices of the model keep their codes and scales, without any loss."
    for rounded in (True, False):
        rest = [one for one in found if one.storage is None and one.rounded is rounded]
        reasons: dict[str, list[Outcome]] = {}
        for one in rest:
            reasons.setdefault(one.why, []).append(one)
        for why, some in reasons.items():
            names = list(dict.fromkeys(layer_and_name(one.path)[1] for one in some))
            shown = ", ".join(names[:4]) + (" and others" if len(names) > 4 else "")
            done = "are dequantized and rounded again" if rounded else "are dequantized, exactly"
            sentences.append(f"{len(some)} quantized matrices ({shown}) {done}: {why}.")
    return sentences
