"""Measures the time to the first token of a turn in a conversation with a model that has linear attention.

``kept`` is a turn of `vlpack.Chat`, which continues from the states near the end of the previous prompt. ``runtime`` is
the same prompt in the stock onnxruntime-genai, which computes it from the beginning. The first prompt has about
--tokens tokens; the measured turn adds the answer to it and a question of about --new tokens. Both alternate in one
process.

Usage: python benchmarks/turns.py PACKAGE [--tokens 1000] [--new 32] [--repeat 3] [--threads N]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from quiet import Others

from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling

GREEDY = Sampling(temperature=0)


def words(count: int, seed: int) -> str:
    """A random text of about ``count`` tokens; texts of different seeds differ from the beginning."""
    return " ".join(map(str, np.random.default_rng(seed).integers(10, 100, max(1, count // 3))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    model = Model(given.package, threads=given.threads, lazy=True)
    found: list[dict[str, Any]] = []
    with Others() as others:
        for number in range(given.repeat):
            chat = model.chat(max_tokens=8, sampling=GREEDY)
            first = chat.ask(words(given.tokens, 2 * number))
            question = words(given.new, 2 * number + 1)
            prompt = model.prompt([*chat.messages, {"role": "user", "content": question}])
            kept = chat.ask(question)
            whole = model.generate(prompt, max_tokens=8, sampling=GREEDY)
            found.append(
                {
                    "tokens": prompt.input_ids.size,
                    "reused": kept.stats.reused_tokens,
                    "first_turn": round(first.stats.first_token_seconds, 3),
                    "kept": round(kept.stats.first_token_seconds, 3),
                    "runtime": round(whole.stats.first_token_seconds, 3),
                    "token_kept": round(1 / kept.stats.tokens_per_second, 4),
                    "token_runtime": round(1 / whole.stats.tokens_per_second, 4),
                    "same_answer": kept.tokens == whole.tokens,
                }
            )
    print(json.dumps({"turns": found, "others": others.cores}, indent=1))


if __name__ == "__main__":
    main()
