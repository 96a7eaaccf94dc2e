"""Models with linear attention in the engine: answers are transformers', whatever other requests run and are reused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from architectures.test_family import HYBRID, QWEN3_5, QWEN3_5_TEXT
from family import Member, make_member
from tiny import IMAGE, VIDEO
from vlpack import Engine, Sampling
from vlpack.builder import build
from vlpack.decoding import packing
from vlpack.decoding.graphs import Graphs
from vlpack.decoding.slots import BACK, SNAPSHOTS
from vlpack.errors import OptionError, PackageError
from vlpack.options import parse_extra_options
from vlpack.preprocess import Prompt
from vlpack.sample_images import picture

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

GREEDY = Sampling(temperature=0)
LONG = {"max_position_embeddings": 4096}
MEMBERS = {
    "text": Member("q", QWEN3_5_TEXT, "Qwen3_5ForCausalLM", text=HYBRID | LONG),
    "sees": Member("sees", "Qwen3_5Config", "Qwen3_5ForConditionalGeneration", text=HYBRID | LONG, vision=QWEN3_5),
}
OLD = "1.31.0"
"""A version of onnxruntime in which graphs cannot be packed."""


class Hybrid:
    """A package with linear attention, and its checkpoint in transformers."""

    def __init__(self, name: str, folder: Path) -> None:
        member, self.folder = MEMBERS[name], folder
        self.checkpoint = make_member(folder / "checkpoint", member)
        self.model = member.model.from_pretrained(
            self.checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def build(self, *extra: str, precision: str = "fp32") -> Path:
        """Builds a package once for all tests and returns its folder."""
        folder = self.folder / "-".join([precision, *extra])
        if not folder.exists():
            build(self.checkpoint, folder, precision=precision, threads=1, extra_options=parse_extra_options([*extra]))
        return folder

    def answer(self, prompt: Prompt, count: int) -> list[int]:
        """The greedy answer of transformers, which end tokens do not end."""
        arrays = prompt.transformers_arrays(IMAGE, VIDEO)
        given = {name: torch.tensor(array) for name, array in arrays.items()}
        if not prompt.has_images:
            given.pop("mm_token_type_ids", None)
        ids = given["input_ids"]
        out = self.model.generate(
            **given, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None
        )
        found: list[int] = out[0, ids.shape[1] :].tolist()
        return found


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Hybrid]:
    torch.set_num_threads(1)
    made: dict[str, Hybrid] = {}

    def get(name: str) -> Hybrid:
        if name not in made:
            made[name] = Hybrid(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """Returns an engine in which end tokens do not end answers, closed after the test."""
    made: list[Engine] = []

    def get(folder: Path, **options: Any) -> Engine:
        made.append(Engine(folder, threads=1, **{"slots": 3, "context": 1024, **options}))
        made[-1]._ends.clear()
        return made[-1]

    yield get
    for one in made:
        one.close()


def words(count: int, seed: int = 0) -> str:
    return " ".join(map(str, np.random.default_rng((count, seed)).integers(0, 100, count)))


@pytest.mark.parametrize("version", [None, OLD])
def test_many_requests(
    version: str | None, hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of different lengths are processed while other answers run, packed or not, and rows change places."""
    if version:
        monkeypatch.setattr(packing, "ort", SimpleNamespace(__version__=version))
    there = hybrid("text")
    made = engine(there.build())
    assert version is None or not made._graphs.packed
    prompts = [made.prompt(words(count)) for count in (2, 40, 1, 150, 20, 7, 300, 3, 3)]
    counts = (30, 3, 40, 5, 9, 60, 4, 2, 30)
    running = [made.submit(p, max_tokens=c, sampling=GREEDY) for p, c in zip(prompts, counts, strict=True)]
    for prompt, handle, count in zip(prompts, running, counts, strict=True):
        assert handle.result().tokens == there.answer(prompt, count)
    assert made.counters.idle_rows > 0


def test_short_prompts_share_a_call(hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine]) -> None:
    there = hybrid("text")
    made = engine(there.build(), slots=8)
    if not made._graphs.packed:
        pytest.skip("onnxruntime is too old")
    prompts = [Prompt(np.array([ids], np.int32), np.zeros(0, np.int64), None, None, "") for ids in IDS]
    with made._building:
        handles = made.submit_n(1, prompts[0], max_tokens=5, sampling=GREEDY)
        handles += [made.submit(prompt, max_tokens=5, sampling=GREEDY) for prompt in prompts[1:]]
    for prompt, handle in zip(prompts, handles, strict=True):
        assert handle.result().tokens == there.answer(prompt, 5)
    assert made.counters.chunks < len(prompts)


IDS = [list(range(start, start + size)) for start, size in ((5, 3), (100, 9), (300, 1), (350, 16), (400, 2), (500, 7))]


def test_images_beside_text(hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine]) -> None:
    there = hybrid("sees")
    made = engine(there.build())
    one, two = picture(64, 48, 1), picture(48, 80, 2)
    prompts = [made.prompt("What is this?", [one]), made.prompt(words(90)), made.prompt("And both?", [one, two])]
    handles = [made.submit(prompt, max_tokens=12, sampling=GREEDY) for prompt in prompts]
    for prompt, handle in zip(prompts, handles, strict=True):
        assert handle.result().tokens == there.answer(prompt, 12)


def test_a_turn_continues_from_the_last_prompt(hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine]) -> None:
    """The answer in the conversation is not the generated one, as where a template leaves reasoning out."""
    there = hybrid("sees")
    made = engine(there.build())
    parts: list[Any] = [{"type": "image", "image": picture(96, 64, 1)}, {"type": "text", "text": words(80)}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    before = 0
    for text in (words(60, 1), words(70, 2), "Which?"):
        prompt = made.prompt(messages)
        answer = made.generate(prompt, max_tokens=20, sampling=GREEDY)
        assert answer.tokens == there.answer(prompt, 20)
        assert answer.stats.reused_tokens == max(before - BACK, 0)
        before = prompt.input_ids.size
        messages += [{"role": "assistant", "content": "Something else."}, {"role": "user", "content": text}]
    again = made.generate(prompt, max_tokens=20, sampling=GREEDY)  # a snapshot is not used up
    assert again.tokens == answer.tokens
    assert again.stats.reused_tokens == before - BACK


def test_conversations_with_the_same_beginning(hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine]) -> None:
    """The second prompt leaves a snapshot where it differs from the first, and the third begins there."""
    there = hybrid("text")
    made, system = engine(there.build()), {"role": "system", "content": words(100)}
    reused = []
    for text in (words(90, 1), words(95, 2), words(99, 3)):
        prompt = made.prompt([system, {"role": "user", "content": text}])
        answer = made.generate(prompt, max_tokens=8, sampling=GREEDY)
        assert answer.tokens == there.answer(prompt, 8)
        reused.append(answer.stats.reused_tokens)
    assert reused[:2] == [0, 0]
    assert reused[2] > 200


def test_several_answers_to_one_prompt(hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine]) -> None:
    there = hybrid("text")
    made = engine(there.build())
    prompt = made.prompt(words(200))
    wanted = there.answer(prompt, 6)
    for handle in made.submit_n(3, prompt, max_tokens=6, sampling=GREEDY):
        assert handle.result().tokens == wanted
    assert made.counters.prompt_tokens == prompt.input_ids.size + 2 * BACK  # each computes the end by itself


def test_the_first_and_the_latest_snapshots_are_kept(
    hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine]
) -> None:
    made = engine(hybrid("text").build(), slots=1, context=4096)
    messages: list[dict[str, Any]] = []
    ends = []
    for number in range(5):
        messages += [{"role": "user", "content": words(80, number)}, {"role": "assistant", "content": "Yes."}]
        answer = made.generate(messages[:-1], max_tokens=2, sampling=GREEDY)
        ends.append(answer.stats.prompt_tokens - BACK)
    (slot,) = made._slots.rows(0, 1)
    assert [snapshot.length for snapshot in slot.snapshots] == [ends[0], *ends[1 - SNAPSHOTS :]]
    # an earlier turn is asked again: snapshots of later ones are of no use any more
    assert made.generate(messages[:5], max_tokens=2, sampling=GREEDY).stats.reused_tokens == ends[0]
    assert [snapshot.length for snapshot in slot.snapshots] == [ends[0], ends[2]]


def test_a_call_that_fails_leaves_states_unknown(
    hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = hybrid("text")
    made = engine(there.build(), slots=1)
    prompt, run = made.prompt(words(150)), Graphs.run
    calls = 0

    def fail(self: Graphs, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        values = run(self, *given)  # the states are those after the call
        if calls == 2:
            raise PackageError("onnxruntime fails here")
        return values

    monkeypatch.setattr(Graphs, "run", fail)
    with pytest.raises(PackageError, match="fails here"):
        made.generate(prompt, max_tokens=5, sampling=GREEDY)
    answer = made.generate(prompt, max_tokens=5, sampling=GREEDY)
    assert answer.tokens == there.answer(prompt, 5)
    assert answer.stats.reused_tokens == prompt.input_ids.size - BACK  # the snapshot before the failed call is right


def test_an_int8_cache(hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine]) -> None:
    """Its graph cannot be packed: steps leave the states of idle rows and of prompts in progress as they are."""
    made = engine(hybrid("text").build("kv_cache=int8"))
    assert not made._graphs.packed
    prompts = [made.prompt(words(count)) for count in (3, 120, 30, 1)]
    alone = [made.generate(prompt, max_tokens=25, sampling=GREEDY).tokens for prompt in prompts]
    for handle, wanted in zip(
        [made.submit(prompt, max_tokens=25, sampling=GREEDY) for prompt in prompts], alone, strict=True
    ):
        assert handle.result().tokens == wanted


def test_constrained_answers(hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine]) -> None:
    pytest.importorskip("llguidance")
    made = Engine(hybrid("sees").build(), slots=2, context=512, threads=1)
    with made:
        assert made.generate("Is it?", choices=["yes", "no"], sampling=GREEDY).text in ("yes", "no")


def test_speculation_is_not_offered(hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine]) -> None:
    folder = hybrid("text").build()
    assert not engine(folder).speculation
    with pytest.raises(OptionError, match="no layers with linear attention"):
        Engine(folder, speculation=True)


def test_memory(
    hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(hybrid("text").build(), slots=2, context=100)
    states = 3 * 4 * (160 * 3 + 4 * 16 * 24)  # three layers: convolution and recurrence
    assert made.cache_bytes == 2 * ((1 + SNAPSHOTS) * states + 100 * 2 * 2 * 32 * 4)
    monkeypatch.setattr("vlpack.decoding.slots.total_memory_bytes", lambda: 10**8)
    with pytest.raises(OptionError, match="Keys, values and states of 1024 slots"):
        Engine(hybrid("text").build(), slots=1024, context=4096)


def test_exchanged_slots(hybrid: Callable[[str], Hybrid], engine: Callable[..., Engine]) -> None:
    """Rows are exchanged while answers run; each answer continues with its own states."""
    there = hybrid("text")
    made = engine(there.build(), slots=2)
    prompts = [made.prompt(words(9, seed)) for seed in (1, 2)]
    step, exchanged = made._scheduler._step, 0

    def stepped() -> None:
        nonlocal exchanged
        step()
        if len(made._scheduler._decoding) == 2:
            made._slots.exchange(*made._slots.rows(0, 2))
            exchanged += 1

    made._scheduler._step = stepped  # type: ignore[method-assign]
    handles = [made.submit(prompt, max_tokens=60, sampling=GREEDY) for prompt in prompts]
    for prompt, handle in zip(prompts, handles, strict=True):
        assert handle.result().tokens == there.answer(prompt, 60)
    assert exchanged
