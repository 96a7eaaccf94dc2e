"""Times OpenVINO GenAI on a model that optimum-intel exported: prefill, later tokens, images to the first token.

Usage: python openvino_model.py FOLDER THREADS NEW_TOKENS REPEAT WORK [WORK ...]   (512, or 640x480)
Runs in an environment of its own: pip install openvino-genai==2026.4.1 numpy
Prints one JSON line. A prompt has a few tokens more than requested: those of the chat template.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as og


def resident() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))


def main() -> None:
    folder, threads, new, repeat = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    started = time.perf_counter()
    pipe = og.VLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
    load = time.perf_counter() - started
    config = og.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = new
    config.do_sample, config.ignore_eos = False, True
    tokenizer = pipe.get_tokenizer()
    text = "The river rose in the night, and by morning the lower fields stood under water. "
    works = []
    for work in sys.argv[5:]:
        found: dict[str, list[float]] = {"first_token": [], "token": []}
        count = 0
        for number in range(repeat):
            options = {}
            if "x" in work:
                width, height = map(int, work.split("x"))
                noise = np.random.default_rng(number).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
                prompt, options = "What is shown here?", {"images": [ov.Tensor(noise)]}
            else:  # no prompt shares a prefix with an earlier one, whose keys and values are cached
                ids = tokenizer.encode(f"{number}. " + text * (int(work) // 8)).input_ids.data[0][: int(work)]
                prompt = tokenizer.decode(ids)
            result = pipe.generate(prompt, generation_config=config, **options)
            metrics = result.perf_metrics
            found["first_token"].append(metrics.get_ttft().mean / 1000)
            found["token"].append(metrics.get_tpot().mean / 1000)
            count = metrics.get_num_input_tokens()
        name = work if "x" in work else f"{work} tokens"
        works.append({"name": name, "prompt_tokens": count, **found, "resident": resident()})
    print(json.dumps({"load": load, "works": works, "version": og.__version__}))


if __name__ == "__main__":
    main()
