"""Conversations with models that have linear attention, decoded by vlpack itself on plain onnxruntime.

onnxruntime-genai cannot rewind the states of such a model to an earlier token, so it would compute the whole
conversation again for every turn. `vlpack.decoding` copies the states near the end of each prompt, and the next turn
continues from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlpack.decoding.graphs import Array, Graphs
from vlpack.decoding.images import Unseen, positions_of
from vlpack.decoding.prefixes import tokens_of
from vlpack.decoding.slots import Slot, Slots
from vlpack.preprocess import Prompt
from vlpack.runtime.answer import Begun
from vlpack.runtime.sampler import Choice, Sampler

CHUNK = 512
"""Largest number of a prompt's tokens that are processed in one call, as in the engine."""


class KeptConversation:
    """The decoder of one conversation, with the cache and the states of its tokens.

    Args:
        graphs: sessions of the package.
        model: ``model`` section of the package's genai_config.json.
        see: function that computes the features of a prompt's images; None if the package takes no images.
        ends: ids of the tokens that end an answer.
        context: largest number of tokens of the conversation.
    """

    def __init__(
        self,
        graphs: Graphs,
        model: Mapping[str, Any],
        see: Callable[[Prompt], Array] | None,
        ends: set[int],
        context: int,
    ) -> None:
        self._graphs, self._model, self._see, self._ends = graphs, model, see, ends
        self._slots = Slots(graphs, 1, context)
        self._slot: Slot | None = None

    def begin(self, prompt: Prompt, choice: Choice) -> Begun:
        """Processes a prompt, except for the prefix whose cache and states are known, and chooses the first token.

        Args:
            prompt: prompt, with fewer tokens than the context.
            choice: how tokens are chosen.

        Returns:
            The answer that has begun, the time for images in seconds, and the number of tokens that were not computed
            again.

        Raises:
            PackageError: onnxruntime fails.
        """
        if self._slot is not None:  # the previous answer has ended, even if it was not read to its end
            self._slots.release(self._slot)
        tokens = tokens_of(prompt, self._model.get("image_token_id"))
        slot = self._slot = self._slots.take(self, tokens)
        assert slot is not None, "the only slot is free"
        reused, seconds = slot.length, 0.0
        unseen, features = None, None
        if prompt.has_images:
            unseen = Unseen(prompt, tokens, slot.length)
            if unseen.prompt is not None:
                assert self._see is not None, "a package that takes images has an encoder"
                started = time.perf_counter()
                features = self._see(unseen.prompt)
                seconds = time.perf_counter() - started
        positions, logits = positions_of(prompt, self._model), np.zeros(0, np.float32)
        while slot.length < len(tokens.ids):
            start, end = slot.length, self._slots.until(slot, CHUNK, len(tokens.ids))
            part = None if features is None or unseen is None else features[unseen.within(start, end)]
            logits = self._run(slot, tokens.ids[start:end], positions[:, start:end], part)
            self._slots.wrote(slot, tokens.ids[start:end])
        sampler = Sampler(choice, tokens.ids, self._graphs.vocab_size, self._ends)
        generator = KeptGenerator(self, slot, sampler, int(positions.max()) + 1, sampler(logits))
        return Begun(generator, seconds, reused)

    def step(self, slot: Slot, token: int, position: int) -> Array:
        """Computes the logits, fp32 ``[V]``, after one more token of the answer.

        Args:
            slot: slot of the conversation.
            token: id of the token.
            position: its position on all three axes.

        Raises:
            PackageError: onnxruntime fails.
        """
        ids = np.array([token], np.int32)
        logits = self._run(slot, ids, np.full((3, 1), position), None)
        slot.write(ids)
        return logits

    def is_full(self, slot: Slot) -> bool:
        """Whether there is no room for another token."""
        return slot.length >= self._slots.context

    def _run(self, slot: Slot, ids: Array, positions: Array, features: Array | None) -> Array:
        """Runs the decoder on some tokens and returns the logits of the last one, fp32 ``[V]``."""
        given = self._graphs.tokens(ids[None], features)
        logits: Array = self._slots.run(slot.row, np.array([len(ids)]), given, positions, np.array([len(ids) - 1]))[0]
        return logits


class KeptGenerator:
    """An answer in a `KeptConversation`, with the methods of the runtime's generator that are used to make answers.

    Args:
        conversation: decoder of the conversation.
        slot: slot that holds the prompt.
        sampler: sampler of the answer's tokens.
        position: position of the answer's first token.
        token: the answer's first token.
    """

    def __init__(self, conversation: KeptConversation, slot: Slot, sampler: Sampler, position: int, token: int) -> None:
        self._conversation, self._slot, self._sampler = conversation, slot, sampler
        self._position, self._token = position, token

    def get_next_tokens(self) -> list[int]:
        """The token that was chosen last, as a list."""
        return [self._token]

    def is_done(self) -> bool:
        """Whether the context is full."""
        return self._conversation.is_full(self._slot)

    def generate_next_token(self) -> None:
        """Runs the decoder on the last token and chooses the next one.

        Raises:
            PackageError: onnxruntime fails.
        """
        self._token = self._sampler(self._conversation.step(self._slot, self._token, self._position))
        self._position += 1
