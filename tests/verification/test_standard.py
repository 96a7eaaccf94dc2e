"""The bounds by which quantized packages are judged: a package that is inaccurate because of outliers is reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vlpack.builder import build
from vlpack.errors import VerifyError
from vlpack.options import parse_extra_options
from vlpack.verification import reference
from vlpack.verification.metrics import KL_TOLERANCE, describe_kl

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")

from outliers import plant  # noqa: E402
from smollm2 import UnavailableError, convert, fetch  # noqa: E402
from vlpack.verification.cases import Case  # noqa: E402
from vlpack.verification.run import verify  # noqa: E402


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with planted outlier channels that do not change its function."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("planted")
    try:
        checkpoint = convert(fetch(folder), folder / "checkpoint")
    except UnavailableError as error:
        pytest.skip(f"SmolLM2's weights cannot be had here: {error}")
    tensors = plant(load_file(checkpoint / "model.safetensors"), 30)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


CASE = Case("a sentence", "The capital of France is Paris, and the capital of Italy is Rome. What is that of Spain?")


@pytest.mark.parametrize(
    ("precision", "extra", "passes"),
    [
        ("int8", [], True),
        ("int8", ["balance=false"], False),
        ("int8", ["balance=false", "rotation=false"], False),
        ("int4", [], True),
        ("int4", ["balance=false", "rotation=false"], False),
    ],
)
def test_outliers(planted: Path, precision: str, extra: list[str], passes: bool, tmp_path: Path) -> None:
    """With outliers, a package without balance and rotation fails the verification, and one with them passes."""
    build(planted, tmp_path / "package", precision=precision, extra_options=parse_extra_options(extra))
    report = verify(tmp_path / "package", planted, cases=[CASE], tokens=4)
    kl = report.cases[0].logits.mean_kl
    print(f"{precision} {extra}: KL {kl:.4f}")
    assert (kl <= KL_TOLERANCE[precision]) == passes
    assert any(finding.stage != "files" for finding in report.findings) != passes
    assert all(weight.same for weight in report.weights)


def test_calibrated_scales_are_read_back(planted: Path, tmp_path: Path) -> None:
    """The manifest's scales restore the weights of a calibrated package, and altered scales are reported."""
    (tmp_path / "text").write_text("Rivers carry sand to the sea. " * 400, encoding="utf-8")
    build(planted, tmp_path / "package", precision="int8", calibrate=tmp_path / "text")
    report = verify(tmp_path / "package", planted, cases=[CASE], tokens=4)
    assert report.ok, report.findings
    assert max(weight.error for weight in report.weights) < 0.03


def test_packages_of_earlier_versions(tmp_path: Path) -> None:
    """Manifests of earlier versions lack balance and rotation, and their weights have neither."""
    from vlpack.quantize.policy import PrecisionFacts
    from vlpack.verification.weights import policy_of

    manifest = {"precision": "int8", "execution_provider": "cpu", "quantization": {}}
    policy = json.loads(json.dumps(manifest))
    from vlpack.quantize.policy import QuantizationOptions, make_policy

    made = make_policy("int8", "cpu", QuantizationOptions())
    found = policy_of({**policy, "policy": made.described()}, PrecisionFacts())
    assert found.options.rotation is False
    assert found.options.balance is False


def test_the_description_of_the_distance() -> None:
    assert "nearer than 8 bits" in describe_kl(0.001)
    assert "as near as 8 bits" in describe_kl(0.007)
    assert "between" in describe_kl(0.02)
    assert "as near as 4 bits" in describe_kl(0.2)
    assert "farther than 4 bits" in describe_kl(1.0)


def test_a_transformers_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed import, as with a mismatched torchvision, is reported as a sentence, not as a traceback."""

    class Broken(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("Failed to import transformers.models:\noperator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "transformers", Broken("transformers"))
    monkeypatch.setattr(reference, "find_spec", lambda name: object())
    with pytest.raises(VerifyError, match="torchvision::nms") as caught:
        reference.require()
    assert "vlpack[verify]" in str(caught.value.hint)


def test_the_distance_in_the_description() -> None:
    assert np.isclose(float(describe_kl(0.0123).split()[5]), 0.012)
