"""Compares a quantized model's logits with the fp32 model's, and names the files that all quality scripts share.

The folder that `quality.py --prepare` fills has for each of `MODELS` a checkpoint, and the logits that transformers
computes with it in fp32. For all of them it has `TOKENS` (int64, [texts, tokens]) and `CALIBRATION`, the ids and texts
that the fp32 model wrote. This module needs numpy alone, as peers run in environments of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MODELS = ("mild", "outliers")
"""The real model with its channels permuted, and the same function with planted outliers."""
TOKENS = "tokens.npy"
CALIBRATION = "calibration.json"


def reference_file(work: Path, model: str) -> Path:
    """Path of the reference: float32 logits [texts, tokens, vocabulary]."""
    return work / f"{model}-reference.npy"


@dataclass(frozen=True)
class Row:
    """The figures of one quantized model.

    Args:
        model: one of `MODELS`.
        name: tool and options that made it.
        kl: mean KL(fp32 ‖ quantized), in nats per token.
        error: standard error of the mean KL over texts.
        top1: share of tokens after which both models find the same token most likely.
        bits: bits per weight of the decoder's matrices, scales and zero points included.
        head: bits per weight of the head.
        texts: the mean KL of each text, in their order.
        version: version of the tool.
    """

    model: str
    name: str
    kl: float
    error: float
    top1: float
    bits: float
    head: float
    texts: list[float]
    version: str


def log_softmax(rows: Array) -> Array:
    """Log-probabilities of logits ``rows [tokens, vocabulary]``, float64."""
    shifted = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def divergence(expected: Array, found: Array) -> tuple[float, float]:
    """Mean KL(expected ‖ found) in nats, and the share of equal likeliest tokens; both are logits [tokens, vocabulary].

    Raises:
        ValueError: shapes differ, or logits are not finite.
    """
    if expected.shape != found.shape:
        raise ValueError(f"The logits have shape {found.shape}; {expected.shape} was expected.")
    if not np.isfinite(found).all():
        raise ValueError("The logits are not finite.")
    p, q = log_softmax(expected), log_softmax(found)
    agree = expected.argmax(axis=1) == found.argmax(axis=1)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean()), float(agree.mean())


def score(work: Path, model: str, name: str, logits: Iterable[Array], bits: float, head: float, version: str) -> Row:
    """Compares the logits of each text, [tokens, vocabulary], with the reference's."""
    reference = np.load(reference_file(work, model), mmap_mode="r")
    each = [divergence(expected, found) for expected, found in zip(reference, logits, strict=True)]
    kls, agreed = (np.array(values) for values in zip(*each, strict=True))
    error = kls.std(ddof=1) / np.sqrt(len(kls)) if len(kls) > 1 else 0.0
    row = Row(model, name, float(kls.mean()), float(error), float(agreed.mean()), bits, head, kls.tolist(), version)
    print(f"{model}: {name}: KL {row.kl:.4f} ± {error:.4f}, top-1 {row.top1:.1%}, {bits:.2f} bits", flush=True)
    return row


def save(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a result file; they replace earlier rows of the same model and name."""
    whole: dict[str, Any] = {"quality": []}
    if path.exists():
        whole = json.loads(path.read_text(encoding="utf-8"))
    kept = {(row["model"], row["name"]): row for row in whole["quality"]}
    kept |= {(row.model, row.name): asdict(row) for row in rows}
    path.write_text(json.dumps({"quality": list(kept.values())}, indent=1) + "\n", encoding="utf-8")
