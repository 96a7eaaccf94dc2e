"""onnxruntime_genai builder's ``--extra_options KEY=VALUE``: those that mean something here, and errors for the rest."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vlpack.errors import OptionError


@dataclass(frozen=True)
class ExtraOptions:
    """What the builder's extra options choose; names and defaults as there, but for ``prune_lm_head`` (true here).

    Args:
        block_size: of int4 weights: 16, 32, 64, 128 or 256.
        is_symmetric: int4 without zero points.
        accuracy_level: of MatMulNBits on the CPU: 1 or 2 fp32 or fp16 activations, 4 8-bit ones.
        algo_config: rounding method: ``default`` or ``rtn``.
        matmul_mixed_precision: ``last_matmul`` (the head) and ``mixed_layers`` → ``int4`` or ``int8``.
        exclude_embeds: with ``--part text``: the decoder takes ``inputs_embeds``.
        prune_lm_head: only the last token's logits.
        shared_embeddings: a tied embedding and head are stored once.
        filename: of the decoder's graph.
        hf_token: Hub token; ``False`` sends none, None the one that is stored.
    """

    block_size: int = 32
    is_symmetric: bool = True
    accuracy_level: int = 4
    algo_config: str = "default"
    matmul_mixed_precision: Mapping[str, str] = field(default_factory=dict)
    exclude_embeds: bool = False
    prune_lm_head: bool = True
    shared_embeddings: bool = True
    filename: str | None = None
    hf_token: str | bool | None = None


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
        mixed[selector] = kind
    return mixed


def _filename(key: str, value: str) -> str:
    if not value.endswith(".onnx") or set(value) & set("/\\:\0") or value.startswith("."):
        raise OptionError(f"extra option {key}={value}: it must be a plain file name that ends in .onnx.")
    return value


def _token(key: str, value: str) -> str | bool:
    return False if value.lower() in ("false", "0") else value


_PARSERS: Mapping[str, Callable[[str, str], Any]] = {
    "block_size": _one_of(16, 32, 64, 128, 256),
    "is_symmetric": _boolean,
    "accuracy_level": _one_of(1, 2, 3, 4),
    "algo_config": _one_of("default", "rtn"),
    "matmul_mixed_precision": _mixed,
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
