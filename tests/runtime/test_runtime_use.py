"""vlpack as a library: build, load, generate, stream, inspect."""

from __future__ import annotations

import _thread
import dataclasses
import gc
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
from PIL import Image

import vlpack
from samples import ANSWERS, COUNT, DIGITS, IMAGES, READ, copy_digits, edit_json, seal
from vlpack.errors import InputError, OptionError, PackageError
from vlpack.runtime import model as runtime
from vlpack.runtime.stage_clock import StageClock

GREEDY = vlpack.Sampling(temperature=0)
WILD = 5.0
"""A temperature so high that the trained checkpoint's answers vary."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlpack.build(DIGITS, tmp_path_factory.mktemp("package") / "digits").folder


@pytest.fixture(scope="module")
def model(package: Path) -> vlpack.Model:
    return vlpack.Model(package)


def read(model: Any, image: str, **options: Any) -> vlpack.Answer:
    return model.generate(READ, [IMAGES / image], sampling=GREEDY, **options)


def test_the_public_api() -> None:
    for name in vlpack.__all__:
        assert getattr(vlpack, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vlpack.nothing  # noqa: B018
    assert list(inspect.signature(vlpack.build).parameters)[:2] == ["source", "output"]


def test_build_load_generate_inspect(tmp_path: Path) -> None:
    result = vlpack.build(DIGITS, tmp_path / "package", precision="int4")
    assert result.total_bytes < result.source_bytes
    assert result.notes == ()
    answer = vlpack.load(result.folder).generate(READ, [IMAGES / "02.png"])
    assert answer.text == ANSWERS["02.png"]["read"]
    assert vlpack.inspect(result.folder)["precision"] == "int4"


def test_strings_are_paths_too(package: Path) -> None:
    answer = vlpack.load(str(package)).generate(COUNT, [str(IMAGES / "00.png")], sampling=GREEDY)
    assert answer.text == ANSWERS["00.png"]["count"]


def test_every_kind_of_image_gives_the_same_answer(model: vlpack.Model) -> None:
    path = IMAGES / "03.png"
    expected = read(model, "03.png").tokens
    image = Image.open(path)
    messages = [{"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": READ}]}]
    for source in (path.read_bytes(), image, np.asarray(image.convert("RGB"))):
        assert model.generate(READ, [source], sampling=GREEDY).tokens == expected
    assert model.generate(messages, sampling=GREEDY).tokens == expected


def test_the_stream_is_the_answer_in_pieces(model: vlpack.Model) -> None:
    whole = read(model, "01.png")
    stream = model.stream(READ, [IMAGES / "01.png"], sampling=GREEDY)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == whole.text == stream.answer.text == ANSWERS["01.png"]["read"]
    assert stream.answer.tokens == whole.tokens
    assert next(stream, "over") == "over"


def test_pieces_arrive_while_the_answer_is_generated(model: vlpack.Model) -> None:
    stream = model.stream(READ, [IMAGES / "01.png"], sampling=GREEDY)
    next(stream)
    assert len(stream.answer.tokens) < len(read(model, "01.png").tokens)


def test_a_stopped_stream_frees_the_generator(model: vlpack.Model) -> None:
    def generators() -> int:
        gc.collect()
        return sum(isinstance(thing, og.Generator) for stream in streams for thing in locals_of(stream))

    def locals_of(stream: Any) -> list[Any]:
        inner = stream._pieces.gi_yieldfrom  # the inner generator must end with the outer one
        return list(inner.gi_frame.f_locals.values()) if inner else []

    expected = read(model, "01.png").tokens
    streams = [model.stream(READ, [IMAGES / "01.png"], sampling=GREEDY) for _ in range(2)]
    for stream in streams:
        next(stream)
    assert generators() == 2
    streams[0].close()
    assert generators() == 1
    assert next(streams[0], "over") == "over"
    assert read(model, "01.png").tokens == expected
    "".join(streams[1])  # the waiting stream is not disturbed
    assert streams[1].answer.tokens == expected
    for piece in model.stream(READ, [IMAGES / "01.png"], sampling=GREEDY):
        assert piece
        break
    assert read(model, "00.png").text == ANSWERS["00.png"]["read"]


def test_an_interrupted_answer_leaves_the_model_usable(tmp_path: Path) -> None:
    """Control-C at any moment, also while the runtime computes, and errors in the code that reads the stream."""
    source = copy_digits(tmp_path / "checkpoint")
    edit_json(
        source / "generation_config.json", "eos_token_id", value=2175
    )  # an end token that the model never chooses
    model = vlpack.load(vlpack.build(source, tmp_path / "package").folder)
    expected = read(model, "01.png", max_tokens=8).tokens

    def interrupted(wait: float) -> None:
        threading.Timer(wait, _thread.interrupt_main).start()
        read(model, "01.png", max_tokens=4000)

    for wait in (0.0, 0.05, 0.3):
        with pytest.raises(KeyboardInterrupt):
            interrupted(wait)
        assert read(model, "01.png", max_tokens=8).tokens == expected
    stream = model.stream(READ, [IMAGES / "01.png"], sampling=GREEDY, max_tokens=8)

    def broken_reader() -> None:
        for _ in stream:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        broken_reader()
    assert read(model, "01.png", max_tokens=8).tokens == expected
    assert "".join(stream)  # the stream waited and can still be read
    assert stream.answer.tokens == expected


def test_two_conversations_at_once(model: vlpack.Model) -> None:
    found: dict[str, str] = {}

    def work(image: str) -> None:
        found[image] = read(model, image).text

    threads = [threading.Thread(target=work, args=(image,)) for image in list(ANSWERS)[:6]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {image: ANSWERS[image]["read"] for image in list(ANSWERS)[:6]}


def test_a_seed_gives_the_same_answer_again(package: Path, model: vlpack.Model) -> None:
    def answer(used: vlpack.Model, seed: int) -> list[int]:
        sampling = vlpack.Sampling(temperature=WILD, top_k=100, seed=seed)
        return used.generate(READ, [IMAGES / "00.png"], sampling=sampling, max_tokens=12).tokens

    first = [answer(model, seed) for seed in range(5)]
    assert [answer(model, seed) for seed in range(5)] == first
    assert len({tuple(tokens) for tokens in first}) > 1
    assert answer(vlpack.Model(package), 3) == first[3]


def test_sampling_options_have_their_effect(model: vlpack.Model) -> None:
    greedy = read(model, "01.png").tokens

    def answers(**options: Any) -> set[tuple[int, ...]]:
        return {
            tuple(
                model.generate(
                    READ, [IMAGES / "01.png"], sampling=vlpack.Sampling(seed=seed, **options), max_tokens=8
                ).tokens
            )
            for seed in range(6)
        }

    assert len(answers(temperature=WILD)) > 1
    assert answers(temperature=WILD, top_k=1) == {tuple(greedy[:8])}
    assert answers(temperature=WILD, top_p=1e-6) == {tuple(greedy[:8])}
    assert answers(repetition_penalty=50.0) != {tuple(greedy[:8])}
    assert len(answers(temperature=WILD, top_k=10**9)) > 1  # larger than the vocabulary


def test_max_tokens(model: vlpack.Model) -> None:
    whole = read(model, "01.png")
    assert whole.finish_reason == "stop"
    assert whole.stats.new_tokens == len(whole.tokens)
    for count in (1, 3, len(whole.tokens) - 1):
        short = read(model, "01.png", max_tokens=count)
        assert (short.finish_reason, short.tokens) == ("length", whole.tokens[:count])
    assert read(model, "01.png", max_tokens=len(whole.tokens)).finish_reason == "stop"
    assert read(model, "01.png", max_tokens=10**9).tokens == whole.tokens


def test_an_answer_ends_at_the_end_of_the_context(tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    edit_json(source / "config.json", "text_config", "max_position_embeddings", value=29)
    model = vlpack.Model(vlpack.build(source, tmp_path / "package").folder)
    prompt = model.prompt(READ, [IMAGES / "01.png"]).input_ids.shape[1]
    answer = read(model, "01.png")
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 29 - prompt)
    with pytest.raises(InputError) as caught:
        model.generate(READ + " Carefully." * 5, [IMAGES / "01.png"])
    assert re.fullmatch(
        r"The prompt has 5\d tokens, 2\d more than fit the model's context. Its image takes 6 of them, but without "
        "images it would not fit either.",
        caught.value.message,
    )
    with pytest.raises(InputError, match=r"Its 4 images take 24 of them; without the last 4 it would fit") as caught:
        model.generate(READ, [IMAGES / "01.png"] * 4)
    assert "max_pixels" in str(caught.value.hint)
    assert read(model, "05.png").text == ANSWERS["05.png"]["read"]  # the model still works afterwards


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_k": 2**31},
        {"top_p": 0},
        {"top_p": 1.01},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"seed": 2**31},
        {"seed": 1.5},
    ],
)
def test_sampling_out_of_range(model: vlpack.Model, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=f"{name} is .*; it must be"):
        model.generate("Hello", sampling=vlpack.Sampling(**options))


@pytest.mark.parametrize("max_tokens", [0, -1, 1.5, True, "5"])
def test_max_tokens_out_of_range(model: vlpack.Model, max_tokens: Any) -> None:
    with pytest.raises(OptionError, match="max_tokens"):
        model.generate("Hello", max_tokens=max_tokens)


def test_temperature_zero_excludes_other_sampling_options(model: vlpack.Model) -> None:
    for options in ({"top_k": 5}, {"top_p": 0.5}):
        with pytest.raises(OptionError, match="no effect"):
            model.generate("Hello", sampling=vlpack.Sampling(temperature=0, **options))  # type: ignore[arg-type]
    assert vlpack.Sampling(temperature=0, seed=5).search_options()["do_sample"] is False


def test_the_packages_own_settings_are_used(tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    edit_json(source / "generation_config.json", "do_sample", value=True)
    edit_json(source / "generation_config.json", "temperature", value=WILD)
    edit_json(source / "generation_config.json", "top_k", value=10**6)  # larger than the runtime accepts
    model = vlpack.load(vlpack.build(source, tmp_path / "package").folder)
    image = [IMAGES / "01.png"]
    answers = [model.generate(READ, image, max_tokens=8, sampling=vlpack.Sampling(seed=seed)).text for seed in range(5)]
    assert len(set(answers)) > 1
    assert read(model, "01.png").text == ANSWERS["01.png"]["read"]


def test_every_end_token_ends_an_answer(tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    line_break = read(vlpack.load(vlpack.build(source, tmp_path / "first").folder), "00.png").tokens[1]
    edit_json(source / "generation_config.json", "eos_token_id", value=[2050, line_break])
    answer = read(vlpack.load(vlpack.build(source, tmp_path / "second").folder), "00.png")
    assert (answer.tokens[-1], len(answer.tokens), answer.finish_reason) == (line_break, 2, "stop")
    assert answer.text == "3"


def test_statistics(model: vlpack.Model) -> None:
    stats = read(model, "01.png", timing=True).stats
    assert stats.prompt_tokens > stats.image_tokens > 0
    assert stats.preprocess_seconds
    assert stats.vision_seconds
    assert stats.prefill_seconds
    assert stats.vision_seconds + stats.prefill_seconds + stats.preprocess_seconds == pytest.approx(
        stats.first_token_seconds
    )
    assert stats.tokens_per_second > 0
    assert stats.peak_memory > 1e6
    text = model.generate("Hello", max_tokens=2).stats
    assert (text.image_tokens, text.vision_seconds) == (0, 0)
    assert text.prefill_seconds  # without images, the time is known without the runtime's log


def test_the_runtime_s_log_is_used_only_for_timing(package: Path) -> None:
    model = vlpack.load(package, vision_provider="runtime")
    heard: list[str] = []
    og.set_log_callback(heard.append)
    og.set_log_options(enabled=True, model_output_shapes=True)
    try:
        stats = read(model, "01.png").stats
        assert "image_features" in "".join(heard)
        # a figure that was not measured is None and not 0
        assert (stats.vision_seconds, stats.prefill_seconds) == (None, None)
        assert stats.first_token_seconds > 0
        heard.clear()
        read(model, "01.png", timing=True)
        assert heard == []
    finally:
        og.set_log_options(enabled=False, model_output_shapes=False)
        og.set_log_callback(None)


def test_only_one_of_two_simultaneous_answers_is_timed(package: Path) -> None:
    model = vlpack.load(package, vision_provider="runtime")
    with StageClock(True):
        stats = read(model, "01.png", timing=True).stats
    assert stats.vision_seconds is None


# finished prompts


def test_a_finished_prompt_gives_the_same_answer(model: vlpack.Model) -> None:
    expected = read(model, "01.png").tokens
    prompt = model.prompt(READ, [IMAGES / "01.png"])
    answer = model.generate(prompt, sampling=GREEDY)
    assert answer.tokens == expected
    assert answer.stats.preprocess_seconds is None
    assert "".join(model.stream(prompt, sampling=GREEDY)) == answer.text


def test_a_prompt_with_variables_of_the_template(tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    template = source / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if enable_thinking is false %}4{% endif %}{{ tools[0].name }}")
    model = vlpack.Model(vlpack.build(source, tmp_path / "package").folder)
    prompt = model.prompt(READ, [IMAGES / "01.png"], enable_thinking=False, tools=[{"name": "17"}])
    assert prompt.text.endswith("417")
    assert model.generate(prompt, max_tokens=2).stats.prompt_tokens == prompt.input_ids.shape[1]


def test_arguments_that_a_finished_prompt_excludes(model: vlpack.Model, tmp_path: Path) -> None:
    prompt = model.prompt(READ, [IMAGES / "01.png"])
    with pytest.raises(InputError, match="images would have no effect"):
        model.generate(prompt, [IMAGES / "01.png"])
    with pytest.raises(InputError, match="allow_private_urls would have no effect"):
        model.generate(prompt, allow_private_urls=True)
    text = vlpack.load(vlpack.build(DIGITS, tmp_path / "text", part="text").folder)
    with pytest.raises(InputError, match="no vision part"):
        text.generate(prompt)
    assert text.generate(model.prompt("Hello"), max_tokens=2).tokens
    foreign = dataclasses.replace(model.prompt("Hello"), input_ids=np.full((1, 3), 2176, np.int32))
    with pytest.raises(InputError, match="tokens that the package does not know"):
        model.generate(foreign)


# other providers, cores, home


@pytest.mark.parametrize(
    ("provider", "wheel"),
    [
        ("cuda", "onnxruntime-genai-cuda in place"),
        ("dml", "onnxruntime-genai-winml in place"),
        ("webgpu", "a build of onnxruntime-genai with webgpu in place"),
    ],
)
def test_the_wheel_of_another_provider_is_named(provider: str, wheel: str, tmp_path: Path) -> None:
    folder = vlpack.build(DIGITS, tmp_path / "package", execution_provider=provider, part="text").folder
    with pytest.raises(PackageError, match="The runtime cannot load") as caught:
        vlpack.load(folder)
    assert f"The package is for {provider}: install {wheel}" in str(caught.value.hint)


def test_no_other_wheel_for_a_broken_cpu_package(package: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(package, tmp_path / "package")
    graph = broken / "decoder.onnx"
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[0].op_type = "Unknown"
    onnx.save(model, graph)
    seal(broken)
    with pytest.raises(PackageError, match="The runtime cannot load") as caught:
        vlpack.load(broken)
    assert caught.value.hint is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_cores_are_those_of_the_process() -> None:
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from vlpack import builder, system\n"
        "assert (system.available_cores(), builder.default_threads(), system.checked_threads(None)) == (1, 1, 1)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_all_cores_are_the_runtime_s_threads(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("vlpack.system.available_cores", lambda: 3)
    monkeypatch.setattr(runtime, "load_model", lambda folder, model, threads, *others: seen.append(threads))
    vlpack.load(package)
    assert seen == [3]


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    copy_digits(tmp_path / "checkpoint")
    result = vlpack.build("~/checkpoint", "~/package")
    assert result.folder == tmp_path / "package"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "package"]
    assert vlpack.inspect("~/package")["problems"] == []
    assert vlpack.inspect("~/checkpoint")["kind"] == "checkpoint"
    assert vlpack.load("~/package").folder == tmp_path / "package"


def test_errors_of_the_runtime_become_package_errors(model: vlpack.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no memory for the cache\n")

    monkeypatch.setattr(runtime, "make_generator", fail)
    with pytest.raises(PackageError, match=r"The runtime failed: no memory for the cache$"):
        model.generate("Hello")


def test_an_old_runtime_is_reported(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(og, "__version__", "0.9.3")
    with pytest.raises(PackageError, match=r"0\.9\.3 is too old: packages need 0\.18"):
        vlpack.load(package)


def test_pixel_limits(package: Path) -> None:
    counts = [
        vlpack.Model(package, **limits).prompt(READ, [IMAGES / "00.png"]).num_image_tokens.sum()  # type: ignore[arg-type]
        for limits in ({}, {"max_pixels": 2048}, {"min_pixels": 65536})
    ]
    assert counts[1] < counts[0] < counts[2]
    with pytest.raises(OptionError):
        vlpack.load(package, min_pixels=5000, max_pixels=4000)
    with pytest.raises(OptionError, match="max_pixels is 10; the model's own min_pixels is 1024"):
        vlpack.load(package, max_pixels=10)
    with pytest.raises(OptionError, match="min_pixels is 262145; the model's own max_pixels is 262144"):
        vlpack.load(package, min_pixels=262145)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads(package: Path, threads: int) -> None:
    assert read(vlpack.load(package, threads=threads), "00.png").text == ANSWERS["00.png"]["read"]
    for wrong in (0, 100_000):
        with pytest.raises(OptionError, match="threads"):
            vlpack.load(package, threads=wrong)


def test_a_cache_beyond_the_machine_s_memory(model: vlpack.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    # a token takes fp32 keys and values of 6 layers with 2 heads of 128 channels
    assert model.cache_bytes(1000) == 2 * 6 * 2 * 128 * 4 * 1000
    monkeypatch.setattr("vlpack.runtime.model.total_memory_bytes", lambda: model.cache_bytes(2000))
    with pytest.raises(OptionError, match="cache for 4096 tokens") as caught:
        model.generate("Hi.", max_tokens=1_000_000)
    assert "smaller max_tokens" in str(caught.value)
    assert model.generate("Hi.", max_tokens=3).tokens


@pytest.mark.parametrize("hidden", [False, True])
def test_a_package_that_names_a_library(hidden: bool, package: Path, tmp_path: Path) -> None:
    hostile = shutil.copytree(package, tmp_path / "package")
    text = (hostile / "genai_config.json").read_text()
    clean = '"session_options": {'
    # hidden: a second, harmless object with the same key, which Python's json takes instead
    named = '"session_options": {"custom_ops_library": "x.so"' + ("}, " + clean if hidden else ", ")
    (hostile / "genai_config.json").write_text(text.replace(clean, named, 1))
    manifest = json.loads((hostile / "vlpack.json").read_text())
    manifest["files"]["genai_config.json"]["bytes"] = (hostile / "genai_config.json").stat().st_size
    (hostile / "vlpack.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match="session_options" if hidden else "custom_ops_library"):
        vlpack.load(hostile)


def test_without_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    monkeypatch.delitem(sys.modules, "vlpack.runtime.genai", raising=False)
    with pytest.raises(PackageError, match="not installed"):
        importlib.import_module("vlpack.runtime.genai")


@pytest.mark.parametrize(
    ("messages", "images"),
    [
        ([], []),
        ("Look.", [b"not an image"]),
        ([{"role": "user", "content": "Look."}], [IMAGES / "00.png"]),
        ([{"content": "Look."}], []),
        ({"role": "user", "content": "Look."}, []),
        ("<|image_pad|>", []),
    ],
)
def test_messages_that_cannot_be_used(model: vlpack.Model, messages: Any, images: list[Any]) -> None:
    if messages == "<|image_pad|>":
        messages = model.tokenizer.token(model.config["model"]["image_token_id"])
    with pytest.raises(InputError):
        model.generate(messages, images)
