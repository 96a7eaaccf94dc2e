"""The tokenizer in a GGUF file's metadata, as tokenizer.json and tokenizer_config.json of a Hugging Face checkpoint.

Byte-level BPE is read, with the rules of pre-tokenization that the metadata names. Control tokens and user-defined
tokens become added tokens. Unused tokens, which fill the vocabulary up to the size of the embedding, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlpack.checkpoint.config import Section
from vlpack.checkpoint.files import quote
from vlpack.errors import CheckpointError

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2, _LLAMA3 = _PATTERN.format(digits=""), _PATTERN.format(digits="{1,3}")
"""Regular expressions of pre-tokenization, which differ in the number of digits that stay together."""
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Numbers of the kinds of tokens in the metadata."""
ENDS = ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
"""Control tokens that end an answer in addition to those that the metadata names, as in llama.cpp."""
OWN = (
    "Put the tokenizer.json and tokenizer_config.json of the original model into one folder with the GGUF file, and "
    "give the folder."
)
"""Hint of errors about a tokenizer that is not read."""


@dataclass(frozen=True)
class Rules:
    """The rules of a kind of tokenizer.

    Args:
        pieces: pre-tokenizers of tokenizer.json, which split a text before byte-level BPE.
        nfc: whether a text is normalized (NFC) first.
        whole: whether a piece that is a token is not split further (``ignore_merges``).
        name: class of the tokenizer in transformers.
        begins: whether a BOS token is put before a text if the metadata does not say so.
    """

    pieces: tuple[dict[str, Any], ...]
    nfc: bool = False
    whole: bool = False
    name: str = "PreTrainedTokenizerFast"
    begins: bool = False


def _split(pattern: str) -> dict[str, Any]:
    """A pre-tokenizer that splits a text at the matches of a regular expression."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(*, regex: bool) -> dict[str, Any]:
    """The byte-level pre-tokenizer or post-processor; with ``regex``, it also splits a text as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


_LLAMA_RULES = Rules((_split(_LLAMA3), _bytes(regex=False)), whole=True, begins=True)
RULES = {
    "qwen2": Rules((_split(_QWEN2), _bytes(regex=False)), nfc=True, name="Qwen2Tokenizer"),
    "llama-bpe": _LLAMA_RULES,
    "llama3": _LLAMA_RULES,
    "llama-v3": _LLAMA_RULES,
    "smollm": Rules(({"type": "Digits", "individual_digits": True}, _bytes(regex=True))),
    "gpt-2": Rules((_bytes(regex=True),)),
}
"""Rules by their names in the metadata (``tokenizer.ggml.pre``)."""


def tokenizer_files(metadata: Section, vocabulary: int, length: int, *, settings_only: bool) -> dict[str, bytes]:
    """The files of the tokenizer that the metadata describes, by name.

    Args:
        metadata: the metadata of the file.
        vocabulary: number of rows of the token embedding.
        length: largest number of tokens of a text.
        settings_only: whether tokenizer.json is left out, because another one is used.

    Returns:
        tokenizer.json, tokenizer_config.json and generation_config.json; none if the metadata has no tokenizer.

    Raises:
        CheckpointError: the tokenizer is of a kind that is not read, or damaged.
    """
    kind = metadata.values.get("tokenizer.ggml.model")
    if kind in (None, "no_vocab"):
        return {}
    tokens = _strings(metadata, "tokens")
    if len(tokens) > vocabulary:
        raise CheckpointError(
            f"{metadata.where}: there are {len(tokens)} tokens, but the embedding has {vocabulary} rows."
        )
    kinds = _kinds(metadata, len(tokens))
    files: dict[str, Any] = {"generation_config.json": _generation(metadata, tokens, kinds)}
    pre = metadata.values.get("tokenizer.ggml.pre", "")
    rules = RULES.get(pre) if isinstance(pre, str) and kind == "gpt2" else None
    if rules is None and not settings_only:
        raise CheckpointError(
            f"{metadata.where}: the tokenizer is of the kind {quote(kind)}, {quote(pre)}, which is not read; kinds "
            f"that are: gpt2 with {', '.join(RULES)}.",
            OWN,
        )
    added = [
        _added(token, number, kinds[number]) for number, token in enumerate(tokens) if kinds[number] in (CONTROL, USER)
    ]
    files["tokenizer_config.json"] = _config(metadata, rules, tokens, added, length)
    if rules is not None and not settings_only:
        files["tokenizer.json"] = _tokenizer(metadata, rules, tokens, kinds, added)
    return {name: json.dumps(value, ensure_ascii=False).encode() for name, value in files.items()}


def _strings(metadata: Section, name: str) -> list[str]:
    """A list of strings among the tokenizer's settings, not empty."""
    values = metadata.values.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not values or not all(isinstance(one, str) for one in values):
        raise CheckpointError(f"{metadata.where}: 'tokenizer.ggml.{name}' must be a list of strings.")
    return values


def _kinds(metadata: Section, count: int) -> list[int]:
    """The kind of each token; all are normal if the metadata has none."""
    kinds = metadata.values.get("tokenizer.ggml.token_type") or [NORMAL] * count
    if not isinstance(kinds, list) or len(kinds) != count or not set(kinds) <= set(range(7)):
        raise CheckpointError(
            f"{metadata.where}: 'tokenizer.ggml.token_type' must have the kind of each of {count} tokens."
        )
    return kinds


def _token_id(metadata: Section, name: str, count: int) -> int | None:
    """The id of a named token, such as ``eos``; None if the metadata does not name it."""
    key = f"tokenizer.ggml.{name}_token_id"
    return metadata.integer(key, low=0, high=count - 1) if key in metadata else None


def _generation(metadata: Section, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """The ids of the tokens that begin and end an answer."""
    named = {name: _token_id(metadata, name, len(tokens)) for name in ("eos", "eot", "eom", "bos", "padding")}
    ends = [number for name in ("eos", "eot", "eom") if (number := named[name]) is not None]
    ends += [number for number, token in enumerate(tokens) if kinds[number] == CONTROL and token in ENDS]
    config = {"eos_token_id": list(dict.fromkeys(ends)), "bos_token_id": named["bos"], "pad_token_id": named["padding"]}
    return {name: value for name, value in config.items() if value not in (None, [])}


def _added(token: str, number: int, kind: int) -> dict[str, Any]:
    """The entry of an added token in tokenizer.json."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **plain, "special": kind == CONTROL}


def _affixes(metadata: Section, rules: Rules, count: int) -> tuple[list[int], list[int]]:
    """The ids of the tokens that are put before and after a text."""
    ends: list[list[int]] = []
    for name, default in (("bos", rules.begins), ("eos", False)):
        number = _token_id(metadata, name, count)
        ends.append(
            [number] if number is not None and metadata.flag(f"tokenizer.ggml.add_{name}_token", default) else []
        )
    return ends[0], ends[1]


def _config(
    metadata: Section, rules: Rules | None, tokens: Sequence[str], added: Sequence[dict[str, Any]], length: int
) -> dict[str, Any]:
    """The contents of tokenizer_config.json; ``rules`` are None if another tokenizer.json is used."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if rules is None else rules.name,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "unk_token": None,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = _token_id(metadata, key, len(tokens))
        config[f"{name}_token"] = None if number is None else tokens[number]
    if rules is not None:
        before, after = _affixes(metadata, rules, len(tokens))
        config |= {"add_bos_token": bool(before), "add_eos_token": bool(after)}
        config["added_tokens_decoder"] = {
            str(one["id"]): {name: value for name, value in one.items() if name != "id"} for one in added
        }
    template = metadata.values.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise CheckpointError(f"{metadata.where}: 'tokenizer.chat_template' must be a string.")
        config["chat_template"] = template
    return config


def _tokenizer(
    metadata: Section, rules: Rules, tokens: Sequence[str], kinds: Sequence[int], added: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The contents of tokenizer.json.

    Raises:
        CheckpointError: two tokens are equal, a token is empty, or a merge has no tokens.
    """
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if kinds[number] == UNUSED:
            continue
        if token in vocabulary or not token:
            what = (
                f"the tokens {vocabulary[token]} and {number} are both {quote(token)}" if token else "a token is empty"
            )
            raise CheckpointError(f"{metadata.where}: {what}.", OWN)
        vocabulary[token] = number
    merges = []
    for merge in _strings(metadata, "merges"):
        first, _, second = merge.partition(" ")
        if not {first, second, first + second} <= vocabulary.keys():
            raise CheckpointError(
                f"{metadata.where}: the merge {quote(merge)} is not of two tokens to a third one.", OWN
            )
        merges.append([first, second])
    before, after = _affixes(metadata, rules, len(tokens))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": {"type": "NFC"} if rules.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(rules.pieces)},
        "post_processor": _template(tokens, before, after) if before or after else _bytes(regex=False),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rules.whole,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _template(tokens: Sequence[str], before: Sequence[int], after: Sequence[int]) -> dict[str, Any]:
    """The post-processor that puts tokens before and after a text, or before and after each of two texts."""

    def special(numbers: Sequence[int], text: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": tokens[number], "type_id": text}} for number in numbers]

    def around(name: str, text: int) -> list[dict[str, Any]]:
        return [*special(before, text), {"Sequence": {"id": name, "type_id": text}}, *special(after, text)]

    used = {tokens[number]: number for number in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in used.items()},
    }
