"""Records a verification's result in the package: a section of its README.md, and the updated manifest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vlpack.errors import PackageError
from vlpack.export.folder import output_folder
from vlpack.package.manifest import MANIFEST, refresh
from vlpack.verification.result import CaseResult, Report

HEADING = "## Verification"
CARD = "README.md"


def record(folder: Path, report: Report) -> None:
    """Write the result into the package's model card (README.md), replacing the result of an earlier verification.

    The manifest must agree with the card at any moment, so the package is replaced as a whole by one with both.

    Raises:
        VlpackError: the card cannot be read, or the package cannot be replaced.
    """
    try:
        text = (folder / CARD).read_text(encoding="utf-8").partition(f"\n{HEADING}\n")[0].rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PackageError(f"{folder / CARD} cannot be read: {error}.") from None
    with output_folder(folder, force=True) as new:
        for path in folder.iterdir():
            (_copy if path.name in (CARD, MANIFEST) else _link)(path, new / path.name)
        (new / CARD).write_text(f"{text}\n\n{section(report)}", encoding="utf-8")
        refresh(new, CARD)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        _copy(source, target)


def generation_columns(case: CaseResult) -> tuple[str, str, str]:
    """A table row's columns about generation: KL, share of equal top tokens, and agreeing tokens of the answer.

    They are dashes for a model that does not generate.
    """
    if not case.generates:
        return "-", "-", "-"
    logits = case.logits
    return f"{logits.mean_kl:.1e}", f"{logits.top1:.1%}", f"{case.same_tokens} of {len(case.tokens)}"


def section(report: Report) -> str:
    """The section of the model card with the result, as Markdown."""
    verdict = "is" if report.ok else "**is not**"
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    lines = [
        HEADING,
        "",
        f"`vlpack verify` compared this package with {report.reference} in transformers, fp32, stage by stage:",
        f"it {verdict} the model. Errors are relative L2, the worst of all stages. *Graph* compares the package's",
        "graph in exact arithmetic with the reference, both with the package's weights; *whole* compares the package",
        "as it runs with the reference as it is.",
        "",
        "| case | graph | whole | KL, nats | same top token | answer's tokens that agree |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in report.cases:
        graph, whole = case.worst
        lines.append(f"| {case.name} | {graph:.1e} | {whole:.1e} | {' | '.join(generation_columns(case))} |")
    same = sum(weight.same for weight in report.weights)
    if report.weights:
        lines += ["", f"{same} of {len(report.weights)} weights are byte for byte as vlpack builds them."]
    lines += [f"\n- {finding.stage}: {finding.message}" for finding in report.findings]
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])
