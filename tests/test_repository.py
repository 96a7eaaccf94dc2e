"""Files of the repository that must agree with each other: versions of tools, and the steps that CI runs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def found(pattern: str, path: str) -> set[str]:
    return set(re.findall(pattern, (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_ruff_has_the_same_version_everywhere() -> None:
    pinned = found(r'"ruff==([\d.]+)"', "pyproject.toml")
    assert len(pinned) == 1
    assert pinned == found(r"ruff-pre-commit\n    rev: v([\d.]+)", ".pre-commit-config.yaml")


def test_torch_is_pinned_for_tests() -> None:
    """pip prefers a local version such as 2.13.0+cpu only if the version is pinned."""
    assert len(found(r"^torch==[\d.]+$", "requirements-test.txt")) == 1
    assert "grep '^torch==' requirements-test.txt" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_workflows_call_steps_that_exist() -> None:
    steps = found(r"^([a-z-]+)\(\) \{", ".ci/run")
    called = {
        name
        for workflow in WORKFLOWS
        for line in re.findall(r"\.ci/run ([a-z -]+)$", workflow.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for name in line.split()
    }
    assert {"lint", "types", "tests", "kernels", "docs", "user", "lowest", "build-only"} == called
    assert called <= steps


def test_nothing_that_fails_is_ignored() -> None:
    for path in [ROOT / ".ci" / "run", *WORKFLOWS]:
        text = path.read_text(encoding="utf-8")
        assert "|| true" not in text
        assert "continue-on-error" not in text
