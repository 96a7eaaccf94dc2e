"""Inputs of embedding models and rerankers to prompts, in the forms that the models were trained on.

Source: the recipes that QwenLM publishes in Qwen3-Embedding and Qwen3-VL-Embedding.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from vlpack.errors import InputError
from vlpack.preprocess.inputs import Prompt
from vlpack.preprocess.literal import CONTROL, TEXT, literal_pieces
from vlpack.preprocess.load import ImageSource
from vlpack.preprocess.prompt import PromptBuilder
from vlpack.preprocess.tokenizer import Tokenizer

Input: TypeAlias = str | Mapping[str, Any]
"""A text, or a dictionary with ``text``, ``image`` (one or a list of each) and, for embedding, ``instruction``."""

Parts: TypeAlias = list[dict[str, Any]]

JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
BEFORE = f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n"
# a reranker of the thinking models is asked for its answer after an empty thought
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class PlainPrompts:
    """Texts by the tokenizer alone: Qwen3-Embedding and Qwen3-Reranker."""

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
        """The prompt of one input; an instruction makes a query of it.

        Raises:
            InputError: it is no text; ``where`` names it.
        """
        texts, images, own = read_input(item, where, instruction=True)
        _refuse_images(images, where)
        instruction = own or instruction
        text = (f"Instruct: {instruction}\nQuery:" if instruction else prefix) + "".join(texts)
        ids = self.tokenizer.encode(self._pieces(text, special_tokens), add_special_tokens=True)
        if not ids:
            raise InputError(f"{where} is empty, and the tokenizer adds nothing to it.")
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
        """The prompt of a pair."""
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
    """What a reranker of texts is asked, between `BEFORE` and `AFTER`."""
    return f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"


class ChatPrompts:
    """Texts and images by the chat template: Qwen3-VL-Embedding and Qwen3-VL-Reranker."""

    def __init__(self, builder: PromptBuilder) -> None:
        self.builder = builder

    def embedding(self, item: Input, instruction: str | None, prefix: str, where: str, **load: Any) -> Prompt:
        """The prompt of one input: images, then texts, under the instruction.

        Raises:
            InputError: it is neither text nor image; ``where`` names it.
        """
        texts, images, own = read_input(item, where, instruction=True)
        instruction = (own or instruction or prefix).strip()
        if instruction and not unicodedata.category(instruction[-1]).startswith("P"):
            instruction += "."
        return self._chat(instruction, _parts(texts, images), where, **load)

    def reranker(self, query: Input, document: Input, instruction: str, where: str, **load: Any) -> Prompt:
        """The prompt of a pair."""
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
    """Texts, images and instruction of an input.

    Raises:
        InputError: it has another shape, or neither text nor image.
    """
    if isinstance(item, str):
        return [item], [], None
    known = ("text", "image", "instruction") if instruction else ("text", "image")
    if not isinstance(item, Mapping) or not item or set(item) - set(known):
        raise InputError(
            f"{where} must be a text or a dictionary of {', '.join(known)}"
            + (f", not a {type(item).__name__}." if not isinstance(item, Mapping) else f"; it has {list(item)}."),
            '{"image": "a.png", "text": "…"}, for example.',
        )
    texts, images = _listed(item.get("text")), _listed(item.get("image"))
    own = item.get("instruction")
    if not all(isinstance(text, str) for text in texts) or not isinstance(own, str | None):
        raise InputError(f"{where}: 'text' and 'instruction' must be texts.")
    if not texts and not images:
        raise InputError(f"{where} has neither text nor image.")
    return texts, images, own


def _listed(value: Any) -> list[Any]:
    """None, one value or a list of values as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _parts(texts: Sequence[str], images: Sequence[ImageSource]) -> Parts:
    return [*({"type": "image", "image": image} for image in images), *({"type": "text", "text": t} for t in texts)]


def _refuse_images(images: Sequence[ImageSource], where: str) -> None:
    if images:
        raise InputError(f"{where} has an image, and the model takes only text.")


def _text_prompt(ids: Sequence[int], text: str) -> Prompt:
    return Prompt(np.array([ids], np.int32), np.zeros(0, np.int64), None, None, text)
