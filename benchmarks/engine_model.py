"""Measures one task in vlpack's engine, for compare.py: the times to first tokens, of later tokens, and memory.

If vlpack-kernels is installed, the engine uses its operators; VLPACK_KERNELS=0 turns them off.

Usage: python benchmarks/engine_model.py PACKAGE THREADS NEW_TOKENS REPEAT WORK   (WORK: 512, or 640x480)
Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time

import vlpack
from engine import GREEDY, prompts
from vlpack.sample_images import picture
from vlpack.system import resident_memory_bytes


def main() -> None:
    package, threads, new, repeat, work = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    began = time.perf_counter()
    with vlpack.Engine(package, slots=1, context=8192 + 2 * new, threads=threads, speculation=False) as engine:
        load, first, token, size = time.perf_counter() - began, [], [], 0
        for number in range(repeat):
            if "x" in work:
                width, height = map(int, work.split("x"))
                asked = engine.prompt("What is shown here?", [picture(width, height, 1 + number)])
            else:
                asked = prompts(engine, 1, int(work), None, number)[0]
            size = asked.input_ids.size
            answer = engine.submit(asked, max_tokens=new, sampling=GREEDY).result()
            first.append(answer.stats.first_token_seconds)
            token.append(answer.stats.decode_seconds / max(1, len(answer.tokens) - 1))
        found = {"prompt_tokens": size, "first_token": first, "token": token, "resident": resident_memory_bytes()}
    print(json.dumps({"load": load, "works": [found], "version": vlpack.__version__}))


if __name__ == "__main__":
    main()
