"""Logits of every token by plain onnxruntime, from a package for onnxruntime-genai whose head is not pruned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
from quality_scores import Array

TYPES = {"tensor(int8)": np.int8, "tensor(float16)": np.float16}


def decoder_file(package: Path) -> Path:
    """The decoder's graph."""
    config = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))
    return package / config["model"]["decoder"]["filename"]


def logits(package: Path, ids: Array, threads: int) -> Iterator[Array]:
    """float32 logits [tokens, vocabulary] of each row of ``ids [texts, tokens]``, from an empty cache."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(decoder_file(package), options, providers=["CPUExecutionProvider"])
    ports = {port.name: port for port in session.get_inputs()}
    past = {
        name: np.zeros((1, port.shape[1], 0, port.shape[3]), TYPES.get(port.type, np.float32))
        for name, port in ports.items()
        if name.startswith("past_key_values")
    }
    for row in ids:
        text = row[None]
        feeds = {"input_ids": text, "attention_mask": np.ones_like(text), "position_ids": np.arange(row.size)[None]}
        (found,) = session.run(["logits"], {**past, **{name: x for name, x in feeds.items() if name in ports}})
        yield found[0].astype(np.float32)
