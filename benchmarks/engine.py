"""Measures many requests at once in `vlpack.Engine`, compared with the same requests one at a time in `vlpack.load`.

Every prompt consists of random words, so that no two have a common prefix. For each number of requests, it measures the
seconds until all answers are finished, the total number of tokens per second, and the time of a decoding step when all
answers are running. Before, the requests run one at a time in the same process, with only one of the two in memory.
``others`` is the number of cores that other programs kept busy meanwhile: repeat the run if it is above about 0.1.

``decoding`` includes how many draft tokens were checked and accepted; ``--no-speculation`` turns drafting off.
``seen_prefix`` is the time to the first token of a question whose conversation so far is in a slot already.

With ``--long N`` a prompt of N tokens arrives while one answer is running; the times between that answer's tokens are
measured before and during the processing of the prompt.

Usage: python benchmarks/engine.py PACKAGE [--requests 1 2 4 8] [--prompt 512] [--new 64] [--threads N] [--image WxH]
       [--long 2048] [--stall 4] [--no-speculation] [--skip-alone] [--output result.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from quiet import Others

import vlpack
from vlpack.evaluation.benchmark import machine
from vlpack.preprocess import Prompt
from vlpack.sample_images import picture

GREEDY = vlpack.Sampling(temperature=0)


def prompts(maker: Any, count: int, size: int, image: str | None, seed: int) -> list[Prompt]:
    """Prompts of one question each: random words, and an image if its size is given."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        words = " ".join(f"{word:x}" for word in rng.integers(4096, 65536, size))
        images = [picture(*map(int, image.split("x")), seed + number)] if image else []
        prompt = maker.prompt(words, images)
        surplus = prompt.input_ids.size - size
        if not image and surplus > 0:  # removes words and not the end, which belongs to the template
            ids = prompt.input_ids[0]
            half = len(ids) // 2 - surplus // 2
            ids = np.concatenate([ids[:half], ids[half + surplus :]])
            prompt = Prompt(ids[None], prompt.num_image_tokens, None, None, prompt.text)
        made.append(prompt)
    return made


def together(engine: vlpack.Engine, asked: list[Prompt], new: int) -> dict[str, Any]:
    """Measures all requests at the same time."""
    began = time.perf_counter()
    with Others() as others:
        handles = [engine.submit(prompt, max_tokens=new, sampling=GREEDY) for prompt in asked]
        answers = [handle.result() for handle in handles]
    seconds = time.perf_counter() - began
    tokens = sum(len(answer.tokens) for answer in answers)
    slowest = max(answer.stats.decode_seconds / max(1, len(answer.tokens) - 1) for answer in answers)
    firsts = [round(answer.stats.first_token_seconds, 2) for answer in answers]
    return {
        "requests": len(asked),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 2),
        "first_token_seconds": [min(firsts), max(firsts)],
        "slowest_token_seconds": round(slowest, 4),
        "others": others.cores,
    }


def steps(engine: vlpack.Engine, asked: list[Prompt], new: int) -> dict[str, Any]:
    """Measures decoding alone: answers to prompts that the slots contain already."""
    before = dataclasses.replace(engine.counters)
    began = time.perf_counter()
    with Others() as others:
        handles = [engine.submit(prompt, max_tokens=new, sampling=GREEDY) for prompt in asked]
        tokens = sum(len(handle.result().tokens) for handle in handles)
    seconds = time.perf_counter() - began
    return {
        "requests": len(asked),
        "tokens_per_second": round(tokens / seconds, 2),
        "step_milliseconds": round(1e3 * seconds / max(1, engine.counters.steps - before.steps), 1),
        "guessed": engine.counters.drafted_tokens - before.drafted_tokens,
        "right": engine.counters.accepted_tokens - before.accepted_tokens,
        "others": others.cores,
    }


def seen_prefix(engine: vlpack.Engine, size: int) -> dict[str, Any]:
    """The first token of an answer to a second question, after a conversation of ``size`` tokens."""
    asked = prompts(engine, 1, size, None, 77)[0]
    answer = engine.submit(asked, max_tokens=8, sampling=GREEDY).result()
    question = engine.prompts.tokenizer.encode(" And what else does it say?")[:8]
    ids = np.concatenate([asked.input_ids[0], np.array([*answer.tokens, *question], asked.input_ids.dtype)])
    handle = engine.submit(Prompt(ids[None], asked.num_image_tokens, None, None, ""), max_tokens=1, sampling=GREEDY)
    stats = handle.result().stats
    return {
        "new_tokens": stats.prompt_tokens - stats.reused_tokens,
        "first_token_seconds": round(stats.first_token_seconds, 3),
    }


def meanwhile(engine: vlpack.Engine, short: Prompt, long: Prompt) -> dict[str, Any]:
    """Measures the times between an answer's tokens before a long prompt arrives and while it is processed."""
    times: list[float] = []
    handle = engine.submit(short, max_tokens=4000, sampling=GREEDY)
    arrived = None
    for _ in handle:
        times.append(time.perf_counter())
        if len(times) == 20:
            began = time.perf_counter()
            arrived = engine.submit(long, max_tokens=1, sampling=GREEDY)
        if arrived is not None and arrived.done:
            break
    handle.cancel()
    gaps = [after - before for before, after in pairwise(times)]
    return {
        "alone": round(float(np.median(gaps[:19])), 3),
        "mean": round(float(np.mean(gaps[20:])), 3),
        "most": round(max(gaps[20:]), 3),
        "long_prompt_seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("package", type=Path)
    arguments.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments.add_argument("--prompt", type=int, default=512, help="tokens of each prompt without an image")
    arguments.add_argument("--new", type=int, default=64, help="tokens of each answer")
    arguments.add_argument("--threads", type=int)
    arguments.add_argument("--image", metavar="WxH", help="size of an image in each prompt, whose text is then short")
    arguments.add_argument("--long", type=int, help="tokens of a prompt that arrives while an answer is running")
    arguments.add_argument(
        "--stall", type=float, default=4.0, help="as in vlpack.Engine; inf gives the highest throughput"
    )
    arguments.add_argument("--no-speculation", action="store_true", help="turn speculation off")
    arguments.add_argument("--skip-alone", action="store_true", help="do not measure vlpack.load")
    arguments.add_argument("--output", type=Path)
    given = arguments.parse_args()
    size = 16 if given.image else given.prompt
    result: dict[str, Any] = {"machine": machine(), "package": given.package.name, "prompt": size, "new": given.new}
    if not given.skip_alone:
        model = vlpack.load(given.package, threads=given.threads)
        assert isinstance(model, vlpack.Model)
        asked = prompts(model, 2, size, given.image, 1)
        began = time.perf_counter()
        with Others() as others:
            tokens = sum(len(model.generate(p, max_tokens=given.new, sampling=GREEDY).tokens) for p in asked)
        speed = round(tokens / (time.perf_counter() - began), 2)
        result["one_at_a_time"] = {"tokens_per_second": speed, "others": others.cores}
        print("one at a time:", json.dumps(result["one_at_a_time"]), flush=True)
        del model
    context = max(given.prompt + given.new, given.long or 0, 1024) + 1024
    result["together"], result["decoding"] = [], []
    options = {"slots": max(given.requests), "context": context, "threads": given.threads, "stall": given.stall}
    options |= {"speculation": False} if given.no_speculation else {}
    with vlpack.Engine(given.package, **options) as engine:
        for number, count in enumerate(given.requests):
            asked = prompts(engine, count, size, given.image, 100 * (number + 1))
            for name, measure in (("together", together), ("decoding", steps)):
                result[name].append(measure(engine, asked, given.new))
                print(f"{name}:", json.dumps(result[name][-1]), flush=True)
        if not given.image:
            result["seen_prefix"] = seen_prefix(engine, size)
            print("seen prefix:", json.dumps(result["seen_prefix"]), flush=True)
        if given.long:
            (short,), (long,) = (prompts(engine, 1, n, None, n) for n in (32, given.long))
            result["meanwhile"] = meanwhile(engine, short, long)
            print("meanwhile:", json.dumps(result["meanwhile"]))
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
