"""Times a text decoder that onnxruntime_genai's own builder made: prefill and later tokens, through its own runtime.

Usage: python upstream_model.py FOLDER THREADS NEW_TOKENS REPEAT LENGTH [LENGTH ...]; prints one JSON line.
The model: python -m onnxruntime_genai.models.builder -i CHECKPOINT -o FOLDER -p int4 -e cpu
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np
import onnxruntime_genai as og

CLOCK = time.process_time if os.environ.get("COMPARE_PROCESSOR_TIME") else time.perf_counter


def resident() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))


def main() -> None:
    folder, threads, new, repeat = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    started = CLOCK()
    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    load = CLOCK() - started
    tokenizer = og.Tokenizer(model)
    words = tokenizer.encode("The river rose in the night, and by morning the lower fields lay low. ")
    works = []
    for length in map(int, sys.argv[5:]):
        found: dict[str, list[float]] = {"first_token": [], "token": []}
        for number in range(repeat):  # no two prompts have a common prefix
            ids = np.concatenate([tokenizer.encode(f"{number}. "), np.resize(np.array(words), length)])[:length]
            params = og.GeneratorParams(model)
            total = length + new
            params.set_search_options(max_length=total, min_length=total, do_sample=False)
            generator = og.Generator(model, params)
            started = CLOCK()
            generator.append_tokens(ids.astype(np.int32)[None])
            generator.generate_next_token()
            first = CLOCK()
            for _ in range(new - 1):
                generator.generate_next_token()
            found["first_token"].append(first - started)
            found["token"].append((CLOCK() - first) / (new - 1))
        works.append({"name": f"{length} tokens", "prompt_tokens": length, **found, "resident": resident()})
    print(json.dumps({"load": load, "works": works, "version": og.__version__}))


if __name__ == "__main__":
    main()
