"""onnxruntime_genai builder's ``--extra_options KEY=VALUE``: those with an effect here, and errors for the rest."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlpack.errors import OptionError
from vlpack.precision import BLOCK_SIZES, Policy, QuantizationOptions
from vlpack.storage import Blocks, ChannelInt8, Storage


@dataclass(frozen=True)
class ExtraOptions:
    """What the builder's extra options choose, with its names; None where an option was not given.

    Args:
        block_size: of all weights in blocks: 16, 32, 64, 128 or 256; by default 32, on the CPU 64 for 8-bit weights,
            and 128 for those of int4 packages.
        is_symmetric: weights in blocks without zero points, the default but for those that are calibrated on the CPU.
        accuracy_level: of MatMulNBits on the CPU: 1 to 3 fp32 activations, 4 (the default) 8-bit ones.
        weight_type: of matrices in int8: ``int8`` (the default), or ``uint8`` for x86 processors without VNNI.
        balance: rescale channels so that none is much larger than others, which changes nothing but rounding; by
            default where weights are quantized.
        rotation: mix blocks of channels by a Hadamard matrix, likewise; by default where weights are quantized on the
            CPU.
        algo_config: rounding method: ``default`` and ``rtn`` to the nearest; ``rtn_last`` also has an 8-bit head.
        matmul_mixed_precision: ``last_matmul`` (the head) and ``mixed_layers`` → ``int4`` or ``int8``;
            ``mixed_layers:int4`` is 4 bits in all layers.
        exclude_embeds: with ``--part text``: the decoder takes ``inputs_embeds``.
        kv_cache: ``int8``: keys and values in 8 bits, for long contexts on the CPU; in fp32 or fp16 without it.
        prune_lm_head: only the last token's logits; the default here, unlike there.
        shared_embeddings: a tied embedding and head are stored once, the default.
        filename: of the decoder's graph.
        hf_token: Hub token; ``False`` sends none, ``True`` the stored one and asks for one to be there, None
            the stored one if there is one.
    """

    block_size: int | None = None
    is_symmetric: bool | None = None
    accuracy_level: int | None = None
    weight_type: str | None = None
    balance: bool | None = None
    rotation: bool | None = None
    algo_config: str | None = None
    matmul_mixed_precision: Mapping[str, str] | None = None
    kv_cache: str | None = None
    exclude_embeds: bool | None = None
    prune_lm_head: bool | None = None
    shared_embeddings: bool | None = None
    filename: str | None = None
    hf_token: str | bool | None = None

    def __post_init__(self) -> None:
        for name, parse in _PARSERS.items():
            value = getattr(self, name)
            if isinstance(value, Mapping):
                parse(name, ",".join(f"{selector}:{kind}" for selector, kind in value.items()))
            elif value is not None:
                parse(name, str(value))

    def quantization(self, vision: str | None = None, *, calibrated: bool = False) -> QuantizationOptions:
        """What a policy is made with."""
        mixed = {"last_matmul": "int8"} if self.algo_config == "rtn_last" else {}
        given: dict[str, Any] = {
            "block_size": self.block_size,
            "is_symmetric": self.is_symmetric,
            "accuracy_level": self.accuracy_level,
            "weight_type": self.weight_type,
            "mixed": {**mixed, **(self.matmul_mixed_precision or {})},
            "vision": vision,
            "kv_cache": self.kv_cache,
            "calibrated": calibrated,
            "balance": self.balance,
            "rotation": self.rotation,
        }
        return replace(QuantizationOptions(), **{name: value for name, value in given.items() if value is not None})


_PARTS = {
    "all": ("text.embedding", "text.head", "text.linear", "vision.linear"),
    "text": ("text.embedding", "text.head", "text.linear"),
    "vision": ("vision.linear",),
    "embedding": ("text.embedding",),
}
"""The roles of the weights in each part, as far as options go."""


def check_effects(extra: ExtraOptions, part: str, policy: Policy, vision: str | None) -> None:
    """Every option that was given changes something in this package.

    Args:
        extra: the options.
        part: which of the graphs are built.
        policy: their precision.
        vision: the vision encoder's precision, where it was given.

    Raises:
        OptionError: one does not, with the reason.
    """
    roles = [role for role in _PARTS[part] if not (role == "text.embedding" and extra.exclude_embeds)]
    if extra.exclude_embeds is not None and part != "text":
        raise OptionError("exclude_embeds goes with --part text.", "Elsewhere the embedding is a part of its own.")
    if vision is not None and "vision.linear" not in roles:
        raise OptionError(f"--vision-precision has no effect with --part {part}, which has no vision encoder.")
    for name in ("matmul_mixed_precision", "prune_lm_head", "filename", "kv_cache"):
        if getattr(extra, name) is not None and "text.linear" not in roles:
            raise OptionError(f"{name} is an option of the decoder, which --part {part} does not build.")
    if extra.balance is not None and part == "embedding":
        raise OptionError("balance has no effect with --part embedding.", "It is for parts that multiply matrices.")
    if extra.kv_cache is not None and (policy.provider != "cpu" or policy.dtype != "float32"):
        raise OptionError(
            f"kv_cache=int8 cannot be had with precision {policy.precision} for {policy.provider}: onnxruntime has "
            "such a cache beside fp32 activations on the CPU only.",
            "Choose fp32, int8 or int4 for the CPU.",
        )
    if extra.shared_embeddings is not None and not {"text.embedding", "text.head"} <= set(roles):
        raise OptionError(
            "shared_embeddings has no effect on a package that does not hold both the embedding and the head."
        )
    if extra.filename and part == "all" and extra.filename.lower() in ("vision.onnx", "embedding.onnx"):
        raise OptionError(f"filename={extra.filename} is the name of another part's graph.", "Choose another one.")
    _check_quantization(extra, part, policy, {role: policy.storage(role) for role in roles})


def _check_quantization(extra: ExtraOptions, part: str, policy: Policy, storages: Mapping[str, Storage]) -> None:
    blocks = {role: storage for role, storage in storages.items() if isinstance(storage, Blocks)}
    where = f"with precision {policy.precision} for {policy.provider} and --part {part}"
    for name in ("block_size", "is_symmetric", "algo_config"):
        if getattr(extra, name) is not None and not blocks:
            raise OptionError(
                f"{name} has no effect {where}: no weight is stored in blocks.",
                "Leave it away, or build with --precision int4.",
            )
    multiplied = [
        storage for role, storage in blocks.items() if role != "text.embedding" and storage.dtype == "float32"
    ]
    if extra.accuracy_level is not None and not multiplied:
        raise OptionError(
            f"accuracy_level has no effect {where}.", "It is for weights in blocks that the CPU multiplies."
        )
    if extra.weight_type is not None and not any(isinstance(storage, ChannelInt8) for storage in storages.values()):
        raise OptionError(f"weight_type has no effect {where}: no matrix is stored in int8 per channel.")
    mixed = extra.matmul_mixed_precision or {}
    if extra.algo_config == "rtn_last":
        if policy.precision != "int4" or "text.head" not in storages:
            raise OptionError("algo_config=rtn_last goes with a decoder in int4.")
        if mixed.get("last_matmul") == "int4":
            raise OptionError("algo_config=rtn_last and matmul_mixed_precision=last_matmul:int4 contradict each other.")
    if policy.provider == "dml" and ("int8" in mixed.values() or extra.algo_config == "rtn_last"):
        raise OptionError("DirectML multiplies 4-bit weights only.", "Leave matmul_mixed_precision and rtn_last away.")


def _boolean(key: str, value: str) -> bool:
    if value.lower() in ("true", "1"):
        return True
    if value.lower() in ("false", "0"):
        return False
    raise OptionError(f"extra option {key}={value}: it must be true or false.")


def _one_of(*choices: Any) -> Callable[[str, str], Any]:
    def parse(key: str, value: str) -> Any:
        for choice in choices:
            if value == str(choice):
                return choice
        raise OptionError(f"extra option {key}={value}: it must be one of {', '.join(map(str, choices))}.")

    return parse


def _mixed(key: str, value: str) -> dict[str, str]:
    mixed = {}
    for pair in value.split(","):
        selector, _, kind = pair.partition(":")
        if selector not in ("last_matmul", "mixed_layers") or kind not in ("int4", "int8"):
            raise OptionError(
                f"extra option {key}={value}: '{pair}' is not a selector:type pair.",
                "Selectors are last_matmul and mixed_layers, types int4 and int8.",
            )
        if selector in mixed:
            raise OptionError(f"extra option {key}={value}: {selector} is given twice.")
        mixed[selector] = kind
    return mixed


def _filename(key: str, value: str) -> str:
    if not value.endswith(".onnx") or set(value) & set('/\\:*?"<>|') or value[0] == "." or not value.isprintable():
        raise OptionError(f"extra option {key}={value}: it must be a plain file name that ends in .onnx.")
    return value


def _token(key: str, value: str) -> str | bool:
    if not value:
        raise OptionError(f"extra option {key} is empty.", "Give a token, or false to send none.")
    if value.lower() in ("true", "1"):
        return True
    return False if value.lower() in ("false", "0") else value


_PARSERS: Mapping[str, Callable[[str, str], Any]] = {
    "block_size": _one_of(*BLOCK_SIZES),
    "is_symmetric": _boolean,
    "accuracy_level": _one_of(1, 2, 3, 4),
    "weight_type": _one_of("int8", "uint8"),
    "balance": _boolean,
    "rotation": _boolean,
    "algo_config": _one_of("default", "rtn", "rtn_last"),
    "matmul_mixed_precision": _mixed,
    "kv_cache": _one_of("int8"),
    "exclude_embeds": _boolean,
    "prune_lm_head": _boolean,
    "shared_embeddings": _boolean,
    "filename": _filename,
    "hf_token": _token,
}

_RENAMED = {
    "int4_block_size": "block_size",
    "int4_is_symmetric": "is_symmetric",
    "int4_accuracy_level": "accuracy_level",
    "int4_algo_config": "algo_config",
}
"""The builder's former names, which it still takes."""


def parse_extra_options(pairs: Iterable[str]) -> ExtraOptions:
    """``KEY=VALUE`` strings as options.

    Raises:
        OptionError: a key is unknown (the nearest one is named), is given twice, or its value is not one of its kind.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"extra option '{pair}' is not of the form KEY=VALUE.")
        key = _RENAMED.get(key, key)
        if key not in _PARSERS:
            nearest = difflib.get_close_matches(key, _PARSERS, 1, 0.5)
            hint = f"Did you mean {nearest[0]}? " if nearest else ""
            raise OptionError(f"Unknown extra option '{key}'.", f"{hint}vlpack has: {', '.join(sorted(_PARSERS))}.")
        if key in values:
            raise OptionError(f"extra option {key} is given twice.")
        values[key] = _PARSERS[key](key, value)
    return replace(ExtraOptions(), **values)
