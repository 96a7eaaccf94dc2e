"""The extra options of a build, named as in onnxruntime-genai's builder (``--extra_options KEY=VALUE``), and checks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlpack.errors import OptionError, option
from vlpack.quantize.policy import BLOCK_SIZES, Policy, QuantizationOptions
from vlpack.quantize.storage import Blocks, ChannelInt8, Storage
from vlpack.tasks import AUTO, GENERATE


@dataclass(frozen=True)
class ExtraOptions:
    """Extra options of a build, with the names of onnxruntime-genai's builder; None for an option that is not given.

    Args:
        block_size: block size of all weights that are quantized in blocks: 16, 32, 64, 128 or 256. The default is 32;
            on the CPU it is 64 for 8-bit and for calibrated weights, and 128 for these in int4 packages.
        is_symmetric: whether weights in blocks are stored without zero points; true by default, except for calibrated
            weights on the CPU.
        accuracy_level: accuracy level of MatMulNBits on the CPU: 1 to 3 for fp32 activations, 4 (the default) for 8-bit
            activations.
        weight_type: type of matrices in int8: ``int8`` (the default), or ``uint8`` for x86 processors without VNNI.
        balance: whether channels are rescaled so that none is much larger than others, which affects only rounding. The
            default is true where weights are quantized.
        rotation: whether blocks of channels are mixed by a Hadamard matrix, which affects only rounding. The default is
            true where weights are quantized on the CPU.
        algo_config: rounding method: ``default`` and ``rtn`` round to the nearest; ``rtn_last`` does too and stores the
            head in 8 bits.
        matmul_mixed_precision: precision of some matrices: ``last_matmul`` (the head) or ``mixed_layers`` → ``int4`` or
            ``int8``; ``mixed_layers:int4`` means 4 bits in all layers.
        kv_cache: ``int8`` for a key/value cache in 8 bits, for long contexts on the CPU; by default it is in fp32 or
            fp16.
        exclude_embeds: whether the decoder takes ``inputs_embeds`` instead of token ids, when ``part`` is ``text``.
        prune_lm_head: whether the decoder computes logits for the last token only; true by default, unlike in
            onnxruntime-genai's builder.
        shared_embeddings: whether a tied embedding and head are stored once; true by default.
        filename: file name of the decoder's graph.
        hf_token: Hub token; ``False`` sends none, ``True`` sends the stored one and fails without one, None sends the
            stored one if there is one.
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

    def quantization(
        self, vision: str | None = None, *, calibrated: bool = False, head: str | None = None
    ) -> QuantizationOptions:
        """The quantization options from which a precision policy is made.

        Args:
            vision: precision of the vision encoder; None if it was not given.
            calibrated: whether the build calibrates the weights.
            head: precision of the head if these options do not choose it, ``int4`` or ``int8``; None for the policy's
                own default.
        """
        mixed = {} if head is None else {"last_matmul": head}
        mixed |= {"last_matmul": "int8"} if self.algo_config == "rtn_last" else {}
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
"""Roles of the weights in each part, as far as options affect them."""


def check_effects(extra: ExtraOptions, part: str, policy: Policy, vision: str | None) -> None:
    """Checks that every given option has an effect on this package.

    Args:
        extra: the extra options.
        part: the part of the package that is built, or all.
        policy: the precision policy.
        vision: precision of the vision encoder; None if it was not given.

    Raises:
        OptionError: an option has no effect; the message has the reason.
    """
    roles = [role for role in _PARTS[part] if not (role == "text.embedding" and extra.exclude_embeds)]
    if extra.exclude_embeds is not None and part != "text":
        raise OptionError(
            f"{option('extra.exclude_embeds')} needs {option('part', 'text')}.",
            "In other packages the embedding is always a graph of its own.",
        )
    if vision is not None and "vision.linear" not in roles:
        raise OptionError(
            f"{option('vision_precision')} has no effect with {option('part', part)}, which has no vision encoder."
        )
    for name in ("matmul_mixed_precision", "prune_lm_head", "filename", "kv_cache"):
        if getattr(extra, name) is not None and "text.linear" not in roles:
            raise OptionError(
                f"{option(f'extra.{name}')} is an option of the decoder, which {option('part', part)} does not build."
            )
    if extra.balance is not None and part == "embedding":
        raise OptionError(
            f"{option('extra.balance')} has no effect with {option('part', 'embedding')}.",
            "It applies to parts that multiply matrices.",
        )
    if extra.kv_cache is not None and (policy.provider != "cpu" or policy.dtype != "float32"):
        raise OptionError(
            f"{option('extra.kv_cache', 'int8')} is not available with precision {policy.precision} for "
            f"{policy.provider}: onnxruntime supports such a cache only with fp32 activations on the CPU.",
            "Choose the precision fp32, int8 or int4 for the CPU.",
        )
    if extra.shared_embeddings is not None and not {"text.embedding", "text.head"} <= set(roles):
        raise OptionError(
            f"{option('extra.shared_embeddings')} has no effect on a package without both the embedding and the head."
        )
    if extra.filename and part == "all" and extra.filename.lower() in ("vision.onnx", "embedding.onnx"):
        raise OptionError(
            f"{option('extra.filename', extra.filename)} is the name of another part's graph.", "Choose another name."
        )
    _check_quantization(extra, part, policy, {role: policy.storage(role) for role in roles})


def check_task_options(extra: ExtraOptions, task: str, precision: str) -> None:
    """Checks that every given option has an effect on a package for ``task``.

    Raises:
        OptionError: an option has no effect. An embedding model or reranker has no head over the vocabulary and no
            cache, and its first part always takes token ids.
    """
    if task in (GENERATE, AUTO):
        return
    if extra.kv_cache is not None:
        raise OptionError(
            f"{option('extra.kv_cache')} has no effect on a model for the task {task}, which keeps no cache."
        )
    for name in ("prune_lm_head", "exclude_embeds", "shared_embeddings"):
        if getattr(extra, name) is not None:
            raise OptionError(
                f"{option(f'extra.{name}')} has no effect on a model for the task {task}: it has no head over the "
                "vocabulary."
                if name != "exclude_embeds"
                else f"{option('extra.exclude_embeds')} is for models that generate; this model is for the task {task}."
            )
    if extra.algo_config == "rtn_last" or "last_matmul" in (extra.matmul_mixed_precision or {}):
        raise OptionError(
            f"rtn_last and last_matmul set the head's precision; a model for the task {task} has no head over the "
            "vocabulary."
        )
    if extra.accuracy_level is not None and precision != "int4":
        raise OptionError(
            f"{option('extra.accuracy_level')} has no effect with precision {precision} on a model for the task {task}."
        )


def _check_quantization(extra: ExtraOptions, part: str, policy: Policy, storages: Mapping[str, Storage]) -> None:
    blocks = {role: storage for role, storage in storages.items() if isinstance(storage, Blocks)}
    where = f"with precision {policy.precision} for {policy.provider} and {option('part', part)}"
    for name in ("block_size", "is_symmetric", "algo_config"):
        if getattr(extra, name) is not None and not blocks:
            raise OptionError(
                f"{option(f'extra.{name}')} has no effect {where}: no weight is stored in blocks.",
                f"Leave it out, or build with {option('precision', 'int4')}.",
            )
    multiplied = [
        storage for role, storage in blocks.items() if role != "text.embedding" and storage.dtype == "float32"
    ]
    if extra.accuracy_level is not None and not multiplied:
        raise OptionError(
            f"{option('extra.accuracy_level')} has no effect {where}.",
            "It applies to weights in blocks that the CPU multiplies.",
        )
    if extra.weight_type is not None and not any(isinstance(storage, ChannelInt8) for storage in storages.values()):
        raise OptionError(
            f"{option('extra.weight_type')} has no effect {where}: no matrix is stored in int8 per channel."
        )
    mixed = extra.matmul_mixed_precision or {}
    if extra.algo_config == "rtn_last":
        if policy.precision != "int4" or "text.head" not in storages:
            raise OptionError(f"{option('extra.algo_config', 'rtn_last')} needs a decoder in int4.")
        if mixed.get("last_matmul") == "int4":
            raise OptionError(
                f"{option('extra.algo_config', 'rtn_last')} stores the head in int8 and "
                f"{option('extra.matmul_mixed_precision')} in int4: they contradict each other."
            )
    if policy.provider == "dml" and ("int8" in mixed.values() or extra.algo_config == "rtn_last"):
        raise OptionError(
            "DirectML supports only 4-bit weights in blocks.",
            f"Leave out {option('extra.matmul_mixed_precision')} and rtn_last.",
        )


def _boolean(key: str, value: str) -> bool:
    if value.lower() in ("true", "1"):
        return True
    if value.lower() in ("false", "0"):
        return False
    raise OptionError(f"Extra option {key}={value}: it must be true or false.")


def _one_of(*choices: Any) -> Callable[[str, str], Any]:
    def parse(key: str, value: str) -> Any:
        for choice in choices:
            if value == str(choice):
                return choice
        raise OptionError(f"Extra option {key}={value}: it must be one of {', '.join(map(str, choices))}.")

    return parse


def _mixed(key: str, value: str) -> dict[str, str]:
    mixed = {}
    for pair in value.split(","):
        selector, _, kind = pair.partition(":")
        if selector not in ("last_matmul", "mixed_layers") or kind not in ("int4", "int8"):
            raise OptionError(
                f"Extra option {key}={value}: '{pair}' is not a selector:type pair.",
                "Selectors are last_matmul and mixed_layers, types int4 and int8.",
            )
        if selector in mixed:
            raise OptionError(f"Extra option {key}={value}: {selector} is given twice.")
        mixed[selector] = kind
    return mixed


def _filename(key: str, value: str) -> str:
    if not value.endswith(".onnx") or set(value) & set('/\\:*?"<>|') or value[0] == "." or not value.isprintable():
        raise OptionError(f"Extra option {key}={value}: it must be a plain file name that ends in .onnx.")
    return value


def _token(key: str, value: str) -> str | bool:
    if not value:
        raise OptionError(f"Extra option {key} is empty.", "Give a token, or false to send none.")
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
"""Former names of extra options in onnxruntime-genai's builder, which it still accepts."""


def parse_extra_options(pairs: Iterable[str]) -> ExtraOptions:
    """Parses ``KEY=VALUE`` strings.

    Raises:
        OptionError: a key is unknown (the hint names the nearest one) or given twice, or a value is not valid for it.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"Extra option '{pair}' is not of the form KEY=VALUE.")
        key = _RENAMED.get(key, key)
        if key not in _PARSERS:
            nearest = difflib.get_close_matches(key, _PARSERS, 1, 0.5)
            hint = f"Did you mean {nearest[0]}? " if nearest else ""
            raise OptionError(f"Unknown extra option '{key}'.", f"{hint}vlpack has: {', '.join(sorted(_PARSERS))}.")
        if key in values:
            raise OptionError(f"Extra option {key} is given twice.")
        values[key] = _PARSERS[key](key, value)
    return replace(ExtraOptions(), **values)
