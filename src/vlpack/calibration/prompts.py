"""The texts and prompts of a calibration: openings that the model continues, built-in passages and the user's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlpack.calibration.passages import PASSAGES
from vlpack.errors import CheckpointError, InputError, OptionError, VlpackError, option
from vlpack.jsonl import read_jsonl
from vlpack.preprocess import PromptBuilder
from vlpack.preprocess.prompt import Prompt
from vlpack.preprocess.retrieval_prompts import ChatPrompts, PlainPrompts
from vlpack.preprocess.tokenizer import Tokenizer
from vlpack.sample_images import picture
from vlpack.tasks import EMBEDDING

T = TypeVar("T")

LENGTH = 128
"""Number of tokens of a piece of a user's text."""
TEXTS, WRITTEN = 8, 64
"""Largest numbers of texts that a model generates, and of tokens of each text, its opening included. Generating is
slow, and more texts gain little (docs/results.md)."""
PIECES = 48
"""Largest number of pieces of a user's text, or of conversations of a user's file."""
STACK = 2048
"""Largest number of tokens in a batch of texts of the same length; a text with more tokens is a batch by itself."""
MIN_TOKENS = 1024
"""Smallest number of tokens of a user's file; fewer are too few to measure thousands of input channels."""
MAX_BYTES = 100_000_000
"""Largest size of a user's file in bytes."""
MAX_TOKENS = 4096
"""Largest number of tokens of a conversation in a user's file; all its inputs to a layer are in memory at once."""

QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "Write a Python function that merges two sorted lists, and test it.",
    "用中文介绍一下长城的历史。",
    "Describe a painting of a harbour in every detail: foreground, background, light and colours.",
    "Write out the text of a typical restaurant receipt, line by line, with prices and the total.",
)
"""Questions that a model with a chat template answers."""
OPENINGS = (
    *("The", "In", "A photo of"),
    # only for models without a chat template
    *("It is", "Once upon a time", "# Introduction\n\n", "import", "<html>"),
)
"""Beginnings of documents that a model continues."""
PICTURES = (
    ("Describe the picture.", 320, 224),
    ("What is the total on this receipt?", 256, 256),
    ("What is written here?", 416, 128),
    ("Which shapes do you see?", 160, 288),
)
"""Questions to a vision-language model about pictures, each with the picture's width and height."""


def openings(prompts: PromptBuilder | None, tokenizer: Tokenizer) -> list[list[int]]:
    """The first tokens of at most `TEXTS` texts that the model will continue.

    They are chats with a question, if there is a chat template, and the beginnings of documents.
    """
    documents = [ids for text in OPENINGS if (ids := tokenizer.encode(text))]
    if prompts is None:
        return documents[:TEXTS]
    chats = [prompts([{"role": "user", "content": text}]).input_ids[0].tolist() for text in QUESTIONS]
    return chats + documents[: TEXTS - len(chats)]


def passages(prompts: PromptBuilder | None, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of the built-in passages; if there is a chat template, each is a chat of a question and its answer."""
    if prompts is None:
        return [ids for _, passage in PASSAGES if (ids := tokenizer.encode(passage))]
    chats = (
        [{"role": "user", "content": question}, {"role": "assistant", "content": passage}]
        for question, passage in PASSAGES
    )
    return [prompts(chat, add_generation_prompt=False).input_ids[0].tolist() for chat in chats]


def retrieval(form: PlainPrompts | ChatPrompts, task: str, instruction: str, *, sees: bool) -> list[Prompt]:
    """Prompts for an embedding model or a reranker, made from the built-in questions and passages and from pictures.

    Args:
        form: builder of the model's prompts.
        task: task of the model, ``embedding`` or ``reranker``.
        instruction: instruction that queries are combined with.
        sees: whether the model accepts pictures.
    """
    images: list[Any] = [
        {"image": picture(width, height, seed)} for seed, (_, width, height) in enumerate(PICTURES) if sees
    ]
    if task == EMBEDDING:
        asked = [form.embedding(question, instruction, "", "") for question, _ in PASSAGES]
        return asked + [form.embedding(item, None, "", "") for item in [text for _, text in PASSAGES] + images]
    others = PASSAGES[1:] + PASSAGES[:1]
    pairs = [(question, text) for question, text in PASSAGES]
    pairs += [(question, text) for (question, _), (_, text) in zip(PASSAGES, others, strict=True)]
    made = [form.reranker(question, text, instruction, "") for question, text in pairs]
    return made + [form.reranker(PICTURES[0][0], image, instruction, "") for image in images]


def of_one_length(texts: Sequence[list[int]]) -> list[list[list[int]]]:
    """Groups texts of the same length into batches of at most `STACK` tokens, with at least one text in each."""
    groups: dict[int, list[list[int]]] = {}
    for text in texts:
        groups.setdefault(len(text), []).append(text)
    made = []
    for length, group in groups.items():
        count = max(1, STACK // length)
        made += [group[start : start + count] for start in range(0, len(group), count)]
    return made


def pictured(prompts: PromptBuilder) -> list[Prompt]:
    """Prompts that ask a question about each of the built-in pictures."""
    made = []
    for seed, (text, width, height) in enumerate(PICTURES):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        made.append(prompts([{"role": "user", "content": content}], [picture(width, height, seed)]))
    return made


def prompt_builder(folder: Path, image_token_id: int | None) -> PromptBuilder | None:
    """The prompt builder of a package; None if it has no chat template, as packages of base models."""
    try:
        return PromptBuilder.from_folder(folder, image_token_id=image_token_id)
    except CheckpointError:
        if image_token_id is not None:
            raise
        return None


LINE = '{"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, "…"]}]}'
"""Example of a line in a JSONL file of conversations."""


def conversations_of(path: Path, prompts: PromptBuilder | None) -> list[Prompt]:
    """Prompts made from a user's JSONL file with one conversation on each line.

    At most `PIECES` conversations are used, evenly spaced in the file. Paths of images are relative to the file's
    folder.

    Args:
        path: the file; each line is an object whose ``messages`` have the format of `vlpack.preprocess.messages`.
        prompts: prompt builder of the package; None if it has no chat template.

    Raises:
        InputError: a line or one of its images cannot be used.
        OptionError: the file is too large or too short, or the model has no chat template.
    """
    if prompts is None:
        raise OptionError(
            f"{path} contains conversations, but the model has no chat template.", "Give a plain-text file, *.txt."
        )
    _check_size(path)
    lines = read_jsonl(path, lambda entry: [_beside(message, path.parent) for message in entry["messages"]], LINE)
    made = []
    for number, messages in spread(lines, PIECES):
        answered = bool(messages) and messages[-1].get("role") == "assistant"
        try:
            prompt = prompts(messages, add_generation_prompt=not answered)
        except VlpackError as error:
            raise InputError(f"{path}, line {number}: {error.message}", error.hint) from None
        length = prompt.input_ids.shape[1]
        if length > MAX_TOKENS:
            raise InputError(
                f"{path}, line {number} has {length} tokens; at most {MAX_TOKENS} are allowed for calibration.",
                "Use smaller images, or split the conversation.",
            )
        made.append(prompt)
    _check_enough(path, sum(prompt.input_ids.shape[1] for prompt in made))
    return made


def _beside(message: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of the message in which relative paths of images are joined to ``folder``."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": [_found(part, folder) for part in content]}


def _found(part: Any, folder: Path) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image":
        return part
    found = dict(part)
    for key in ("path", "image"):
        place = found.get(key)
        # any other value is a URL, base64, or a missing file, which is reported when it is opened
        if isinstance(place, str) and len(place) < 1024 and "\0" not in place and (folder / place).is_file():
            found[key] = str(folder / place)
    return found


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise OptionError(f"The calibration file {path} cannot be read: {error.strerror or error}.") from None
    if size > MAX_BYTES:
        raise OptionError(
            f"{path} is larger than {MAX_BYTES // 1_000_000} MB.", "Give a smaller file, such as a part of it."
        )


def _check_enough(path: Path, tokens: int) -> None:
    if tokens < MIN_TOKENS:
        raise OptionError(
            f"{path} has {tokens} tokens; calibration needs {MIN_TOKENS} or more.",
            f"Give a longer text, or use {option('calibrate', 'self')} to let the model write its own.",
        )


def texts_of(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of a user's text file: at most `PIECES` pieces of `LENGTH` tokens each, evenly spaced in the text.

    Raises:
        OptionError: the file cannot be read, is not UTF-8, is too large, or too short.
    """
    _check_size(path)
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"The calibration text {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise OptionError(f"The calibration text {path} is not UTF-8.", "Give a plain-text file in UTF-8.") from None
    _check_enough(path, len(ids))
    return pieces(ids, min(PIECES, len(ids) // LENGTH))


def pieces(ids: Sequence[int], count: int) -> list[list[int]]:
    """Cuts ``count`` pieces of `LENGTH` tokens out of ``ids``, evenly spaced from the beginning to the end."""
    starts = spread(range(len(ids) - LENGTH + 1), count)
    return [list(ids[start : start + LENGTH]) for start in starts]


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the items, evenly spaced from the first to the last."""
    count = min(most, len(items))
    return [items[index * (len(items) - 1) // max(count - 1, 1)] for index in range(count)]
