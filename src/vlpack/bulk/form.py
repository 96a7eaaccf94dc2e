"""Forms of rows: how a row becomes a request to the engine, and how its answer becomes a row of the output."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any, Protocol

from vlpack.bulk.media import Given, Media, Place
from vlpack.bulk.question import MAX_TOKENS, Question
from vlpack.bulk.row import Item, Task, asked, finished
from vlpack.bulk.shards import Row
from vlpack.bulk.written import ROWS, Layout
from vlpack.engine import Engine
from vlpack.errors import InputError, OptionError, VlpackError, in_python, option
from vlpack.preprocess import VideoOptions

Words = Callable[[str], str]
"""A function that writes the options in an error message as the caller's interface names them."""


_CUT = {
    "schema": "is not valid JSON",
    "regex": f"may not match {option('regex')} as a whole",
    "choices": "may be no whole choice",
}
"""What is wrong with an answer that was cut off, by the constraint that it had to match."""


class Form(Protocol):
    """The interface of a form of rows.

    Attributes:
        layout: what the output needs to know about its rows.
        id_column: column of the input with the ids.
    """

    layout: Layout
    id_column: str

    def begin(self, engine: Engine, item: Item) -> Callable[[], Row]:
        """Makes the prompt of a row and submits it to the engine; blocks while images are decoded.

        Returns:
            A function that waits for the answer and returns its columns.

        Raises:
            VlpackError: the row cannot be answered.
        """
        ...

    def area(self, item: Item) -> int:
        """The total area of a row's images in pixels; 0 if there are none, or if it is not known."""
        ...

    def row(self, task: Task, result: Row) -> Row:
        """The row of the output for an answer."""
        ...

    def failed(self, task: Task, error: Exception) -> Row:
        """The row of the output for a row that cannot be answered."""
        ...

    def tokens(self, row: Row) -> int:
        """The number of tokens of the answer in a row of the output."""
        ...


class Rows:
    """The form of rows with images, videos, a prompt or messages, and any other columns.

    Args:
        question: what is asked about every row.
        place: where the files of rows are.
        words: function that writes options in errors.
    """

    layout = ROWS

    def __init__(self, question: Question, place: Place, words: Words = in_python) -> None:
        self.id_column = question.id_column or "id"
        self._question, self._media, self._words = question, Media(place), words
        self._options: dict[str, Any] = {
            "max_tokens": question.max_tokens or MAX_TOKENS,
            "sampling": question.sampling,
            **question.constraint,
        }

    def begin(self, engine: Engine, item: Item) -> Callable[[], Row]:
        """Makes the prompt of a row and submits it, as `Form` specifies."""
        question, began = self._question, time.perf_counter()
        ask = asked(item, question)
        if ask.images or ask.videos:
            engine.prompts.check_takes(images=bool(ask.images), videos=bool(ask.videos))
        variables: dict[str, Any] = {"special_tokens": question.special_tokens}
        if question.constraint and "enable_thinking" in engine.prompts.chat_template.source:
            variables["enable_thinking"] = False  # a constraint leaves no place for reasoning
        prompt = engine.prompt(
            ask.messages,
            [engine.prompts.processed_image(self._media.image(given)) for given in ask.images],  # type: ignore[misc]
            [self._video(engine, given, options) for given, options in ask.videos],
            **variables,
        )
        seconds = time.perf_counter() - began
        handle = engine.submit(prompt, wait=True, **self._options)
        cut = [said for name, said in _CUT.items() if name in question.constraint]

        def answer() -> Row:
            found = handle.result()
            stats = found.stats
            error = None
            if question.constraint and found.finish_reason == "length":
                error = InputError(f"The answer was cut off after {len(found.tokens)} tokens, so it {cut[0]}.")
            return {
                "answer": found.text,
                "finish_reason": found.finish_reason,
                "prompt_tokens": stats.prompt_tokens,
                "image_tokens": stats.image_tokens + stats.video_tokens,
                "answer_tokens": stats.new_tokens,
                "prepare_seconds": round(seconds, 4),
                "first_token_seconds": round(stats.first_token_seconds, 4),
                "decode_seconds": round(stats.decode_seconds, 4),
                "error": None if error is None else self._words(error.message),
            }

        return answer

    def _video(self, engine: Engine, given: Given, options: VideoOptions | None) -> Any:
        """A processed video, sampled by its own options or else by those of the question."""
        common = self._question.video_options
        chosen = options or (None if common == VideoOptions() else common)
        try:
            return engine.prompts.processed_video(self._media.video(given), chosen)
        except OptionError as error:  # the options for all rows cannot be applied to this row's video
            raise InputError(error.message, error.hint) from None

    def area(self, item: Item) -> int:
        """The total area of a row's images in pixels."""
        try:
            return sum(map(self._media.area, asked(item, self._question).images))
        except VlpackError:  # the error is reported when the row is answered
            return 0

    def row(self, task: Task, result: Row) -> Row:
        """The row of the output for an answer."""
        return finished(task.key, task.item, result, self.id_column)

    def failed(self, task: Task, error: Exception) -> Row:
        """The row of the output for a row that cannot be answered."""
        return self.row(task, {"error": sentence(explained(error), self._words)})

    def tokens(self, row: Row) -> int:
        """The number of tokens of the answer in a row of the output."""
        return int(row["answer_tokens"] or 0)


def form_of(kind: str, question: Question, place: Place, words: Words, name: str) -> Form:
    """The form of the rows of an input.

    Args:
        kind: kind of the input, as in `vlpack.bulk.source.Source`.
        question: what is asked about every row.
        place: where the files of rows are.
        words: function that writes options in errors.
        name: name of the package.

    Raises:
        OptionError: a library that the form needs is not installed.
    """
    if kind != "openai":
        return Rows(question, place, words)
    missing = [module for module in ("fastapi", "pydantic") if importlib.util.find_spec(module) is None]
    if missing:
        raise OptionError(
            f"OpenAI's batch format needs {' and '.join(missing)}, not installed here.", "pip install 'vlpack[serve]'"
        )
    from vlpack.bulk.requests import Requests

    return Requests(name, place, question.max_tokens, words)


def explained(error: Exception) -> VlpackError:
    """The error of a row as a VlpackError, also for unexpected errors, because one bad row must not end a long run."""
    if isinstance(error, VlpackError):
        return error
    return VlpackError(f"The row cannot be answered: {type(error).__name__}: {str(error)[:300]}")


def sentence(error: VlpackError, words: Words) -> str:
    """The message and hint of an error as one text."""
    return words(error.message if error.hint is None else f"{error.message} {error.hint}")
