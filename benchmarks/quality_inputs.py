"""What every quality script measures with: two checkpoints of one real model, texts, fp32 logits, calibration texts.

The model is SmolLM2-135M-Instruct (tests/smollm2.py). The texts are those in benchmarks/texts, which were written for
this and are held out: neither vlpack nor a peer is calibrated on them. The calibration texts of the peers are what the
fp32 model itself writes, of the kind that `--calibrate self` makes, but four times as many and as long.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from quality_scores import CALIBRATION, MODELS, TOKENS, Array, reference_file

from vlpack.calibration.prompts import prompt_builder
from vlpack.preprocess.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TEXTS = Path(__file__).parent / "texts"
COUNT = 256
"""Tokens of each text, from its beginning."""
LENGTH = 256
"""Tokens of each calibration text at most."""
QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "Write a short story about a lighthouse keeper and a lost dog.",
    "Give me a recipe for a vegetable soup, with amounts.",
    "Write a Python function that merges two sorted lists, and test it.",
    "Fasse die Geschichte der Eisenbahn in wenigen Sätzen zusammen.",
    "用中文介绍一下长城的历史。",
    "A train leaves at 9:40 and arrives at 13:05. How long does it travel? Think step by step.",
    "List the planets with their radius as a Markdown table.",
    "Écris un courriel pour demander un rendez-vous chez le médecin.",
    "What should a contract for renting a flat contain?",
    "Turn this into JSON: Anna is 31 and lives in Oslo, Ben is 28 and lives in Rome.",
    "Compare TCP and UDP, and say when each is used.",
)
OPENINGS = (
    *("The", "In", "A", "When", "I", "It is", "Once upon a time", "According to", "# Introduction\n\n", "import"),
    *("<html>", "Dear", "La", "Die", "人", "2.", "Question:", "Chapter 1\n", "def", "We"),
)
"""What the calibration texts answer, and how those begin that are no answers."""
LEAST_SHARE = 0.05
"""Tokens less likely than this share of the likeliest are not written, as vlpack's calibration has it."""


def prepare(work: Path) -> None:
    """Fill the folder with what is missing in it."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoints(work)
    if not (work / TOKENS).exists():
        np.save(work / TOKENS, tokens(work / MODELS[0]))
    ids = np.load(work / TOKENS)
    for model in MODELS:
        if not reference_file(work, model).exists():
            print(f"computing fp32 logits: {model}", flush=True)
            write_reference(work / model, ids, reference_file(work, model))
    if not (work / CALIBRATION).exists():
        print("writing calibration texts", flush=True)
        written = calibration(work / MODELS[0])
        (work / CALIBRATION).write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")


def checkpoints(work: Path) -> None:
    from checkpoint_copies import permuted, planted, write_copy
    from smollm2 import convert, fetch

    changes = {"mild": (permuted,), "outliers": (permuted, planted)}
    missing = [model for model in MODELS if not (work / model).is_dir()]
    if not missing:
        return
    part = work / "part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    original = convert(fetch(part), part / "original")
    for model in missing:
        write_copy(original, part / model, *changes[model]).rename(work / model)
    shutil.rmtree(part)


def tokens(checkpoint: Path) -> Array:
    """int64 ids [texts, `COUNT`] of all texts, by file name.

    Raises:
        ValueError: a text is too short.
    """
    tokenizer = Tokenizer.from_folder(checkpoint)
    rows = []
    for path in sorted(TEXTS.glob("*.txt")):
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
        if len(ids) < COUNT:
            raise ValueError(f"{path.name} has {len(ids)} tokens; {COUNT} are wanted.")
        rows.append(ids[:COUNT])
    return np.array(rows, np.int64)


def load_model(checkpoint: Path) -> Any:
    import torch
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


def write_reference(checkpoint: Path, ids: Array, path: Path) -> None:
    """float32 logits [texts, tokens, vocabulary] of transformers."""
    import torch

    model = load_model(checkpoint)
    part = path.with_name(f"part-{path.name}")
    shape = (*ids.shape, model.config.vocab_size)
    found = np.lib.format.open_memmap(part, "w+", np.float32, shape)
    with torch.no_grad():
        for row, text in enumerate(ids):
            found[row] = model(torch.tensor(text[None])).logits[0].numpy()
    found.flush()
    part.rename(path)


def calibration(checkpoint: Path) -> dict[str, Any]:
    """The ids and the texts that the fp32 model writes, each to its first end token or to `LENGTH` tokens."""
    import torch

    tokenizer = Tokenizer.from_folder(checkpoint)
    begun = [tokenizer.encode(text) for text in OPENINGS]
    if (prompts := prompt_builder(checkpoint, None)) is not None:
        begun += [prompts([{"role": "user", "content": text}]).input_ids[0].tolist() for text in QUESTIONS]
    model = load_model(checkpoint)
    torch.manual_seed(0)
    end = model.config.eos_token_id
    longest = max(map(len, begun))
    ids = torch.tensor([[end] * (longest - len(row)) + row for row in begun])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in begun])
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "min_p": LEAST_SHARE, "pad_token_id": end}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=LENGTH, **settings)
    made = []
    for row, opening in zip(out.tolist(), begun, strict=True):
        written = row[longest:]
        stop = written.index(end) + 1 if end in written else len(written)
        made.append((opening + written[:stop])[:LENGTH])
    return {"ids": made, "texts": [tokenizer.decode(row, skip_special_tokens=False) for row in made]}
