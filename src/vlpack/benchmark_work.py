"""One work of `vlpack bench`, in a process of its own: ``python -m vlpack.benchmark_work JSON`` prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlpack.errors import InputError, VlpackError
from vlpack.memory import peak_memory_bytes, resident_memory_bytes
from vlpack.pictures import picture
from vlpack.preprocess import Prompt
from vlpack.runtime import Model

TEXT = "The river rose in the night, and by morning the lower fields stood under water. "
QUESTION = "What is shown here?"


def main() -> None:
    """Do the work that the first argument describes."""
    try:
        found = work(json.loads(sys.argv[1]))
    except VlpackError as error:
        found = {"kind": type(error).__name__, "error": error.message, "hint": error.hint}
    print(json.dumps(found))


def work(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Load the package and answer; lists of seconds by stage, one for each answer.

    The first answer is that of a fresh process. No two are to the same prompt or image, which a cache could know.
    """
    model = Model(asked["package"], threads=asked["threads"])
    load = model.load_seconds
    if "image" in asked and model.vision is not None:  # which would load it with the first answer
        started = time.perf_counter()
        model.vision.load()
        load += time.perf_counter() - started
    times: dict[str, list[float]] = {name: [] for name in ("first_token", "preprocess", "vision", "prefill", "token")}
    for number in range(asked["repeat"]):
        started = time.perf_counter()
        prompt = _prompt(model, asked, number)
        preprocess = time.perf_counter() - started if prompt.has_images else 0.0
        for name, seconds in _answer(model, prompt, asked["new"]).items():
            times[name].append(seconds)
        times["preprocess"].append(preprocess)
        times["first_token"].append(preprocess + times["vision"][-1] + times["prefill"][-1])
    tokens = prompt.input_ids.shape[1]
    resident = resident_memory_bytes()
    memory = {"resident": resident, "peak": max(peak_memory_bytes(), resident)}  # which the system counts apart
    return {"prompt_tokens": tokens, **times, **memory, "load": load}


def _prompt(model: Model, asked: Mapping[str, Any], number: int) -> Prompt:
    """The prompt of the answer with this number: its beginning, or its image, is no earlier one's."""
    if "image" in asked:
        width, height = asked["image"]
        prompt = model.prompt(QUESTION, [picture(width, height, 1 + number)])
    else:
        head = model.tokenizer.encode(f"{number}. ")
        body = np.resize(np.array(model.tokenizer.encode(TEXT), np.int32), asked["tokens"])  # repeated
        ids = np.concatenate([np.array(head, np.int32), body])[: asked["tokens"]]
        prompt = Prompt(ids[None], np.zeros(0, np.int64), None, None, "")
    room = model.context_length - asked["new"]
    if not 0 < prompt.input_ids.shape[1] <= room:
        raise InputError(
            f"A prompt of {prompt.input_ids.shape[1]} tokens and an answer of {asked['new']} do not fit the model's "
            f"context of {model.context_length}."
        )
    return prompt


def _answer(model: Model, prompt: Prompt, count: int) -> dict[str, float]:
    length = prompt.input_ids.shape[1] + count
    # the least length keeps an end token from ending the answer
    options = {"max_length": length, "min_length": length, "do_sample": False}
    if model.vision is not None:
        model.vision.forget()  # what it made of the image for the answer before
    started = time.perf_counter()
    generator, vision, _ = model.begin(prompt, options, timing=True)
    first = time.perf_counter()
    assert vision is not None, "nobody else in this process takes the runtime's log"
    for _ in range(count - 1):
        generator.generate_next_token()
    token = (time.perf_counter() - first) / (count - 1)
    return {"vision": vision, "prefill": first - started - vision, "token": token}


if __name__ == "__main__":
    main()
