"""A checkpoint's tokenizer: text to token ids, and ids back to text all at once or as they arrive."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from itertools import pairwise

import tokenizers

from vlpack.errors import CheckpointError, InputError
from vlpack.preprocess.settings_folder import SettingsFolder
from vlpack.preprocess.tokenizer_bounds import check_file, growth_of

MAX_CHARACTERS = 2**28
"""Most characters that a tokenizer's rules may make of a text; real ones make at most a few times as many as it has."""

MAX_BYTES = 100_000_000
"""Largest tokenizer.json that is read; those of the largest vocabularies have some ten megabytes."""


def _is_panic(error: BaseException) -> bool:
    """Whether the Rust library gave up; its exception is no `Exception` and has no name that could be imported."""
    return type(error).__name__ == "PanicException"


class Tokenizer:
    """tokenizers.Tokenizer without the truncation and padding that a tokenizer.json may carry.

    Args:
        tokenizer: as made by `tokenizers`.
        where: the file it came from, for error messages.
        growth: characters that its rules may make of one; see `growth_of`.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, where: str = "tokenizer.json", growth: float = 1.0) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.where = where
        self._longest = int(MAX_CHARACTERS / growth)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str] | SettingsFolder) -> Tokenizer:
        """Reads tokenizer.json; CheckpointError if it is missing or damaged."""
        root, name = SettingsFolder.of(folder), "tokenizer.json"
        if not root.has(name):
            slow = all(map(root.has, ("vocab.json", "merges.txt")))
            found = "; vocab.json and merges.txt alone are not read" if slow else ""
            raise CheckpointError(
                f"{folder} has no tokenizer.json{found}.",
                hint="Make it with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder).",
            )
        data, file = root.data(name, MAX_BYTES), root / name
        check_file(data, str(file))
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except BaseException as error:  # tokenizers raises bare Exception, and panics
            if isinstance(error, Exception) or _is_panic(error):
                raise CheckpointError(f"{file} is not a usable tokenizer: {error}.") from error
            raise
        return cls(tokenizer, str(file), growth_of(tokenizer, str(file)))

    def encode(self, text: str | Sequence[str], *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. Special tokens written in it become their ids.

        Args:
            text: any; or the pieces of one, each of which is encoded by itself, so that no token crosses their borders.
            add_special_tokens: also add those that the tokenizer has around a text; embedding models end with one.

        Raises:
            InputError: the text is not valid Unicode, or so long that the tokenizer's rules could fill the memory.
            CheckpointError: the tokenizer fails on it.
        """
        pieces = [text] if isinstance(text, str) else list(text)
        self._check_length(sum(map(len, pieces)))
        whole: str | list[str] = pieces[0] if len(pieces) == 1 else pieces
        try:
            ids: list[int] = self._tokenizer.encode(
                whole, is_pretokenized=len(pieces) != 1, add_special_tokens=add_special_tokens
            ).ids
        except (TypeError, UnicodeError) as error:  # lone surrogates
            raise InputError(f"The prompt is not valid Unicode text: {error}.") from error
        except BaseException as error:
            if isinstance(error, Exception) or _is_panic(error):
                raise CheckpointError(f"{self.where} fails on a text: {error}.") from error
            raise
        return ids

    def control_places(self, text: str, keep: Collection[str] = ()) -> list[int]:
        """Where to cut a text so that none of its pieces holds a control token (an added token): within each of them.

        Args:
            text: any.
            keep: control tokens that may stay whole.

        Raises:
            InputError: no cut helps with this tokenizer, whose normalizer makes a control token of other characters or
                which has one of a single character.
        """
        self._check_length(len(text))
        added = [token for token in self._tokenizer.get_added_tokens_decoder().values() if token.content not in keep]
        longer = [re.escape(token.content) for token in added if len(token.content) > 1]
        # a look ahead finds those that overlap, too
        places = [found.start() + 1 for found in re.finditer(f"(?={'|'.join(longer)})", text)] if longer else []
        whole = [token.content for token in added if len(token.content) == 1 and token.special]
        normalizer, normalized = self._tokenizer.normalizer, [token.content for token in added if token.normalized]
        if normalizer is not None and normalized:
            edges = [0, *places, len(text)]
            made = [normalizer.normalize_str(text[a:b]) for a, b in pairwise(edges)]
            text += "".join(made)
            whole += [token for token in map(normalizer.normalize_str, normalized) if any(token in one for one in made)]
        if bad := next((token for token in whole if token and token in text), None):
            raise InputError(
                f"A text has {bad!r}, or what the tokenizer makes that of, which cannot be encoded as plain text.",
                "Leave it away, or take special tokens as control tokens.",
            )
        return places

    def _check_length(self, length: int) -> None:
        if length > self._longest:
            raise InputError(
                f"The text has {length} characters; with this tokenizer no more than {self._longest} are taken.",
                "No supported model has a context for so much text: give less.",
            )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for ids that arrive one by one."""
        return TextStream(self, skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Id of a token, None if there is none."""
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def token(self, token_id: int) -> str | None:
        """Token with an id, None if there is none."""
        text: str | None = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return text

    def is_added_token(self, token_id: int) -> bool:
        """Whether an id is an added token, which text is split at before anything else happens to it."""
        return token_id in self._tokenizer.get_added_tokens_decoder()


class TextStream:
    """Decodes ids one by one; the pieces joined equal decoding all ids at once.

    A character whose bytes are spread over several tokens is held back until its last byte has come. Written here
    rather than taken from tokenizers (DecodeStream) because that has no flush and is missing before 0.21.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # the last finished piece, as context, and what came since
        self._context = 0  # how many of them are context
        self._emitted = 0  # characters of their text already returned

    def push(self, token_id: int) -> str:
        """The text that one more id completes; often empty."""
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        # A trailing U+FFFD may be the first bytes of a character; an earlier one cannot change any more.
        end = len(text) - text.endswith("�")
        piece = text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        if piece and end == len(text):
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._emitted = len(self._tokenizer.decode(self._ids, skip_special_tokens=self._skip))
        return piece

    def flush(self) -> str:
        """What was held back, at the end; afterwards the stream is as new."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        piece = text[self._emitted :]
        self._ids, self._context, self._emitted = [], 0, 0
        return piece
