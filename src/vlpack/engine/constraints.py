"""Constrained decoding: answers that match a JSON schema, a regular expression, a grammar or a list of choices.

llguidance (an optional dependency) parses the answer token by token and computes the mask of allowed next tokens.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.errors import OptionError, PackageError, option

_COUNTS = {f"{limit}{what}" for limit in ("min", "max") for what in ("Items", "Length", "Properties")}


@dataclass(frozen=True)
class Grammar:
    """A grammar that an answer must match.

    Args:
        kind: name of the option that gave it, such as ``schema``.
        text: the grammar in llguidance's format.
        model: pydantic class into which the answer is parsed; None if there is none.
    """

    kind: str
    text: str
    model: Any = None

    @property
    def is_json(self) -> bool:
        """Whether answers that match the grammar are JSON."""
        return self.kind == "schema"

    def parse(self, text: str) -> Any:
        """Parses a whole answer that is JSON into an object of the pydantic class, or else into JSON's own types."""
        if self.model is not None:
            return self.model.model_validate_json(text)
        return json.loads(text)


def grammar_of(
    *,
    schema: Mapping[str, Any] | bool | type | None = None,
    regex: str | None = None,
    lark: str | None = None,
    choices: Sequence[str] | None = None,
) -> Grammar | None:
    """The grammar described by whichever of these options is given; None if none is.

    Args:
        schema: JSON schema, or class with pydantic's ``model_json_schema``.
        regex: regular expression that the whole answer matches, in the syntax of Rust's regex crate.
        lark: grammar in llguidance's dialect of Lark.
        choices: texts of which the answer is one.

    Raises:
        OptionError: several options are given, one has a wrong type, or llguidance is not installed.
    """
    options = {"schema": schema, "regex": regex, "lark": lark, "choices": choices}
    given = [name for name, value in options.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise OptionError(
            f"{' and '.join(map(option, given))} are both given; an answer obeys one of them.", "Give one of them."
        )
    matcher = _llguidance().LLMatcher
    for name, text in (("regex", regex), ("lark", lark)):
        if text is not None and (not isinstance(text, str) or not text):
            raise OptionError(f"{option(name)} is {text!r}; it must be a text that is not empty.")
    if regex is not None:
        return Grammar("regex", matcher.grammar_from_regex(regex))
    if lark is not None:
        return Grammar("lark", matcher.grammar_from_lark(lark))
    if choices is not None:
        if isinstance(choices, str) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise OptionError(f"{option('choices')} is {choices!r}; it must be a list of texts that are not empty.")
        pattern = "|".join(re.sub(r"[^\w ]", lambda found: _literal(found[0]), choice) for choice in choices)
        return Grammar("choices", matcher.grammar_from_regex(f"({pattern})"))
    model = schema if hasattr(schema, "model_json_schema") else None
    plain = schema if model is None else model.model_json_schema()
    if not isinstance(plain, (Mapping, bool)):
        raise OptionError(
            f"{option('schema')} is {schema!r}; it must be a JSON schema or a pydantic class.", "A dict, for example."
        )
    if plain is False:
        raise OptionError(f"{option('schema')} is false, which no answer obeys.")
    try:
        text = json.dumps(_whole_counts({} if plain is True else plain))
    except (TypeError, ValueError) as error:
        raise OptionError(f"{option('schema')} is not JSON: {error}.") from None
    # if white space between values were allowed, a model could fill the answer with it
    return Grammar("schema", matcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False}), model)


class Grammars:
    """Makes constraints for the vocabulary of a package.

    llguidance's tokenizer is made for the first constrained request only, because this takes about a second.

    Args:
        tokenizer: path of the package's tokenizer.json.
        vocab_size: number of logits.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, ends: set[int]) -> None:
        self._path, self._size, self._ends = tokenizer, vocab_size, sorted(ends)
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def constraint(self, grammar: Grammar) -> Constraint:
        """A constraint for one new answer.

        Raises:
            OptionError: llguidance rejects the grammar.
            PackageError: llguidance rejects the package's tokenizer.
        """
        module = _llguidance()
        with self._lock:
            if self._tokenizer is None:
                try:
                    text = self._path.read_text(encoding="utf-8")
                    self._tokenizer = module.LLTokenizer(text, n_vocab=self._size, eos_token=self._ends)
                except Exception as error:  # ValueError if the tokenizer is not supported, OSError
                    raise PackageError(f"llguidance does not take {self._path}: {str(error)[:300]}") from None
        matcher = module.LLMatcher(self._tokenizer, grammar.text, log_level=0)
        if matcher.is_error():
            raise OptionError(f"{option(grammar.kind)} is not usable: {_reason(matcher)}")
        return Constraint(matcher, grammar, self._size)


class Constraint:
    """The state of one answer in its grammar.

    Attributes:
        grammar: grammar that the answer must match.
    """

    def __init__(self, matcher: Any, grammar: Grammar, vocab_size: int) -> None:
        self.grammar, self._matcher, self._size = grammar, matcher, vocab_size

    def allowed(self) -> npt.NDArray[np.bool_]:
        """The mask of tokens that may come next, bool ``[V]``.

        Raises:
            OptionError: the grammar is too complex for llguidance's limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little", count=self._size).astype(np.bool_)

    def forced(self) -> list[int]:
        """The next tokens that the grammar forces; the model may still choose other tokens for the same text."""
        return list(self._matcher.compute_ff_tokens())

    def valid(self, tokens: list[int]) -> list[int]:
        """The longest prefix of ``tokens`` that the grammar allows next."""
        return tokens[: self._matcher.validate_tokens(tokens)] if tokens else tokens

    def push(self, token: int) -> bool:
        """Adds a token to the answer; returns whether only an end token could follow."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    @property
    def complete(self) -> bool:
        """Whether the answer matches the grammar if it ends here."""
        return bool(self._matcher.is_accepting())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OptionError(f"{option(self.grammar.kind)} cannot be followed further: {_reason(self._matcher)}")


def _whole_counts(schema: Any) -> Any:
    """Replaces counts such as 2.0 by 2 in a schema: JSON schemas treat them as equal, but llguidance rejects 2.0."""
    if isinstance(schema, Mapping):
        return {
            key: int(value)
            if key in _COUNTS and isinstance(value, float) and value.is_integer()
            else _whole_counts(value)
            for key, value in schema.items()
        }
    return [_whole_counts(value) for value in schema] if isinstance(schema, list) else schema


def _literal(character: str) -> str:
    return f"\\x{{{ord(character):x}}}"


def _reason(matcher: Any) -> str:
    """The error that llguidance reports, on one line."""
    return " ".join(matcher.get_error().split())[:300]


def _llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise OptionError(
            "Constrained answers need llguidance, which is not installed.", "pip install 'vlpack[engine]'"
        ) from None
    return llguidance
