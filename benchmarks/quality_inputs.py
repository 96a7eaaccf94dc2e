"""What every quality script measures with: two checkpoints of one real model, texts, fp32 logits, calibration texts.

The model is SmolLM2-135M-Instruct (tests/smollm2.py). The texts are those in benchmarks/texts, which were written for
this and are held out: neither vlpack nor a peer is calibrated on them. The calibration texts are what the fp32 model
itself writes after vlpack's openings, so that each peer sees the kind of text that `--calibrate self` makes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from quality_scores import CALIBRATION, MODELS, TOKENS, Array, reference_file

from vlpack.calibration.prompts import LENGTH, openings, prompt_builder
from vlpack.preprocess.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TEXTS = Path(__file__).parent / "texts"
COUNT = 256
"""Tokens of each text, from its beginning."""
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
    begun = openings(prompt_builder(checkpoint, None), tokenizer)
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
