"""Times OpenVINO GenAI's continuous batching on many prompts at once: seconds until all answers are there.

Usage: python openvino_many.py FOLDER THREADS NEW_TOKENS WORK REQUESTS [REQUESTS ...]   (WORK: 512, or 640x480)
Runs in an environment of its own: pip install openvino-genai==2026.4.1 numpy
Prints one JSON line. Every prompt is random words, so that none begins as another, or an image of noise and a question;
the template's tokens come on top.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as og


def main() -> None:
    folder, threads, new, work = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    scheduler = og.SchedulerConfig()
    scheduler.cache_size = 4  # GB
    pipe = og.ContinuousBatchingPipeline(folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
    config = og.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = new
    config.do_sample, config.ignore_eos = False, True
    tokenizer, rng, found = pipe.get_tokenizer(), np.random.default_rng(1), []
    for requests in [1, *map(int, sys.argv[5:])]:  # the first one is not counted
        prompts, images = ["What is shown here?"] * requests, [[] for _ in range(requests)]
        for number in range(requests):
            if "x" in work:
                width, height = map(int, work.split("x"))
                images[number] = [ov.Tensor(rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8))]
            else:
                words = " ".join(f"{word:x}" for word in rng.integers(4096, 65536, int(work)))
                prompts[number] = tokenizer.decode(tokenizer.encode(words).input_ids.data[0][: int(work)])
        began = time.perf_counter()
        results = pipe.generate(prompts, images=images, generation_config=[config] * requests)
        seconds = time.perf_counter() - began
        assert len(results) == requests
        speed = round(requests * new / seconds, 2)
        found.append({"requests": requests, "seconds": round(seconds, 2), "tokens_per_second": speed})
    print(json.dumps({"together": found[1:], "work": work, "version": og.__version__}))


if __name__ == "__main__":
    main()
