"""Concurrent requests: every greedy answer has the same tokens as the stock runtime's answer to the prompt alone."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vlpack
from engine.conftest import TINY
from family import Member, make_member
from samples import ANSWERS, COUNT, DIGITS, IMAGES, READ
from tiny import Tiny
from vlpack import Engine, Sampling
from vlpack.decoding import graphs
from vlpack.decoding.slots import Prefix, Slots
from vlpack.engine import scheduler
from vlpack.errors import OptionError, PackageError, VlpackError
from vlpack.runtime.model import Model
from vlpack.runtime.vision import VisionEncoder
from vlpack.sample_images import picture

GREEDY = Sampling(temperature=0)
WORDS = [
    "the",
    "river",
    "rose",
    "in",
    "night",
    "and",
    "by",
    "morning",
    "lower",
    "fields",
    "stood",
    "under",
    "water",
    "while",
    "nobody",
    "slept",
]
VISION = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 64}
QWEN25 = Member(
    "engine qwen2.5",
    "Qwen2_5_VLConfig",
    "Qwen2_5_VLForConditionalGeneration",
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    VISION | {"fullatt_block_indexes": [1]},
)
MIXTURE = Member(
    "engine mixture",
    "Qwen3MoeConfig",
    "Qwen3MoeForCausalLM",
    {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
)


def arguments(rng: random.Random, images: bool, videos: bool) -> dict[str, Any]:
    """Random arguments of a request: half of them share a system message, some have images, and a few have a video."""
    text = " ".join(rng.choices(WORDS, k=rng.choice((2, 9, 40, 90))))
    content: list[Any] = []
    if images:
        for _ in range(rng.choice((0, 1, 1, 2))):
            image = picture(16 * rng.randint(2, 6), 16 * rng.randint(2, 5), rng.randint(0, 3))
            content.append({"type": "image", "image": image})
    if videos and rng.random() < 0.2:
        content.append({"type": "video", "video": [picture(48, 32, seed) for seed in range(4)], "fps": 2})
    content.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": content if images else text}]
    if rng.random() < 0.5:
        messages.insert(
            0, {"role": "system", "content": "Answer as a patient and careful reader of old letters would."}
        )
    return {"messages": messages, "max_tokens": rng.choice((1, 5, 20, 40))}


def check(model: Model, engine: Engine, count: int, images: bool = False, videos: bool = False) -> None:
    """Submits ``count`` requests, cancels some of them, and compares all answers with those of ``model``."""
    rng = random.Random(len(engine.folder.name) + count)
    handles, cancelled = [], set()
    for number in range(count):
        asked = arguments(rng, images, videos)
        prompt = engine.prompt(asked.pop("messages"))
        handles.append((engine.submit(prompt, sampling=GREEDY, **asked), prompt, asked))
        time.sleep(rng.choice((0, 0, 0.002, 0.01)))
        if number % 6 == 5:
            cancelled.add(number - 2)
            handles[number - 2][0].cancel()
    lengths = set()
    for number, (handle, prompt, asked) in enumerate(handles):
        found, wanted = handle.result(60), model.generate(prompt, sampling=GREEDY, **asked)
        if number in cancelled and found.finish_reason == "interrupted":
            assert found.tokens == wanted.tokens[: len(found.tokens)], number
            continue
        assert found.tokens == wanted.tokens, number
        assert (found.text, found.finish_reason) == (wanted.text, wanted.finish_reason)
        lengths.add(len(found.tokens))
    assert len(lengths) > 2
    assert engine.counters.idle_rows > 0


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes chunks so small that short prompts are split, and rows exchanged, as often as with large models."""
    monkeypatch.setattr(scheduler, "LARGEST_CHUNK", 24)
    monkeypatch.setattr(scheduler, "SMALLEST_CHUNK", 5)
    monkeypatch.setattr(scheduler, "WASTE", 3)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("tiny", [TINY, TINY.but(deepstack=(2, 0), style="v4", seed=2)], ids=["tied", "v4"])
def test_images_and_videos(
    tiny: Tiny, alone: Callable[..., Model], built: Callable[..., Path], engine: Callable[..., Engine]
) -> None:
    check(alone(tiny), engine(built(tiny), slots=5), 32, images=True, videos=True)


@pytest.mark.usefixtures("small_steps")
def test_the_text_part(alone: Callable[..., Model], built: Callable[..., Path], engine: Callable[..., Engine]) -> None:
    check(alone(TINY, part="text"), engine(built(TINY, part="text"), slots=3), 24)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("member", [QWEN25, MIXTURE], ids=lambda member: member.name)
def test_other_families(member: Member, tmp_path: Path, engine: Callable[..., Engine]) -> None:
    folder = vlpack.build(make_member(tmp_path / "checkpoint", member), tmp_path / "package", precision="fp32").folder
    check(Model(folder, threads=1), engine(folder), 24, images=member.vision is not None)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_packages(
    precision: str, alone: Callable[..., Model], built: Callable[..., Path], engine: Callable[..., Engine]
) -> None:
    """Activations are quantized for each token, so that the tokens of other requests have no influence."""
    model = alone(TINY, precision=precision)
    check(model, engine(built(TINY, precision=precision)), 24, images=True)


def test_answers_that_end_by_themselves(tmp_path: Path, engine: Callable[..., Engine]) -> None:
    """A trained model reads all pictures; each answer ends by itself and frees its slot for the next request."""
    made = engine(vlpack.build(DIGITS, tmp_path / "package").folder, slots=3)
    asked = [(image, what) for image in ANSWERS for what in ("read", "count")]
    questions = {"read": READ, "count": COUNT}
    requests = [{"messages": questions[what], "images": [IMAGES / image]} for image, what in asked]
    for (image, what), answer in zip(asked, made.generate_many(requests, sampling=GREEDY), strict=True):
        assert (answer.text, answer.finish_reason) == (ANSWERS[image][what], "stop")


def test_an_int8_kv_cache(
    alone: Callable[..., Model],
    built: Callable[..., Path],
    engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks of a prompt read earlier chunks in 8 bits, so answers equal the runtime's only for whole prompts."""
    with monkeypatch.context() as patched:
        patched.setattr(scheduler, "SMALLEST_CHUNK", 512)  # the size of an engine's first chunk
        whole = engine(built(TINY, "kv_cache=int8"))
        assert whole.cache_bytes < engine().cache_bytes / 2
        patched.setattr(Slots, "_longest", lambda *_: Prefix())
        patched.setattr(scheduler.Scheduler, "_adapt", lambda *_: None)
        check(alone(TINY, "kv_cache=int8"), whole, 16, images=True)
    whole = engine(built(TINY, "kv_cache=int8"))  # a new engine, whose slots are empty
    prompt = whole.prompt(" ".join(WORDS * 3))
    whole.submit(prompt, max_tokens=1, sampling=GREEDY).result(30)
    again = whole.submit(prompt, max_tokens=1, sampling=GREEDY, logprobs=3).result(30)
    assert again.stats.reused_tokens == prompt.input_ids.size - 1
    wanted = last_logits(whole._graphs, prompt.input_ids)
    assert again.logprobs is not None
    for place, logprob in again.logprobs[0].top:
        assert abs(logprob - (wanted[place] - np.log(np.exp(wanted).sum()))) < 1e-4


def last_logits(graphs: graphs.Graphs, ids: np.ndarray) -> np.ndarray:
    """Logits after a prompt whose last token is processed in a call of its own, with caches not written in place."""
    size = ids.shape[1]
    cache = {port.past: np.zeros((1, port.heads, 0, port.channels), port.dtype) for port in graphs.cache}
    for start, end in ((0, size - 1), (size - 1, size)):
        mask, positions = np.ones((1, end), np.int64), np.tile(np.arange(start, end), (3, 1, 1))
        given = {**graphs.tokens(ids[:, start:end]), "attention_mask": mask, "position_ids": positions, **cache}
        names = [port.present for port in graphs.cache]
        logits, *present = graphs.decoder.run(["logits", *names], given)
        cache = {port.past: value for port, value in zip(graphs.cache, present, strict=True)}
    last: np.ndarray = logits[0, -1]
    return last


@pytest.mark.parametrize(("stall", "others", "mean"), [(2, 0, 2), (9, 0, 2), (9, 3, 5), (2, 3, 2), (math.inf, 3, 9)])
def test_long_prompts_slow_running_answers_within_the_limit(
    stall: float, others: int, mean: float, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running answer waits twice as long for a token while prompts are processed, or longer with more prompts.

    The factor never exceeds ``stall``.
    """
    made = engine(context=2048, slots=6, stall=stall, speculation=False)
    run, now = graphs.Graphs.run, [0.0]
    calls: list[tuple[int, float]] = []  # number of new tokens per sequence, and the time when the call was finished

    def timed(self: Any, binding: Any, tokens: Any, counts: Any, held: Any, positions: Any, wanted: Any) -> Any:
        new = int(counts.max())
        # a step takes 1 unit of time, mostly for reading the weights; chunks take longer with more tokens before them
        now[0] += 0.98 + 0.02 * new * (1 if new == 1 or held[0] + new < 300 else 3)
        calls.append((new, now[0]))
        return run(self, binding, tokens, counts, held, positions, wanted)

    prompts = [made.prompt("word " * 700) for _ in range(1 + others)]
    for number, prompt in enumerate(prompts):
        prompt.input_ids[0, 0] = 100 + number  # no prompt shares a prefix with another
    monkeypatch.setattr(graphs.Graphs, "run", timed)
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    first = made.submit("Hello", max_tokens=1900, sampling=GREEDY)
    next(iter(first))
    calls.clear()
    with made._scheduler._changed:  # all are submitted between two steps
        handles = [made.submit(prompt, max_tokens=1, sampling=GREEDY) for prompt in prompts]
    for handle in handles:
        handle.result(60)
    first.cancel()
    chunks = [(new, done) for new, done in calls if new > 1]
    end = next(done for (new, done) in chunks[-2 - others :])  # after this time fewer prompts wait
    waits = np.diff([done for new, done in calls if new == 1 and chunks[0][1] < done < end])
    assert sum(new for new, _ in chunks) > 700 * (1 + others)
    if stall == math.inf:
        assert max(new for new, _ in chunks) == scheduler.LARGEST_CHUNK
        assert len(waits) <= len(chunks)
        return
    assert abs(np.mean(waits) - mean) < 0.25 * mean
    share = mean - 1
    assert sum(waits > 1 + scheduler.PATIENCE * share) <= 3  # only the first ones, until the chunk size is adapted
    assert max(new for new, _ in chunks) >= 4 * scheduler.SMALLEST_CHUNK


def test_cancelling_frees_the_slot(engine: Callable[..., Engine], alone: Callable[..., Model]) -> None:
    made = engine(slots=1)
    first = made.submit("Hello", max_tokens=400, sampling=GREEDY)
    second = made.submit("What?", max_tokens=6, sampling=GREEDY)
    third = made.submit("Never begun.", max_tokens=6, sampling=GREEDY)
    next(iter(first))
    third.cancel()
    assert third.result(5).finish_reason == "interrupted"
    assert not second.done
    first.cancel()
    assert second.result(30).tokens == alone().generate("What?", max_tokens=6, sampling=GREEDY).tokens
    answer = first.result(5)
    assert answer.finish_reason == "interrupted"
    assert 0 < len(answer.tokens) < 400
    second.cancel()  # the answer is finished, so cancelling does nothing
    assert second.result().finish_reason == "length"


def test_streams_in_threads_and_event_loops(engine: Callable[..., Engine], alone: Callable[..., Model]) -> None:
    made = engine(slots=2)
    questions = [" ".join(WORDS[:count]) for count in range(1, 9)]
    wanted = [alone().generate(question, max_tokens=12, sampling=GREEDY) for question in questions]
    found: dict[int, list[str]] = {}

    def ask(index: int) -> None:
        found[index] = list(made.submit(questions[index], max_tokens=12, sampling=GREEDY))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()

    async def listen() -> None:
        async def pieces(index: int) -> None:
            found[index] = [piece async for piece in made.submit(questions[index], max_tokens=12, sampling=GREEDY)]

        await asyncio.gather(*(pieces(index) for index in range(4, 7)))
        answer = await made.submit(questions[7], max_tokens=12, sampling=GREEDY)
        found[7] = [answer.text]

    asyncio.run(asyncio.wait_for(listen(), 60))
    for thread in threads:
        thread.join(60)
    for index, answer in enumerate(wanted):
        assert "".join(found[index]) == answer.text
    assert len(found[0]) > 3
    assert len(found[4]) > 3


def test_answers_of_many_requests_are_in_order(engine: Callable[..., Engine], alone: Callable[..., Model]) -> None:
    made = engine(slots=2, queue=3)
    questions = [" ".join(WORDS[:count]) for count in range(1, 10)]
    requests: list[Any] = [*questions[:-1], {"messages": questions[-1], "max_tokens": 2}]
    answers = made.generate_many(requests, max_tokens=5, sampling=GREEDY)
    for question, answer, count in zip(questions, answers, [5] * 8 + [2], strict=True):
        assert answer.tokens == alone().generate(question, max_tokens=count, sampling=GREEDY).tokens
    with pytest.raises(OptionError, match="temperature"):
        made.generate_many(["a", {"messages": "b", "temperature": -1}])
    with pytest.raises(vlpack.errors.InputError, match="Request 1 has no messages"):
        made.generate_many(["a", {}])


def test_a_graph_that_fails_in_a_step(
    engine: Callable[..., Engine], alone: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests of the failed step raise the error, and later requests are answered."""
    made = engine(slots=2)
    handles = [made.submit(text, max_tokens=400, sampling=GREEDY) for text in ("Hello", "What?", "And?")]
    next(iter(handles[0]))
    next(iter(handles[1]))
    handles[2].cancel()

    def fail(self: Any, *_: Any) -> Any:
        monkeypatch.undo()
        raise PackageError("onnxruntime fails here")

    monkeypatch.setattr(graphs.Graphs, "run", fail)
    for handle in handles[:2]:
        with pytest.raises(PackageError, match="fails here"):
            handle.result(30)
        with pytest.raises(PackageError, match="fails here"):
            list(handle)
    answer = made.submit("Hello", max_tokens=5, sampling=GREEDY).result(30)
    assert answer.stats.reused_tokens == 0  # the contents of the slots are unknown after a failure
    assert answer.tokens == alone().generate("Hello", max_tokens=5, sampling=GREEDY).tokens


def test_an_internal_error_reaches_all_callers(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(slots=1)
    monkeypatch.setattr(Slots, "take", lambda *_: 1 // 0)
    handles = [made.submit("Hello", sampling=GREEDY)]
    with pytest.raises(ZeroDivisionError):
        handles[0].result(30)
    with pytest.raises(VlpackError, match="has failed"):
        made.submit("Hello")


def test_closing(built: Callable[..., Path]) -> None:
    with Engine(built(TINY), slots=1, threads=1) as made:
        handles = [made.submit("Hello", max_tokens=400, sampling=GREEDY) for _ in range(3)]
        with pytest.raises(TimeoutError):
            handles[2].result(0.01)
    assert [handle.result(5).finish_reason for handle in handles] == ["interrupted"] * 3
    with pytest.raises(VlpackError, match="was closed"):
        made.submit("Hello")
    made.close()
    # an engine without references is closed, but only when the last handle of a request is gone
    handle = Engine(built(TINY), slots=1, threads=1).submit("Hello", max_tokens=5, sampling=GREEDY)
    assert len(handle.result(30).tokens) == 5
    scheduler_thread = handle._engine._scheduler._thread  # type: ignore[attr-defined]
    del handle
    scheduler_thread.join(10)
    assert not scheduler_thread.is_alive()


def test_memory(built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, engine: Callable[..., Engine]) -> None:
    assert engine(slots=3, context=100).cache_bytes == 3 * 100 * TINY.layers * TINY.kv_heads * TINY.head_dim * 2 * 4
    monkeypatch.setattr("vlpack.decoding.slots.total_memory_bytes", lambda: 2 * 10**9)
    with pytest.raises(OptionError, match=r"1024 slots with 4096 tokens each take 8\.6 GB.*this machine has 2\.0 GB"):
        Engine(built(TINY), slots=1024, context=4096)
    # by default the cache takes half of the memory
    assert engine(slots=1000, context=None).cache_bytes == pytest.approx(1e9, rel=0.01)
    assert engine(slots=1, context=None).context == 4096  # the model's context
    wrong: list[tuple[dict[str, Any], str]] = [({"slots": 0}, "slots"), ({"context": 5000}, "context")]
    for options, named in [*wrong, ({"queue": 0}, "queue")]:
        with pytest.raises(OptionError, match=named):
            Engine(built(TINY), **options)


def test_the_context_of_a_slot(engine: Callable[..., Engine], alone: Callable[..., Model]) -> None:
    made = engine(context=60, slots=2)
    prompt = made.prompt("Hello")
    answers = made.generate_many([prompt] * 3, max_tokens=500, sampling=GREEDY)
    wanted = alone().generate("Hello", max_tokens=60 - prompt.input_ids.size, sampling=GREEDY)
    for answer in answers:
        assert answer.finish_reason == "length"
        assert answer.tokens == wanted.tokens
    with pytest.raises(vlpack.errors.InputError, match="a slot of this engine has room for 60"):
        made.submit("word " * 100)
    with pytest.raises(vlpack.errors.InputError, match="fit the model's context"):
        engine(context=4096).submit("word " * 5000)


def test_packages_that_the_engine_cannot_run(built: Callable[..., Path]) -> None:
    with pytest.raises(PackageError, match="is for cuda; the engine runs packages for the CPU"):
        Engine(built(TINY, execution_provider="cuda", precision="fp16"))
    with pytest.raises(PackageError, match="only a part of a model"):
        Engine(built(TINY, part="vision"))


def test_a_callers_prompt_is_not_changed(engine: Callable[..., Engine]) -> None:
    made = engine()
    prompt = made.prompt("What?", [picture(64, 48, 1)])
    assert prompt.pixel_values is not None
    before = [prompt.input_ids.copy(), np.copy(prompt.pixel_values)]
    made.submit(prompt, max_tokens=3, sampling=GREEDY, repetition_penalty=None).result(30)
    assert all(np.array_equal(*pair) for pair in zip(before, (prompt.input_ids, prompt.pixel_values), strict=True))


@pytest.mark.parametrize(("stall", "thread"), [(4, "vlpack-vision"), (math.inf, "vlpack-engine")])
def test_images_are_encoded_beside_answers_only_if_these_must_not_wait(
    stall: float,
    thread: str,
    engine: Callable[..., Engine],
    alone: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, threads, look = engine(stall=stall), set(), VisionEncoder._run

    def seen(self: Any, pixels: Any, grid: Any) -> Any:
        threads.add(threading.current_thread().name.partition("_")[0])
        return look(self, pixels, grid)

    prompts = [
        made.prompt([{"role": "user", "content": [{"type": "image", "image": picture(64, 48, seed)}]}])
        for seed in range(6)
    ]
    with monkeypatch.context() as patched:
        patched.setattr(VisionEncoder, "_run", seen)
        handles = [made.submit(prompt, max_tokens=12, sampling=GREEDY) for prompt in prompts]
        found = [handle.result(60) for handle in handles]
    assert threads == {thread}
    assert min(answer.stats.vision_seconds or 0 for answer in found) > 0
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer.tokens == alone().generate(prompt, max_tokens=12, sampling=GREEDY).tokens


@pytest.mark.parametrize("stall", [4, math.inf])
def test_an_encoder_that_fails_ends_its_request_only(
    stall: float, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(stall=stall)
    image = {"role": "user", "content": [{"type": "image", "image": picture(64, 48, 1)}]}

    def fails(*_: Any) -> Any:
        raise PackageError("The encoder fails.")

    with monkeypatch.context() as patched:
        patched.setattr(VisionEncoder, "_run", fails)
        handles = [made.submit(made.prompt([image])), made.submit("Hello", max_tokens=5)]
        with pytest.raises(PackageError, match="The encoder fails"):
            handles[0].result(60)
        assert handles[1].result(60).tokens
    assert made.submit(made.prompt([image]), max_tokens=5).result(60).tokens
