"""verify for packages of quantized checkpoints, against the quantized checkpoint and against its original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantized
from tiny import Tiny
from vlpack.builder import build
from vlpack.options import parse_extra_options
from vlpack.verification import verify
from vlpack.verification.cases import Case

PLAIN = Tiny(layers=2, depth=1, deepstack=(0,))
CASES = [Case("text", "one two three four five")]


@pytest.mark.parametrize(("form", "precision"), [(quantized.awq(), "int4"), (quantized.fp8(), "int8")])
def test_the_quantized_checkpoint(
    form: Any, precision: str, checkpoint: Callable[[Tiny], Path], tmp_path: Path
) -> None:
    quantized.quantize(checkpoint(PLAIN), tmp_path / "checkpoint", form)
    build(tmp_path / "checkpoint", tmp_path / "package", threads=1)
    report = verify(tmp_path / "package", tmp_path / "checkpoint", cases=CASES, tokens=2, threads=1)
    assert report.precision == precision
    assert report.ok, report.findings
    assert report.weights
    assert all(weight.same for weight in report.weights)
    assert all(weight.error == 0 for weight in report.weights if "kept" in weight.storage)


def test_the_original_and_another_checkpoint(checkpoint: Callable[[Tiny], Path], tmp_path: Path) -> None:
    source, folder = checkpoint(PLAIN), tmp_path / "checkpoint"
    quantized.quantize(source, folder, quantized.gptq(bits=8, symmetric=False))
    build(folder, tmp_path / "package", extra_options=parse_extra_options(["accuracy_level=1"]), threads=1)
    report = verify(tmp_path / "package", source, cases=CASES, tokens=2, threads=1)
    assert report.ok, report.findings
    assert (report.weights, report.limits) == ([], "int8")  # the weights of another checkpoint are not comparable
    quantized.quantize(checkpoint(PLAIN.but(seed=1)), tmp_path / "other", quantized.gptq(bits=8, symmetric=False))
    report = verify(tmp_path / "package", tmp_path / "other", cases=CASES, tokens=2, threads=1)
    assert {finding.stage for finding in report.findings} >= {"weights"}
