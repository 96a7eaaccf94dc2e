"""Conversations: every answer equals transformers' for the whole conversation, and cached tokens are not recomputed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlpack
from parity import Reference
from preprocess.video_files import clip
from runtime.test_video import generate, tensors
from samples import ANSWERS, COUNT, DIGITS, IMAGES, READ, copy_digits
from tiny import Tiny
from vlpack import Sampling
from vlpack.cli.conversations import saved
from vlpack.errors import InputError, OptionError, PackageError
from vlpack.preprocess import ChatTemplate
from vlpack.runtime import model as runtime
from vlpack.runtime.chat import Chat
from vlpack.runtime.model import Model

TOKENS = 12
GREEDY = Sampling(temperature=0)
TINY = Tiny(seed=1)
TINIES = {"tied": TINY, "levels out of order, v4": TINY.but(deepstack=(2, 0), style="v4", seed=2)}
SAMPLES = {"carphone": clip("carphone_pristine.mp4")}


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((width, height, seed)).integers(0, 256, (height, width, 3), np.uint8)


TURNS: list[tuple[str, list[Any]]] = [
    ("What is this?", [picture(96, 64)]),
    ("And its colour?", []),
    ("This one is larger. What do both show?", [picture(160, 128), picture(64, 64)]),
    ("Which is older?", []),
    ("Thank you.", []),
]


@pytest.fixture(scope="session")
def model(built: Callable[..., Path]) -> Callable[..., Model]:
    made: dict[Any, Model] = {}

    def get(tiny: Tiny = TINY, **options: Any) -> Model:
        key = (tiny, *sorted(options.items()))
        if key not in made:
            made[key] = Model(built(tiny, **options), threads=1)
        return made[key]

    return get


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records what is computed: an entry for each new generator and for each image that is encoded."""
    from vlpack.runtime import vision as vision_encoder

    lines: list[str] = []
    make, look = runtime.make_generator, vision_encoder.VisionEncoder._run

    def make_generator(*arguments: Any) -> Any:
        lines.append("generator")
        return make(*arguments)

    def looked(self: Any, pixels: Any, grid: Any) -> Any:
        lines.append("x".join(map(str, grid[0])))
        return look(self, pixels, grid)

    monkeypatch.setattr(runtime, "make_generator", make_generator)
    monkeypatch.setattr(vision_encoder.VisionEncoder, "_run", looked)
    return lines


def wanted(chat: Chat, question: dict[str, Any], reference: Reference, count: int = TOKENS) -> list[int]:
    """transformers' answer to the whole conversation, computed from the start."""
    prompt = chat.model.prompt([*chat.messages, question])
    reference.model.model.rope_deltas = None
    return generate(reference, tensors(prompt), count)


def asked(text: str, images: list[Any], videos: tuple[Any, ...] = ()) -> dict[str, Any]:
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "video", "video": v} for v in videos]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


@pytest.mark.parametrize("name", TINIES)
def test_five_turns(
    name: str, model: Callable[..., Model], reference: Callable[[Tiny], Reference], made: list[str]
) -> None:
    loaded, live = model(TINIES[name]), reference(TINIES[name])
    assert loaded.vision is not None
    loaded.vision.forget()
    chat = loaded.chat(system="Be brief.", max_tokens=TOKENS, sampling=GREEDY)
    before = 0
    for number, (text, images) in enumerate(TURNS):
        expected = wanted(chat, asked(text, images), live)
        answer = chat.ask(text, images)
        assert answer.tokens == expected, number
        assert len(set(expected)) > 2
        # everything up to the last answer is in the cache, unless the turn has an image
        stats = answer.stats
        assert stats.reused_tokens >= before if not images else stats.reused_tokens == 0
        assert stats.vision_seconds if images else stats.vision_seconds == 0
        before = stats.prompt_tokens
    assert made == ["1x8x12", "generator", "1x16x20", "1x8x8", "generator"]
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 5]
    assert chat.tokens == loaded.prompt([*chat.messages, asked("?", [])]).input_ids.size


def test_videos(model: Callable[..., Model], reference: Callable[[Tiny], Reference]) -> None:
    chat = model().chat(max_tokens=TOKENS, sampling=GREEDY, video_options=vlpack.VideoOptions(num_frames=5))
    videos = (SAMPLES["carphone"],)
    turns = [("What?", [picture(96, 64)], ()), ("And here?", [], videos), ("So?", [], ())]
    for number, (text, images, shown) in enumerate(turns):
        options = vlpack.VideoOptions(num_frames=5) if number else None
        prompt = model().prompt([*chat.messages, asked(text, images, shown)], video_options=options)
        live = reference(TINY)
        live.model.model.rope_deltas = None
        expected = generate(live, tensors(prompt), TOKENS)
        answer = chat.ask(text, images, shown)
        assert answer.tokens == expected
        assert (answer.stats.video_frames > 0) == (number > 0)
        assert bool(answer.stats.video_seconds) == bool(shown)


def test_an_answer_that_was_never_read_changes_nothing(model: Callable[..., Model]) -> None:
    chat = model().chat(max_tokens=2, sampling=GREEDY)
    chat.stream("Never read.")
    chat.ask("Hello")
    assert [message["content"] for message in chat.messages[::2]] == ["Hello"]


def test_a_failure_keeps_the_conversation(
    model: Callable[..., Model], reference: Callable[[Tiny], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = model().chat(max_tokens=TOKENS, sampling=GREEDY)
    chat.ask(*TURNS[0])
    before = chat.messages

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no memory for the cache")

    with monkeypatch.context() as patched:
        patched.setattr(runtime, "make_generator", fail)
        with pytest.raises(PackageError, match="no memory for the cache"):
            chat.ask(*TURNS[2])
    assert chat.messages == before
    stream = chat.stream("And?")
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr("vlpack.preprocess.TextStream.push", fail)
        with pytest.raises(PackageError, match="no memory for the cache"):
            next(stream)
    assert stream.answer.finish_reason == "failed"
    with pytest.raises(InputError, match=r"nothing\.png"):
        chat.ask("What?", ["nothing.png"])
    with pytest.raises(InputError, match="must be a list"):
        chat.ask("What?", "nothing.png")
    assert chat.messages == before
    expected = wanted(chat, asked("And?", []), reference(TINY))
    assert chat.ask("And?").tokens == expected


def test_a_cache_that_grows(
    model: Callable[..., Model],
    reference: Callable[[Tiny], Reference],
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlpack.runtime.chat.SPARE", 40)
    chat = model().chat(max_tokens=TOKENS, sampling=GREEDY)
    for number in range(6):
        expected = wanted(chat, asked(f"Number {number} of six, and a few words more?", []), reference(TINY))
        assert chat.ask(f"Number {number} of six, and a few words more?").tokens == expected
    assert 1 < made.count("generator") < 5


def test_a_full_context(model: Callable[..., Model], reference: Callable[[Tiny], Reference]) -> None:
    chat = model().chat(max_tokens=TOKENS, sampling=GREEDY, context=150)
    chat.ask("What is this?", [picture(96, 64)])
    assert chat.warning() is None
    while chat.context - chat.tokens > TOKENS:
        chat.ask("And what else?")
    warning = chat.warning()
    assert warning is not None
    assert f"The conversation has {chat.tokens} tokens" in warning
    assert f"turn 1 ({chat.turns[0].tokens} tokens, 1 image)" in warning
    before = chat.messages
    with pytest.raises(InputError, match="150 is the most") as caught:
        chat.ask("And would you please tell me at some length, with many words, what else there is?")
    assert "turn 1 (" in str(caught.value.hint)
    assert chat.messages == before
    chat.drop(2)
    assert chat.messages == before[4:]
    expected = wanted(chat, asked("And?", []), reference(TINY))
    assert chat.ask("And?").tokens == expected
    for count in (0, 99, True):
        with pytest.raises(OptionError, match="cannot be dropped"):
            chat.drop(count)
    chat.reset()
    assert chat.messages == []
    with pytest.raises(InputError, match="Shorten the question"):
        chat.ask("word " * 200)


def test_a_turn_dropped_in_front_of_an_image(
    model: Callable[..., Model], reference: Callable[[Tiny], Reference], made: list[str]
) -> None:
    chat = model().chat(max_tokens=TOKENS, sampling=GREEDY)
    chat.ask("Hello")
    chat.ask("What is this?", [picture(96, 64)])
    chat.drop()
    expected = wanted(chat, asked("And?", []), reference(TINY))
    assert chat.ask("And?").tokens == expected
    assert made.count("generator") == 3


def test_an_answer_ends_with_the_context(model: Callable[..., Model]) -> None:
    chat = model().chat(max_tokens=500, sampling=GREEDY, context=60)
    answer = chat.ask("What is it?")
    assert answer.stats.prompt_tokens + len(answer.tokens) == 60
    assert answer.finish_reason == "length"
    assert Chat(model()).context == 4096  # the model's context


def test_continuing_a_saved_conversation(model: Callable[..., Model], tmp_path: Path) -> None:
    file = tmp_path / "a picture.png"
    Image.fromarray(picture(96, 64)).save(file)
    first = model().chat(system="Be brief.", max_tokens=TOKENS, sampling=GREEDY)
    first.ask("What is this?", [str(file)])
    first.ask("And this?", [picture(64, 96)])
    text = json.dumps(saved(first.messages))
    assert str(file) in text
    second = model().chat(messages=json.loads(text), max_tokens=TOKENS, sampling=GREEDY)
    assert (second.system, second.tokens) == ("Be brief.", first.tokens)
    assert second.ask("Compare them.").tokens == first.ask("Compare them.").tokens
    with pytest.raises(InputError, match="two system messages"):
        model().chat(system="Be long.", messages=json.loads(text))
    with pytest.raises(InputError, match="questions and answers in turn"):
        model().chat(messages=json.loads(text)[:2])
    with pytest.raises(InputError, match="has no source"):
        model().chat(messages=[asked("What?", [None]), {"role": "assistant", "content": "A cat."}])
    with pytest.raises(InputError, match="given as frames"):
        saved([asked("What?", [], ([picture(64, 64)] * 2,))])


def test_a_system_message_that_is_refused(model: Callable[..., Model]) -> None:
    chat = model().chat(system="Be brief.", max_tokens=2, sampling=GREEDY)
    tokens = chat.tokens
    for bad in ("<|image_pad|>", "\ud800", 5):
        with pytest.raises(InputError):
            chat.system = bad  # type: ignore[assignment]
    assert (chat.system, chat.tokens) == ("Be brief.", tokens)
    assert chat.ask("Hello").tokens


def test_untrusted_messages(model: Callable[..., Model], reference: Callable[[Tiny], Reference]) -> None:
    question, image = {"role": "user", "content": "What?"}, {"type": "image", "image": picture(64, 64)}
    refused: tuple[Any, ...] = (
        ["What?"],
        "What?",
        [{"role": 5}],
        [question, {"role": "assistant", "content": 5}],
        [{"role": "system", "content": [image]}],  # an image in a system message would be ignored
    )
    for bad in refused:
        with pytest.raises(InputError):
            model().chat(messages=bad)
    answer = {"role": "assistant", "content": [image, "This."]}
    chat = model().chat(messages=[question, answer], max_tokens=TOKENS, sampling=GREEDY)
    for text, images in (("And?", []), ("And this?", [picture(96, 64)])):
        expected = wanted(chat, asked(text, images), reference(TINY))
        assert chat.ask(text, images).tokens == expected


def test_a_long_conversation_is_read_turn_by_turn(model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    render, rendered = ChatTemplate.render, [0]

    def counted(self: Any, messages: Any, **options: Any) -> str:
        rendered[0] += len(messages)
        return render(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    messages = [asked("What?", []), {"role": "assistant", "content": "A cat."}] * 100
    chat = model().chat(messages=messages)
    assert rendered[0] < 500
    assert chat.tokens == model().prompt([*messages, asked("?", [])]).input_ids.size


def test_an_image_file_that_changes_is_not_read_again(model: Callable[..., Model], tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.fromarray(picture(96, 64)).save(file)
    chats = [model().chat(max_tokens=TOKENS, sampling=GREEDY) for _ in range(2)]
    for chat in chats:
        chat.ask("What is this?", [file])
    expected = chats[0].ask("And this?", [picture(64, 64)]).tokens
    Image.fromarray(picture(128, 32)).save(file)
    assert chats[1].ask("And this?", [picture(64, 64)]).tokens == expected


def test_a_text_package(model: Callable[..., Model], reference: Callable[[Tiny], Reference], made: list[str]) -> None:
    chat = model(TINY, part="text").chat(max_tokens=TOKENS, sampling=GREEDY)
    for text in ("Hello", "And?"):
        expected = wanted(chat, asked(text, []), reference(TINY))
        assert chat.ask(text).tokens == expected
    assert made == ["generator"]
    with pytest.raises(InputError, match="takes no images"):
        chat.ask("What?", [picture(64, 64)])


def test_digits(tmp_path: Path) -> None:
    """A trained model is asked in a new conversation each time, because it was not trained on conversations."""
    model = vlpack.load(vlpack.build(DIGITS, tmp_path / "package").folder)
    chat = model.chat(sampling=GREEDY)
    for image in ("01.png", "05.png"):
        chat.reset()
        answer = chat.ask(READ, [IMAGES / image])
        assert (answer.text, answer.finish_reason) == (ANSWERS[image]["read"], "stop")
        chat.ask(COUNT)
        assert chat.turns[1].tokens < chat.turns[0].tokens


THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content if m.content is string else m.content[0].text }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


def test_reasoning_is_not_part_of_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    (source / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    model = vlpack.load(vlpack.build(source, tmp_path / "package", precision="fp32").folder)
    chat = model.chat(max_tokens=8, sampling=GREEDY)
    answer = chat.ask("Think.")
    assert answer.text  # the reasoning never ends
    assert chat.messages[1] == {"role": "assistant", "content": "", "reasoning_content": answer.text.strip("\n")}
    chat.turns[0].assistant = {"role": "assistant", "content": "Thought.", "reasoning_content": "Long."}
    again = chat.ask("And?")
    # the cache is rewound to before the reasoning, and gets the answer alone
    assert made == ["generator"]
    assert 0 < again.stats.reused_tokens < answer.stats.prompt_tokens
    fresh = model.chat(messages=chat.messages[:2], max_tokens=8, sampling=GREEDY)
    assert "Long." not in fresh._prompt(fresh.turns).text
    assert fresh.ask("And?").tokens == again.tokens


def test_options_of_wrong_types(model: Callable[..., Model]) -> None:
    with pytest.raises(OptionError, match="max_tokens"):
        model().chat(max_tokens=0)
    with pytest.raises(OptionError, match="context"):
        model().chat(context=1)
    with pytest.raises(OptionError, match="temperature"):
        model().chat(sampling=Sampling(temperature=-1))
