"""Prefix reuse: tokens whose keys and values are in a slot are not computed again, and the answers do not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.conftest import PACKED, TINY
from vlpack import Engine, Sampling
from vlpack.decoding.prefixes import SeenImage, Tokens, common_prefix
from vlpack.runtime.model import Model
from vlpack.runtime.vision import VisionEncoder
from vlpack.sample_images import picture

GREEDY = Sampling(temperature=0)
SYSTEM = {"role": "system", "content": "Answer as a patient and careful reader of old letters would do it."}


def user(text: str, *images: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*({"type": "image", "image": image} for image in images), text]}


def tokens(ids: list[int], *images: tuple[int, bytes]) -> Tokens:
    return Tokens(np.array(ids, np.int32), [SeenImage(*image) for image in images])


def test_common_prefixes() -> None:
    long = tokens([1, 2, 9, 9, 3, 9, 9, 4], (2, b"a"), (5, b"b"))
    for other, common in (
        (long, 8),
        (tokens([1, 2, 9]), 2),  # a placeholder without an image
        (tokens([1, 2, 9], (2, b"a")), 3),
        (tokens([1, 2, 9, 9, 3, 9, 9, 4], (2, b"a"), (5, b"c")), 5),
        (tokens([1, 2, 9, 9, 3, 9, 9, 4], (2, b"c"), (5, b"b")), 2),
        (tokens([1, 2, 9, 9, 3, 5], (2, b"a")), 5),
        (tokens([7]), 0),
        (tokens([]), 0),
    ):
        assert common_prefix(long, other) == common_prefix(other, long) == common


def test_a_conversation_continues_in_its_slot(engine: Callable[..., Engine], alone: Callable[..., Model]) -> None:
    made = engine(slots=1)
    messages = [SYSTEM]
    before = 0
    for text, images in (("What is this?", [picture(96, 64, 1)]), ("And?", []), ("This?", [picture(64, 64, 2)])):
        messages.append(user(text, *images))
        prompt = made.prompt(messages)
        computed = made.counters.prompt_tokens
        answer = made.submit(prompt, max_tokens=9, sampling=GREEDY).result(30)
        assert answer.tokens == alone().generate(prompt, max_tokens=9, sampling=GREEDY).tokens
        assert answer.stats.reused_tokens >= before
        assert made.counters.prompt_tokens - computed == prompt.input_ids.size - answer.stats.reused_tokens
        before = prompt.input_ids.size
        messages.append({"role": "assistant", "content": answer.text})


def test_prefixes_with_different_images_are_different(
    engine: Callable[..., Engine], alone: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, looked = engine(slots=1), []
    look = VisionEncoder._run

    def counted(self: Any, pixels: Any, grid: Any) -> Any:
        looked.append(grid)
        return look(self, pixels, grid)

    one, two, three = (picture(64, 48, seed) for seed in (1, 2, 3))
    prompts = [made.prompt([user("What?", *images)]) for images in ((one, two), (one, three), (three, two), (one, two))]
    # the second prompt shares the first image, the third and fourth share only the text before the images
    start = int(np.argmax(prompts[0].input_ids[0] == made.prompts.image_token_id))
    second = start + int(prompts[0].num_image_tokens[0]) + 2
    monkeypatch.setattr(VisionEncoder, "_run", counted)
    for prompt, reused, runs in zip(prompts, (0, second, start, start), (2, 1, 0, 0), strict=True):
        looked.clear()
        answer = made.submit(prompt, max_tokens=9, sampling=GREEDY).result(30)
        assert (answer.stats.reused_tokens, len(looked)) == (reused, runs)
        assert answer.tokens == alone().generate(prompt, max_tokens=9, sampling=GREEDY).tokens
    assert made.vision is not None
    made.vision.forget()
    looked.clear()
    answer = made.submit(prompts[-1], max_tokens=9, sampling=GREEDY).result(30)  # the slot holds all its images
    assert (answer.stats.reused_tokens, looked) == (prompts[-1].input_ids.size - 1, [])


def test_the_prefix_of_a_busy_slot_is_copied(engine: Callable[..., Engine], alone: Callable[..., Model]) -> None:
    made = engine(slots=2)
    prompt = made.prompt([SYSTEM, user("What is this?", picture(96, 64, 1))])
    first = made.submit(prompt, max_tokens=300, sampling=GREEDY)
    next(iter(first))
    second = made.submit(prompt, max_tokens=20, sampling=GREEDY).result(30)
    assert not first.done
    first.cancel()
    wanted = alone().generate(prompt, max_tokens=300, sampling=GREEDY).tokens
    assert second.stats.reused_tokens == prompt.input_ids.size - 1
    assert second.tokens == wanted[:20]
    assert first.result().tokens == wanted[: len(first.result().tokens)]


def test_several_answers_to_one_prompt_compute_it_once(engine: Callable[..., Engine]) -> None:
    made = engine(slots=4)
    prompt = made.prompt([SYSTEM, user("What is this?", picture(96, 64, 1))])
    handles = made.submit_n(4, prompt, max_tokens=12, temperature=2.0, seed=3)
    answers = [handle.result(30) for handle in handles]
    assert made.counters.prompt_tokens == prompt.input_ids.size + 3
    assert len({tuple(answer.tokens) for answer in answers}) == 4


def test_a_similar_prompt_does_not_overwrite_a_conversation(engine: Callable[..., Engine]) -> None:
    """A prompt that only begins like a slot's contents gets a copy of that prefix in another slot."""
    made = engine(slots=2)
    long, other = ([SYSTEM, user(text)] for text in ("What is this, and " * 10, "Another " * 20))
    for messages in (long, other):
        made.submit(messages, max_tokens=2, sampling=GREEDY).result(30)
    again = [made.submit(messages, max_tokens=2, sampling=GREEDY).result(30) for messages in (other, long)]
    for answer in again:
        assert answer.stats.reused_tokens == answer.stats.prompt_tokens - 1


def test_the_least_recently_used_slot_is_overwritten(built: Callable[..., Path]) -> None:
    with Engine(built(TINY), slots=2, context=256, threads=1) as made:

        def reused(word: str) -> int:
            answer = made.submit([user(f"{word} " * 30)], max_tokens=1, sampling=GREEDY).result(30)
            return answer.stats.prompt_tokens - answer.stats.reused_tokens

        assert [reused(word) > 1 for word in ("alpha", "beta", "alpha", "gamma", "alpha", "beta")] == [
            *(True, True, False, True, False, True)
        ]


@PACKED
def test_short_ends_of_prompts_share_a_call(engine: Callable[..., Engine], alone: Callable[..., Model]) -> None:
    made = engine(slots=5)
    long = "What is this, and " * 10
    made.submit([SYSTEM, user(long)], max_tokens=1, sampling=GREEDY).result(30)
    prompts = [made.prompt([SYSTEM, user(long + end)]) for end in ("who", "the river rose", "night", "and who", "who")]
    before = made.counters.chunks, made.counters.prompt_tokens
    with made._scheduler._changed:  # all are submitted between two steps
        handles = [made.submit(prompt, max_tokens=12, sampling=GREEDY) for prompt in prompts]
    for prompt, handle in zip(prompts, handles, strict=True):
        assert handle.result(30).tokens == alone().generate(prompt, max_tokens=12, sampling=GREEDY).tokens
    # the last request waited for the first one's prompt and reused it
    assert handles[4].result().stats.reused_tokens == prompts[4].input_ids.size - 1
    assert made.counters.chunks - before[0] == 2
    left = [handle.result().stats.prompt_tokens - handle.result().stats.reused_tokens for handle in handles]
    assert made.counters.prompt_tokens - before[1] == sum(left)
    assert max(left) < 16
    assert left[:4] != [1] * 4
