"""The worker process of `vlpack bench`, which measures one prompt.

`main` takes the description of the prompt as JSON, the only argument of the process, and prints the result as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlpack.errors import InputError, VlpackError, option
from vlpack.preprocess import Prompt
from vlpack.runtime.model import Model
from vlpack.sample_images import picture
from vlpack.system import peak_memory_bytes, resident_memory_bytes

TEXT = "The river rose in the night, and by morning the lower fields stood under water. "
QUESTION = "What is shown here?"


def main() -> None:
    """Measure the prompt that the first argument describes, and print the result or the error."""
    try:
        found = work(json.loads(sys.argv[1]))
    except VlpackError as error:
        found = {"kind": type(error).__name__, "error": error.message, "hint": error.hint}
    print(json.dumps(found))


def work(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Load the package, answer prompts of one kind, and measure time and memory.

    The first answer is that of a fresh process. No prompt or image is repeated, because a cache could contain it.

    Returns:
        lists of seconds by stage, with one item per answer; load time, memory in bytes, and the prompt's tokens.
    """
    model = Model(asked["package"], threads=asked["threads"])
    load = model.load_seconds
    if "image" in asked and model.vision is not None:  # otherwise the first answer would load it
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
    memory = {"resident": resident, "peak": max(peak_memory_bytes(), resident)}  # the system counts the two separately
    return {"prompt_tokens": tokens, **times, **memory, "load": load}


def _prompt(model: Model, asked: Mapping[str, Any], number: int) -> Prompt:
    """The prompt for the answer with a number. No other number has the same beginning or image."""
    if "image" in asked:
        width, height = asked["image"]
        prompt = model.prompt(QUESTION, [picture(width, height, 1 + number)])
    else:
        head = model.tokenizer.encode(f"{number}. ")
        body = np.resize(np.array(model.tokenizer.encode(TEXT), np.int32), asked["tokens"])  # repeated to the length
        ids = np.concatenate([np.array(head, np.int32), body])[: asked["tokens"]]
        prompt = Prompt(ids[None], np.zeros(0, np.int64), None, None, "")
    room = model.context_length - asked["new"]
    if not 0 < prompt.input_ids.shape[1] <= room:
        raise InputError(
            f"A prompt of {prompt.input_ids.shape[1]} tokens and an answer of {asked['new']} do not fit into the "
            f"model's context of {model.context_length} tokens.",
            f"Give smaller {option('prompt_tokens')} or {option('new_tokens')}.",
        )
    return prompt


def _answer(model: Model, prompt: Prompt, count: int) -> dict[str, float]:
    length = prompt.input_ids.shape[1] + count
    # min_length keeps end tokens from ending the answer
    options = {"max_length": length, "min_length": length, "do_sample": False}
    if model.vision is not None:
        model.vision.forget()  # the features that it kept from the previous answer
    started = time.perf_counter()
    generator, vision, _ = model.begin(prompt, options, timing=True)
    first = time.perf_counter()
    assert vision is not None, "another user of the runtime's log in this process"
    for _ in range(count - 1):
        generator.generate_next_token()
    token = (time.perf_counter() - first) / (count - 1)
    return {"vision": vision, "prefill": first - started - vision, "token": token}
