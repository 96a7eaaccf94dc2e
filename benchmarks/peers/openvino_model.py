"""Times OpenVINO GenAI on a model that optimum-intel exported: prefill, later tokens, images to the first token.

Usage: python openvino_model.py FOLDER THREADS NEW_TOKENS REPEAT WORK [WORK ...]   (512, or 640x480)
Runs in an environment of its own: pip install openvino-genai==2026.4.1 numpy
Prints one JSON line. A prompt has a few tokens more than requested: those of the chat template.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as og

PROCESSOR_TIME = bool(os.environ.get("COMPARE_PROCESSOR_TIME"))
CLOCK = time.process_time if PROCESSOR_TIME else time.perf_counter


def resident() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))


class Streamer(og.StreamerBase):
    """Appends the time of every token to a list, and turns no token into text."""

    def __init__(self, at: list[float]) -> None:
        super().__init__()
        self.at = at

    def write(self, token: int | list[int]) -> og.StreamingStatus:
        self.at += [CLOCK()] * (len(token) if isinstance(token, list) else 1)
        return og.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def main() -> None:
    folder, threads, new, repeat = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    started = CLOCK()
    pipe = og.VLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
    load = CLOCK() - started
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
            if PROCESSOR_TIME:  # the library's own metrics are the clock's
                at = [CLOCK()]
                options["streamer"] = Streamer(at)
            result = pipe.generate(prompt, generation_config=config, **options)
            metrics = result.perf_metrics
            if PROCESSOR_TIME:
                found["first_token"].append(at[1] - at[0])
                found["token"].append((at[-1] - at[1]) / (len(at) - 2))
            else:
                found["first_token"].append(metrics.get_ttft().mean / 1000)
                found["token"].append(metrics.get_tpot().mean / 1000)
            count = metrics.get_num_input_tokens()
        name = work if "x" in work else f"{work} tokens"
        works.append({"name": name, "prompt_tokens": count, **found, "resident": resident()})
    print(json.dumps({"load": load, "works": works, "version": og.__version__}))


if __name__ == "__main__":
    main()
