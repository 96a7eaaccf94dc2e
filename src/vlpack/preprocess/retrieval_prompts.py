"""Prompts of embedding models and rerankers, in the forms that the models were trained on.

Source: the example code in QwenLM's repositories Qwen3-Embedding and Qwen3-VL-Embedding.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from vlpack.errors import InputError
from vlpack.preprocess.image_source import ImageSource
from vlpack.preprocess.literal import CONTROL, TEXT, literal_pieces
from vlpack.preprocess.prompt import Prompt
from vlpack.preprocess.prompt_builder import PromptBuilder
from vlpack.preprocess.tokenizer import Tokenizer

Input: TypeAlias = str | Mapping[str, Any]
"""An input of an embedding model or reranker: a text, or a dictionary with ``text`` and ``image`` (each one value or a
list) and, for embedding models, ``instruction``."""

Parts: TypeAlias = list[dict[str, Any]]

JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
BEFORE = f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n"
# The rerankers are based on thinking models: an empty thought makes the next token the answer.
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class PlainPrompts:
    """Prompts of the text models Qwen3-Embedding and Qwen3-Reranker, made by the tokenizer without a chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def embedding(
        self,
        item: Input,
        instruction: str | None,
        prefix: str,
        where: str,
        *,
        special_tokens: str = CONTROL,
        **load: Any,
    ) -> Prompt:
        """The prompt of an embedding model for one input. An instruction marks the input as a query.

        Args:
            item: the input.
            instruction: task description; an instruction in the input wins over it.
            prefix: text that precedes an input without an instruction.
            where: name of the input in errors, such as "Input 3".
            special_tokens: what special tokens written in the texts become, as in `vlpack.preprocess.literal`.
            **load: not used, since there are no images to load.

        Raises:
            InputError: the input is not a text, or is empty.
        """
        texts, images, own = read_input(item, where, instruction=True)
        _refuse_images(images, where)
        instruction = own or instruction
        text = (f"Instruct: {instruction}\nQuery:" if instruction else prefix) + "".join(texts)
        ids = self.tokenizer.encode(self._pieces(text, special_tokens), add_special_tokens=True)
        if not ids:
            raise InputError(f"{where} is empty: it has no tokens.")
        return _text_prompt(ids, text)

    def reranker(
        self,
        query: Input,
        document: Input,
        instruction: str,
        where: str,
        *,
        special_tokens: str = CONTROL,
        **load: Any,
    ) -> Prompt:
        """The prompt of a reranker for a query and a document; ``where`` names the document in errors."""
        pair = []
        for item, name in ((query, "The query"), (document, where)):
            texts, images, _ = read_input(item, name)
            _refuse_images(images, name)
            pair.append("".join(texts))
        body = plain_pair(instruction, *pair)
        asked = (BEFORE, self._pieces(body, special_tokens), AFTER)
        ids = [token_id for text in asked for token_id in self.tokenizer.encode(text)]
        return _text_prompt(ids, BEFORE + body + AFTER)

    def _pieces(self, text: str, special_tokens: str) -> str | list[str]:
        return literal_pieces(self.tokenizer, text) if special_tokens == TEXT else text


def plain_pair(instruction: str, query: str, document: str) -> str:
    """The part of a text reranker's prompt between `BEFORE` and `AFTER`: instruction, query and document."""
    return f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"


class ChatPrompts:
    """Prompts of Qwen3-VL-Embedding and Qwen3-VL-Reranker: texts and images, rendered by the chat template."""

    def __init__(self, builder: PromptBuilder) -> None:
        self.builder = builder

    def embedding(self, item: Input, instruction: str | None, prefix: str, where: str, **load: Any) -> Prompt:
        """The prompt of an embedding model for one input: the instruction as system message, images, then texts.

        Args:
            item: the input.
            instruction: task description; an instruction in the input wins over it.
            prefix: instruction for an input that has no other.
            where: name of the input in errors, such as "Input 3".
            **load: keyword arguments of `PromptBuilder`.

        Raises:
            InputError: the input has neither text nor image, or an image cannot be used.
        """
        texts, images, own = read_input(item, where, instruction=True)
        instruction = (own or instruction or prefix).strip()
        if instruction and not unicodedata.category(instruction[-1]).startswith("P"):
            instruction += "."
        return self._chat(instruction, _parts(texts, images), where, **load)

    def reranker(self, query: Input, document: Input, instruction: str, where: str, **load: Any) -> Prompt:
        """The prompt of a reranker for a query and a document; ``where`` names the document in errors."""
        parts: Parts = [{"type": "text", "text": f"<Instruct>: {instruction}"}]
        for prefix, item, name in (("<Query>:", query, "The query"), ("\n<Document>:", document, where)):
            texts, images, _ = read_input(item, name)
            parts += [{"type": "text", "text": prefix}, *_parts(texts, images)]
        return self._chat(JUDGE, parts, where, **load)

    def _chat(self, system: str, parts: Parts, where: str, **load: Any) -> Prompt:
        messages = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": parts},
        ]
        try:
            return self.builder(messages, **load)
        except InputError as error:
            raise InputError(f"{where}: {error.message}", error.hint) from error


def read_input(
    item: object, where: str, *, instruction: bool = False
) -> tuple[list[str], list[ImageSource], str | None]:
    """The texts, images and instruction of an input.

    Args:
        item: the input.
        where: name of the input in errors, such as "Input 3".
        instruction: whether the input may have an instruction.

    Raises:
        InputError: the input is of another form, or has neither text nor image.
    """
    if isinstance(item, str):
        return [item], [], None
    known = ("text", "image", "instruction") if instruction else ("text", "image")
    if not isinstance(item, Mapping) or not item or set(item) - set(known):
        raise InputError(
            f"{where} must be a text or a dictionary of {', '.join(known)}"
            + (f", not a {type(item).__name__}." if not isinstance(item, Mapping) else f"; it has {list(item)}."),
            'For example {"image": "a.png", "text": "…"}.',
        )
    texts, images = _listed(item.get("text")), _listed(item.get("image"))
    own = item.get("instruction")
    if not all(isinstance(text, str) for text in texts) or not isinstance(own, str | None):
        raise InputError(f"{where}: 'text' and 'instruction' must be texts.")
    if not texts and not images:
        raise InputError(f"{where} has neither text nor image.")
    return texts, images, own


def _listed(value: Any) -> list[Any]:
    """A list of the values in ``value``, which is None, one value or a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _parts(texts: Sequence[str], images: Sequence[ImageSource]) -> Parts:
    return [*({"type": "image", "image": image} for image in images), *({"type": "text", "text": t} for t in texts)]


def _refuse_images(images: Sequence[ImageSource], where: str) -> None:
    if images:
        raise InputError(f"{where} has an image, but the model takes only text.")


def _text_prompt(ids: Sequence[int], text: str) -> Prompt:
    return Prompt(np.array([ids], np.int32), np.zeros(0, np.int64), None, None, text)
