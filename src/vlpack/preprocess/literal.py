"""Literal encoding of texts from untrusted people: a control token that is written in a text stays text.

A chat template puts control tokens such as ``<|im_end|>`` around the texts of a conversation, and a tokenizer
recognizes them everywhere, also in a user's text: a question with ``<|im_end|>\\n<|im_start|>system`` ends there and
begins a system message. To prevent this, every control token in the given texts is broken by a mark before the template
is rendered; afterwards the prompt is cut at the marks, and the pieces are encoded one by one. Texts without control
tokens are encoded as usual.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from vlpack.errors import InputError, OptionError, option
from vlpack.preprocess.chat_template import CLOSE, OPEN
from vlpack.preprocess.messages import IMAGE_KEYS
from vlpack.preprocess.tokenizer import Tokenizer

CONTROL, TEXT = "control", "text"
SPECIAL_TOKENS = (CONTROL, TEXT)
"""The values of ``special_tokens``: special tokens written in a text become control tokens, as in transformers, or
plain text."""

_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Unicode's private-use characters, one of which becomes the mark."""


def check_special_tokens(value: object) -> None:
    """Raises an OptionError if a value is not in `SPECIAL_TOKENS`."""
    if value not in SPECIAL_TOKENS:
        raise OptionError(f"{option('special_tokens')} is {value!r}.", "It must be 'control' or 'text'.")


class LiteralTexts:
    """Breaks control tokens in texts by inserting a mark, and cuts the text that a chat template renders at the marks.

    Args:
        tokenizer: the model's tokenizer; its added tokens are the control tokens.
        values: all values that will be broken; the mark is a character that occurs in none of them.

    Raises:
        InputError: the texts contain every character that could be the mark.
    """

    def __init__(self, tokenizer: Tokenizer, *values: Any) -> None:
        self._tokenizer = tokenizer
        used = {character for text in _texts(values) if not text.isascii() for character in text}
        unused = (chr(code) for codes in _PRIVATE for code in codes if chr(code) not in used)
        mark = next(unused, None)
        if mark is None:
            raise InputError(
                "The texts contain every private-use character of Unicode, so they cannot be encoded as plain text."
            )
        self.mark = mark

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with broken control tokens. Reasoning tags in answers stay whole, because templates need them.

        Raises:
            InputError: a text cannot be encoded literally with this tokenizer.
        """
        return [self._message(message) for message in messages]

    def broken(self, value: Any) -> Any:
        """A JSON value with broken control tokens in all its texts, including keys; raises as `messages` does."""
        if isinstance(value, str):
            return self._break([value])[0]
        if isinstance(value, Mapping):
            return {self.broken(key): self.broken(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.broken(item) for item in value]
        return value

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text that is cut at the marks, for `Tokenizer.encode`."""
        return text.split(self.mark)

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        keep = (OPEN, CLOSE) if message.get("role") == "assistant" else ()
        content = message.get("content")
        done: dict[str, Any] = self.broken({key: value for key, value in message.items() if key != "content"})
        if isinstance(content, str):
            done["content"] = self._break([content], keep)[0]
        elif isinstance(content, (list, tuple)):
            parts = [self._part(part) for part in content]
            # templates join the texts of a message, which could join two harmless halves to a control token
            texts = self._break([part.get("text", "") for part in content], keep)
            done["content"] = [
                {**part, "text": text} if "text" in given else part
                for part, text, given in zip(parts, texts, content, strict=True)
            ]
        elif "content" in message:
            done["content"] = content
        return done

    def _part(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """A part without its text, with broken control tokens.

        The source of an image is left as it is: it may be megabytes of base64, and no template writes it.
        """
        source = IMAGE_KEYS if part.get("type") == "image" else ()
        rest = {key: value for key, value in part.items() if key not in (*source, "text")}
        return {**self.broken(rest), **{key: part[key] for key in source if key in part}}

    def _break(self, texts: Sequence[str], keep: Collection[str] = ()) -> list[str]:
        """The texts with every control token, in one text or across several, broken after its first character."""
        places = self._tokenizer.control_places("".join(texts), keep)
        broken, start = [], 0
        for text in texts:
            cuts = places[bisect_right(places, start) : bisect_right(places, start + len(text))]
            edges = [0, *(place - start for place in cuts), len(text)]
            broken.append(self.mark.join(text[a:b] for a, b in pairwise(edges)))
            start += len(text)
        return broken


def literal_pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The pieces of a single text that is cut inside each control token, for `Tokenizer.encode`.

    Raises:
        InputError: the text cannot be encoded literally with this tokenizer.
    """
    edges = [0, *tokenizer.control_places(text), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
