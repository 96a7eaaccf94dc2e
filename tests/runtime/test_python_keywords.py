"""The Python functions have named keyword arguments, so that editors complete them and typos are errors."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vlpack
import vlpack.runtime.chat
from samples import ANSWERS, DIGITS, IMAGES, READ
from vlpack.errors import OptionError
from vlpack.runtime.stopping import StopTexts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vlpack.load(vlpack.build(DIGITS, tmp_path_factory.mktemp("package") / "digits", precision="int4").folder)


def test_load_names_its_options(model: Any, tmp_path: Path) -> None:
    assert list(inspect.signature(vlpack.load).parameters) == [
        "folder",
        "threads",
        "min_pixels",
        "max_pixels",
        "vision_provider",
    ]
    with pytest.raises(TypeError, match=r"load\(\) got an unexpected keyword argument 'max_pixel'"):
        vlpack.load(model.folder, max_pixel=5)  # type: ignore[call-arg]
    embedding = vlpack.build(DIGITS, tmp_path / "package", precision="int4", task="embedding").folder
    assert vlpack.load(embedding, threads=1, max_pixels=100_000)
    with pytest.raises(OptionError, match="vision_provider has no effect"):
        vlpack.load(embedding, vision_provider="cpu")


def test_chat_names_its_options(model: Any) -> None:
    own, made = (inspect.signature(call).parameters for call in (model.chat, vlpack.runtime.chat.Chat))
    assert [*own.values()] == [*made.values()][1:]  # parameters with their defaults
    chat = model.chat(system="Be brief.", max_tokens=3, context=99, messages=[], special_tokens="text")
    assert (chat.system, chat.max_tokens, chat.context) == ("Be brief.", 3, 99)


def test_sampling_without_an_object(model: Any) -> None:
    image, question = [IMAGES / "02.png"], READ
    assert model.generate(question, image, temperature=0).text == ANSWERS["02.png"]["read"]
    chosen = vlpack.Sampling(temperature=5.0, top_k=50, top_p=0.99, repetition_penalty=1.1, seed=7)
    whole = model.generate(question, image, sampling=chosen, max_tokens=20).tokens
    options = {"temperature": 5.0, "top_k": 50, "top_p": 0.99, "repetition_penalty": 1.1, "seed": 7}
    assert model.generate(question, image, **options, max_tokens=20).tokens == whole
    assert model.stream(question, image, **options, max_tokens=20).close() is None
    with pytest.raises(OptionError, match="sampling and temperature, seed are both given"):
        model.generate(question, image, sampling=chosen, temperature=0, seed=1)
    with pytest.raises(OptionError, match="temperature is -1"):
        model.generate(question, image, temperature=-1)


def test_an_answer_stops_at_a_text(model: Any) -> None:
    image = [IMAGES / "02.png"]
    whole = model.generate(READ, image, temperature=0)
    end = whole.text[1:]
    for stop in ([end], end, ["never", end], [whole.text[1]]):
        answer = model.generate(READ, image, temperature=0, stop=stop)
        assert answer.text == whole.text[:1]
        assert answer.finish_reason == "stop"
        assert len(answer.tokens) < len(whole.tokens)
        stream = model.stream(READ, image, temperature=0, stop=stop)
        assert "".join(stream) == answer.text
    assert model.generate(READ, image, temperature=0, stop=["never"]).text == whole.text
    for wrong in ([""], [1], 5, {"a"}, None):
        with pytest.raises(OptionError, match="stop is"):
            model.generate(READ, image, stop=wrong)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_in_pieces(pieces: list[str], stops: list[str]) -> None:
    texts, out, stopped = StopTexts(stops), "", False
    for piece in pieces:
        text, stopped = texts.push(piece)
        out += text
        if stopped:
            break
    out += texts.flush()
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert stopped == bool(places)
    if stopped:  # a longer stop text that begins earlier may be complete only after the answer has ended
        assert any(whole.startswith(out + stop) for stop in stops)
        assert len(out) >= min(places)
    else:
        assert out == whole
