"""Computes the logits of every token with plain onnxruntime, from an onnxruntime-genai package with a full head."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from quality_scores import Array

TYPES = {"tensor(int8)": np.int8, "tensor(float16)": np.float16}


def decoder_of(package: Path) -> dict[str, Any]:
    """The ``decoder`` section of the package's genai_config.json."""
    config = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))
    decoder: dict[str, Any] = config["model"]["decoder"]
    return decoder


def logits(package: Path, ids: Array, threads: int) -> Iterator[Array]:
    """float32 logits [tokens, vocabulary] of each row of ``ids [texts, tokens]``, from an empty cache."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    decoder = decoder_of(package)
    session = ort.InferenceSession(package / decoder["filename"], options, providers=["CPUExecutionProvider"])
    ports = {port.name: port for port in session.get_inputs()}
    # upstream's graphs have names instead of sizes; the rows of vlpack's 8-bit cache have another width
    sizes = {1: decoder["num_key_value_heads"], 2: 0, 3: decoder["head_size"]}
    past = {
        name: np.zeros(
            [1, *(port.shape[axis] if isinstance(port.shape[axis], int) else size for axis, size in sizes.items())],
            TYPES.get(port.type, np.float32),
        )
        for name, port in ports.items()
        if name.startswith("past_key_values")
    }
    for row in ids:
        text = row[None]
        feeds = {"input_ids": text, "attention_mask": np.ones_like(text), "position_ids": np.arange(row.size)[None]}
        (found,) = session.run(["logits"], {**past, **{name: x for name, x in feeds.items() if name in ports}})
        yield found[0].astype(np.float32)
