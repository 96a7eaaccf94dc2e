"""Rows of an input: their ids, the messages that are made of them, and the rows of the output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

from vlpack.bulk.media import Given, held
from vlpack.bulk.question import Question
from vlpack.errors import InputError, VlpackError, option
from vlpack.preprocess import VideoOptions, normalize_messages
from vlpack.preprocess.messages import IMAGE_KEYS

RESULT = (
    "answer",
    "finish_reason",
    "prompt_tokens",
    "image_tokens",
    "answer_tokens",
    "prepare_seconds",
    "first_token_seconds",
    "decode_seconds",
    "error",
)
"""Columns that an answer adds to the columns of the input."""


@dataclass(frozen=True)
class Item:
    """A row of the input.

    Args:
        columns: names and values of its columns, as JSON-like data and bytes.
        where: place of the row in the input, for messages.
        key: id of the row, such as the path of its file; None if a column or the content is the id.
        images: images that are not in a column.
        videos: videos that are not in a column.
        error: reason why the row cannot be used; None if it can.
    """

    columns: dict[str, Any]
    where: str
    key: str | None = None
    images: Sequence[Given] = ()
    videos: Sequence[Given] = ()
    error: VlpackError | None = None


Mark: TypeAlias = "tuple[int, int]"
"""The place of a row in a portion of the input, from which reading can begin."""


class Portion(Protocol):
    """The interface of a portion of an input, such as a file, which can be read in any process."""

    def read(self, start: Mark = (0, 0)) -> Iterator[tuple[Mark, Item]]:
        """Iterates over the rows from a mark on, each with its own mark.

        Raises:
            InputError: the portion cannot be read.
        """
        ...

    def column(self, name: str) -> tuple[list[Any], int] | None:
        """All values of a column, and the mean size of a row in bytes; None if that needs all columns to be read."""
        ...


@dataclass(frozen=True)
class Task:
    """A row with its id, ready to be answered.

    Args:
        place: place of the row among those that are in no shard, from 0.
        key: id of the row.
        item: the row.
    """

    place: int
    key: str
    item: Item


class Asked(NamedTuple):
    """The conversation that is made of a row.

    Attributes:
        messages: conversation whose image and video parts have no sources.
        images: images of the conversation, in order.
        videos: videos of the conversation, in order, with their own options.
    """

    messages: list[dict[str, Any]]
    images: list[Given]
    videos: list[tuple[Given, VideoOptions | None]]


@dataclass
class Ids:
    """A function that gives every row an id: its key, or a hash of its content and of the question.

    Rows with the same content get the same hash followed by a number, ``…-2`` for the second one. If two rows have the
    same key, the second one gets an error.

    Args:
        column: column with the keys; rows without this column get a hash.
        question: the question, as JSON-like data.
    """

    column: str
    question: Mapping[str, Any]
    _seen: set[bytes] = field(default_factory=set)
    _numbers: dict[bytes, int] = field(default_factory=dict)

    def __call__(self, item: Item) -> tuple[str, Item]:
        """The id of the next row, and the row itself, with an error if an earlier row had the same key."""
        name, keyed = self.name(item)
        number = self.number(name)
        return numbered(name, number), self.checked(item, name, keyed, number)

    def name(self, item: Item) -> tuple[str, bool]:
        """The id of a row without the number that makes it unique, and whether it is a key, and not a hash."""
        given = item.columns.get(self.column) if item.key is None else item.key
        return (self._hash(item) if given in (None, "") else self.key_name(given)), given is not None

    @staticmethod
    def key_name(given: Any) -> str:
        """The id of a row with a key in the column with the ids, which is not empty."""
        return valid_text(given if isinstance(given, str) else json.dumps(given, default=_hashed))

    def number(self, name: str) -> int:
        """The number that makes the name of the next row unique: 1 if no earlier row has it."""
        first = short_hash(name)
        number = 1
        if first in self._seen:  # the numbers up to the last one are taken
            number = self._numbers.get(first, 1) + 1
            while short_hash(numbered(name, number)) in self._seen:
                number += 1
            self._numbers[first] = number
        self._seen.add(short_hash(numbered(name, number)))
        return number

    def checked(self, item: Item, name: str, keyed: bool, number: int) -> Item:
        """A row with an error if an earlier row had the same key; otherwise the row itself."""
        if not keyed or number == 1 or item.error is not None:
            return item
        wrong = InputError(
            f"An earlier row has the same {self.column}, {name[:200]!r}.",
            f"Give every row its own, or choose another column with {option('id_column')}.",
        )
        return replace(item, error=wrong)

    def _hash(self, item: Item) -> str:
        content = json.dumps([item.columns, self.question], sort_keys=True, default=_hashed)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def numbered(name: str, number: int) -> str:
    """An id that is made unique by a number."""
    return name if number == 1 else f"{name}-{number}"


def short_hash(key: str) -> bytes:
    """A hash of an id in 16 bytes, so that many ids take little memory."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def valid_text(text: str) -> str:
    """A text that UTF-8 can represent: halves of surrogate pairs, as in odd file names, become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _hashed(value: Any) -> Any:
    """Bytes as an object with their hash, for `json.dumps`."""
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    raise TypeError(f"a row cannot hold a value of the type {type(value).__name__}")


def asked(item: Item, question: Question) -> Asked:
    """Makes the conversation of a row.

    Raises:
        InputError: the row has no question, or its columns contradict each other or have wrong types.
    """
    if item.error is not None:
        raise item.error
    columns = item.columns
    images = [*item.images, *_sources(columns, question.image_column, ("image", "images", "file_name"), "image")]
    videos = [*item.videos, *_sources(columns, None, ("video", "videos"), "video")]
    if columns.get("messages") is not None:
        return _conversation(columns["messages"], images, videos, question)
    text = _text(columns, question)
    seen = [*({"type": "image"} for _ in images), *({"type": "video"} for _ in videos)]
    messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}] if question.system else []
    messages.append({"role": "user", "content": [*seen, {"type": "text", "text": text}] if seen else text})
    return Asked(messages, images, [(video, None) for video in videos])


def _text(columns: Mapping[str, Any], question: Question) -> str:
    """The question about a row: the filled template, the row's own prompt, or the prompt for all rows."""
    if question.template is not None:
        return question.filled(columns)
    text = columns.get("prompt")
    if text is None:
        text = question.prompt
    if text is None:
        raise InputError(
            "The row has neither messages nor a prompt.",
            f"Ask the same about all rows with {option('prompt')}, or fill in columns with {option('template')}.",
        )
    if not isinstance(text, str) or not text.strip():
        raise InputError("The row's prompt must be a text that is not empty.")
    return text


def _sources(columns: Mapping[str, Any], chosen: str | None, names: Sequence[str], what: str) -> list[Given]:
    """The images or videos in the columns of a row.

    Args:
        columns: columns of the row.
        chosen: column that the user has chosen; None for the usual ones.
        names: the usual columns, of which a row may have one.
        what: ``image`` or ``video``.
    """
    if chosen is not None:
        if chosen not in columns:
            raise InputError(f"The row has no column {chosen!r}, which {option('image_column')} names.")
        given = [chosen]
    else:
        given = [name for name in names if columns.get(name) is not None]
    if len(given) > 1:
        raise InputError(f"The row has both {given[0]!r} and {given[1]!r}.", "Keep one of them.")
    if not given:
        return []
    value = columns[given[0]]
    found = [held(one, what) for one in (value if isinstance(value, list) else [value])]
    return [one for one in found if one is not None]


def _conversation(given: Any, images: list[Given], videos: list[Given], question: Question) -> Asked:
    """The conversation of a row's ``messages``, whose images and videos may be in its parts or in columns."""
    if question.template is not None:
        raise InputError(f"The row has messages, so {option('template')} cannot be used.", "Leave one of them out.")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise InputError("The row's messages are a text that is not JSON.") from None
    whole = normalize_messages([_whole(message) for message in given] if isinstance(given, list) else given)
    messages = [_bare(message) for message in whole.messages]
    if question.system and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": question.system})
    return Asked(
        messages,
        _filled([held(one) for one in whole.images], images, "image"),
        list(
            zip(
                _filled([held(video.source, "video") for video in whole.videos], videos, "video"),
                [video.options for video in whole.videos],
                strict=True,
            )
        ),
    )


def _whole(message: Any) -> Any:
    """A copy of a message without the null fields that Parquet adds to parts, and with base64 as ``data:`` URIs."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        if isinstance(part, Mapping):
            known = {name: value for name, value in part.items() if value is not None}
            if isinstance(known.get("base64"), str):
                known["url"] = f"data:;base64,{known.pop('base64')}"
            parts.append(known)
        else:
            parts.append(part)
    return {**message, "content": parts}


def _bare(message: dict[str, Any]) -> dict[str, Any]:
    """A copy of a message whose image parts have no sources."""
    if not isinstance(message.get("content"), list):
        return message
    parts = [
        {name: value for name, value in part.items() if name not in IMAGE_KEYS} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _filled(parts: list[Given | None], given: list[Given], what: str) -> list[Given]:
    """The sources of all image or video parts; parts without a source get those of the columns, in order."""
    bare = sum(part is None for part in parts)
    if bare != len(given):
        raise InputError(
            f"The row's messages have {bare} {what} parts without a source, but its columns have {len(given)} {what}s.",
            f'Write {{"type": "{what}"}} for each of them.',
        )
    rest = iter(given)
    return [next(rest) if part is None else part for part in parts]


def finished(key: str, item: Item, result: Mapping[str, Any], id_column: str) -> dict[str, Any]:
    """Makes a row of the output: its id, the columns of the input, and those of the answer.

    A column of the input that has the name of an output column gets the prefix ``input_``.

    Args:
        key: id of the row.
        item: the row.
        result: columns of the answer; those that are missing become None.
        id_column: column of the input with the ids.
    """
    made: dict[str, Any] = {"id": key}
    for name, value in item.columns.items():
        if name == "id" == id_column and value == key:
            continue
        shown = name
        while shown in ("id", *RESULT) or (shown != name and shown in item.columns):
            shown = f"input_{shown}"
        made[shown] = value
    return made | {name: result.get(name) for name in RESULT}
