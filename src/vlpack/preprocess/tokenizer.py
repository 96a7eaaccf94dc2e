"""The tokenizer of a checkpoint: text to token ids, and token ids to text, all at once or as they arrive."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from itertools import pairwise

import tokenizers

from vlpack.errors import CheckpointError, InputError, option
from vlpack.preprocess.settings_folder import SettingsFolder
from vlpack.preprocess.tokenizer_bounds import check_file, growth_of

MAX_CHARACTERS = 2**28
"""Maximum characters into which a tokenizer's rules may expand a text; real tokenizers expand it a few times."""

MAX_BYTES = 100_000_000
"""Maximum size of a tokenizer.json, in bytes; those of the largest vocabularies have some ten megabytes."""


def _is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of the Rust library, whose class is not an `Exception` and cannot be imported."""
    return type(error).__name__ == "PanicException"


class Tokenizer:
    """A tokenizer without the truncation and padding that its tokenizer.json may ask for.

    Args:
        tokenizer: tokenizer of the `tokenizers` library.
        where: name of the tokenizer's file, for error messages.
        growth: maximum characters that its rules make of one character, from `growth_of`.
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
        except BaseException as error:  # the library raises bare Exceptions and panics
            if isinstance(error, Exception) or _is_panic(error):
                raise CheckpointError(f"{file} is not a usable tokenizer: {error}.") from error
            raise
        return cls(tokenizer, str(file), growth_of(tokenizer, str(file)))

    def encode(self, text: str | Sequence[str], *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. Special tokens written in it become their ids.

        Args:
            text: any text; or the pieces of a text, which are encoded one by one, so that no token crosses their
                borders.
            add_special_tokens: whether to add the special tokens that the tokenizer puts around a text. The prompts of
                embedding models end with one.

        Raises:
            InputError: the text is not valid Unicode, or so long that the tokenizer's rules could fill the memory.
            CheckpointError: the tokenizer fails on the text.
        """
        pieces = [text] if isinstance(text, str) else list(text)
        self._check_length(sum(map(len, pieces)))
        whole: str | list[str] = pieces[0] if len(pieces) == 1 else pieces
        try:
            ids: list[int] = self._tokenizer.encode(
                whole, is_pretokenized=len(pieces) != 1, add_special_tokens=add_special_tokens
            ).ids
        except (TypeError, UnicodeError) as error:  # the text has lone surrogates
            raise InputError(f"The prompt is not valid Unicode text: {error}.") from error
        except BaseException as error:
            if isinstance(error, Exception) or _is_panic(error):
                raise CheckpointError(f"{self.where} fails on a text: {error}.") from error
            raise
        return ids

    def control_places(self, text: str, keep: Collection[str] = ()) -> list[int]:
        """The places at which to cut a text so that no piece contains a control token: one inside each such token.

        Control tokens are the tokenizer's added tokens.

        Args:
            text: any text.
            keep: control tokens that may stay whole.

        Raises:
            InputError: no cut separates a control token of the text, because it is a single character or because the
                tokenizer's normalizer makes it from other characters.
        """
        self._check_length(len(text))
        added = [token for token in self._tokenizer.get_added_tokens_decoder().values() if token.content not in keep]
        longer = [re.escape(token.content) for token in added if len(token.content) > 1]
        # a lookahead also finds tokens that overlap
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
                f"A text contains {bad!r}, or characters from which the tokenizer makes it; with this tokenizer it "
                "cannot be encoded as plain text.",
                f"Remove it, or do without {option('special_tokens', 'text')}.",
            )
        return places

    def _check_length(self, length: int) -> None:
        if length > self._longest:
            raise InputError(
                f"The text has {length} characters; with this tokenizer no more than {self._longest} are accepted.",
                "No supported model has a context for so much text: shorten it.",
            )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not valid UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A new decoder for token ids that arrive one by one."""
        return TextStream(self, skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token; None if the vocabulary does not have it."""
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def token(self, token_id: int) -> str | None:
        """The token with an id; None if the vocabulary does not have it."""
        text: str | None = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return text

    def is_added_token(self, token_id: int) -> bool:
        """Whether an id belongs to an added token; text is split at added tokens before anything else is done."""
        return token_id in self._tokenizer.get_added_tokens_decoder()


class TextStream:
    """Decodes token ids one by one. The joined pieces equal the text of all ids decoded at once.

    A character whose bytes are spread over several tokens is held back until its last byte has arrived. The class
    DecodeStream of tokenizers is not used because it cannot flush and does not exist before version 0.21.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # ids of the last finished piece, as context, and the ids since
        self._context = 0  # number of context ids
        self._emitted = 0  # characters of the text of `_ids` that were returned

    def push(self, token_id: int) -> str:
        """Adds an id and returns the text that it completes, which may be empty."""
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        # A trailing U+FFFD may be the first bytes of a character; an earlier one is final.
        end = len(text) - text.endswith("�")
        piece = text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        if piece and end == len(text):
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._emitted = len(self._tokenizer.decode(self._ids, skip_special_tokens=self._skip))
        return piece

    def flush(self) -> str:
        """Returns the text that was held back, and resets the stream."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        piece = text[self._emitted :]
        self._ids, self._context, self._emitted = [], 0, 0
        return piece
