"""Bounds how much longer the rules of an untrusted tokenizer.json can make a text.

The rules run inside the tokenizers library, where nothing can stop them, and forty rules that replace ``a`` by ``aa``
make 2⁴⁰ characters of one. The library applies the rules to the file's own added tokens when it reads the file, so they
are checked before that.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from vlpack.checkpoint.files import parse_json, quote
from vlpack.errors import CheckpointError

MAX_GROWTH = 64
"""Maximum characters that all rules of a tokenizer together may make of one character. Qwen's rules make up to 4, since
each byte of a character becomes a character; SentencePiece's tables make up to 18 of a ligature."""

MAX_AFFIX = 64
"""Maximum characters of a prefix or suffix of subwords, which may be added to every character of a text."""


def check_file(data: bytes, where: str) -> None:
    """Checks the rules of a tokenizer.json if the library would run them on added tokens while it reads the file.

    Args:
        data: bytes of the tokenizer.json.
        where: name of the file, for error messages.

    Raises:
        CheckpointError: the file is not a JSON object, has rules that vlpack does not know, or its rules make more than
            `MAX_GROWTH` characters of one.
    """
    if _normalizes_tokens(data):
        values = parse_json(data, where, strict=True)  # strict: refuses duplicate keys
        model = values.get("model")
        _growth(values, [model.get(name) for name in _AFFIXES] if isinstance(model, dict) else [], where)


def growth_of(tokenizer: tokenizers.Tokenizer, where: str) -> float:
    """Maximum characters that the rules of a loaded tokenizer make of one character of a text; at least 1.

    Args:
        tokenizer: tokenizer of the `tokenizers` library.
        where: name of the tokenizer's file, for error messages.

    Raises:
        CheckpointError: vlpack does not know one of the rules, or the result is above `MAX_GROWTH`.
    """
    rules = {name: getattr(tokenizer, name) for name in _KINDS}
    values = {name: None if rule is None else json.loads(rule.__getstate__()) for name, rule in rules.items()}
    return _growth(values, [getattr(tokenizer.model, name, None) for name in _AFFIXES], where)


def _growth(values: Mapping[str, Any], affixes: Sequence[Any], where: str) -> float:
    try:
        before, pieces, copies, after = (
            _product(values.get(name), inner, known) for name, (inner, known) in _KINDS.items()
        )
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not a usable tokenizer: {type(error).__name__} in its rules.") from None
    growth = max(before * pieces * copies, after)
    if growth > MAX_GROWTH or any(affix is not None and len(affix) > MAX_AFFIX for affix in affixes):
        raise CheckpointError(
            f"{where} has rules that make more than {MAX_GROWTH} characters of one, which could fill the memory.",
            "No real tokenizer does so: check where the checkpoint comes from.",
        )
    return growth


def _normalizes_tokens(data: bytes) -> bool:
    """Whether the file may have an added token that the library normalizes while reading (``"normalized": true``).

    Parsing 12 MB of JSON takes half a second, so this only scans for ``true`` and checks that each one is the value of
    a setting known to be harmless. If this is uncertain, the result is True.
    """
    place = data.find(b"true")
    while place >= 0:
        end = place + 4
        within_text = data[place - 1 : place] not in _BEFORE or data[end : end + 1] not in _AFTER
        if not within_text and not _HARMLESS.search(data, max(0, place - 64), place):
            return True
        place = data.find(b"true", end)
    return False


_BEFORE, _AFTER = (frozenset(bytes([c]) for c in marks) for marks in (b" \t\r\n:,[", b" \t\r\n,]}"))
_HARMLESS = re.compile(
    rb'"(?:special|single_word|lstrip|rstrip|add_prefix_space|trim_offsets|use_regex|invert|individual_digits|'
    rb'byte_fallback|ignore_merges|fuse_unk|split|cleanup)"\s*:\s*\Z'
)

_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")

Growth = Callable[[Mapping[str, Any]], float]
"""A function that gives the growth of a rule: the maximum characters that the rule makes of one."""


def _product(rules: Any, inner: str, known: Mapping[str, Growth]) -> float:
    """The growth of rules that are applied one after another: the product of their growths."""
    product = 1.0
    for rule in _flat(rules, inner):
        kind = rule["type"]
        if kind not in known:
            raise CheckpointError(f"The tokenizer has the rule {quote(kind)}, which vlpack does not know.")
        product = min(product * known[kind](rule), 1e9)
    return product


def _flat(rules: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """Yields the rules in order, with nested sequences flattened; ``inner`` is the key of a sequence's rules."""
    if rules is None:
        return
    if rules["type"] == "Sequence":
        for rule in rules[inner]:
            yield from _flat(rule, inner)
    else:
        yield rules


def _one(rule: Mapping[str, Any]) -> float:
    return 1.0


def _replace(rule: Mapping[str, Any]) -> float:
    """The growth of a replacement.

    A literal pattern of n characters matches at most once per n characters; a regular expression may match the empty
    text everywhere.
    """
    content, pattern = len(rule["content"]), rule["pattern"]
    if isinstance(pattern, Mapping):
        literal = pattern.get("String")
        return max(1.0, content / len(literal)) if literal else 1.0 + content
    return max(1.0, content / len(pattern)) if pattern else 1.0 + content


def _prepend(rule: Mapping[str, Any]) -> float:
    return 1.0 + len(rule["prepend"])


def _table(rule: Mapping[str, Any]) -> float:
    """The growth of SentencePiece's table: the longest replacement text in it, at least 18.

    The table has the trie's length in four bytes, the trie, and the replacement texts, each ended by NUL.
    """
    try:
        table = base64.b64decode(rule.get("precompiled_charsmap") or "", validate=True)
    except (binascii.Error, ValueError):
        return math.inf
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return float(max(18, *map(len, texts.split(b"\0"))))


def _template(rule: Mapping[str, Any]) -> float:
    """The growth of a template: how often it repeats a text."""
    counts = [
        sum(piece["Sequence"]["id"] == name for piece in rule[kind] if "Sequence" in piece)
        for kind in ("single", "pair")
        for name in ("A", "B")
    ]
    return float(max(1, *counts))


_BYTES: Growth = lambda rule: 4.0  # noqa: E731 - a character has up to four bytes, and each becomes a character
_NORMALIZERS: Mapping[str, Growth] = {
    **dict.fromkeys(("NFC", "NFD", "Lowercase", "Strip", "StripAccents", "Nmt"), _one),
    # Applying them again changes nothing, so a chain of them expands a text only as much as one does: at most 18 times,
    # for the longest ligature.
    **dict.fromkeys(("NFKC", "NFKD"), _one),
    "BertNormalizer": lambda rule: 3.0,  # spaces around every Chinese character
    "ByteLevel": _BYTES,
    "Replace": _replace,
    "Prepend": _prepend,
    "Precompiled": _table,
}
_PRE_TOKENIZERS: Mapping[str, Growth] = {
    **dict.fromkeys(
        ("BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation", "Split", "UnicodeScripts"),
        _one,
    ),
    **dict.fromkeys(("Whitespace", "WhitespaceSplit"), _one),
    "ByteLevel": _BYTES,
    "Metaspace": lambda rule: 1.0 + len(rule["replacement"]),
}
_DECODERS: Mapping[str, Growth] = {
    **dict.fromkeys(("BPEDecoder", "ByteFallback", "ByteLevel", "CTC"), _one),
    **dict.fromkeys(("Fuse", "Metaspace", "Strip", "WordPiece"), _one),
    "Replace": _replace,
}
_POST_PROCESSORS: Mapping[str, Growth] = {
    **dict.fromkeys(("BertProcessing", "ByteLevel", "RobertaProcessing"), _one),
    "TemplateProcessing": _template,
}
_KINDS: Mapping[str, tuple[str, Mapping[str, Growth]]] = {
    "normalizer": ("normalizers", _NORMALIZERS),
    "pre_tokenizer": ("pretokenizers", _PRE_TOKENIZERS),
    "post_processor": ("processors", _POST_PROCESSORS),
    "decoder": ("decoders", _DECODERS),
}
"""The kinds of rules of a tokenizer: for each the key of the rules in a sequence, and the growth of each known rule."""
