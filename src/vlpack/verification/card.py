"""A verification's result in the package itself: a section of its README.md, and the manifest brought up to date."""

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
    """Write the result into the package's card, in place of an earlier one.

    The manifest must agree with the card at any moment, so a package with both takes the place of this one.

    Raises:
        VlpackError: the card cannot be read, or the package not be replaced.
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


def spoken(case: CaseResult) -> tuple[str, str, str]:
    """KL, share of the same top tokens, and tokens of the answer that agree; dashes where nothing is generated."""
    if not case.speaks:
        return "-", "-", "-"
    logits = case.logits
    return f"{logits.mean_kl:.1e}", f"{logits.top1:.1%}", f"{case.same_tokens} of {len(case.tokens)}"


def section(report: Report) -> str:
    """The result as Markdown."""
    verdict = "is" if report.ok else "**is not**"
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    lines = [
        HEADING,
        "",
        f"`vlpack verify` compared this package with {report.reference} in transformers, fp32, stage by stage:",
        f"it {verdict} the model. Errors are relative L2, the worst of all stages. *Graph* is the package's graph in",
        "exact arithmetic against the reference with the package's own weights, *whole* the package as it runs",
        "against the reference as it is.",
        "",
        "| case | graph | whole | KL, nats | same top token | answer's tokens that agree |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in report.cases:
        graph, whole = case.worst
        lines.append(f"| {case.name} | {graph:.1e} | {whole:.1e} | {' | '.join(spoken(case))} |")
    same = sum(weight.same for weight in report.weights)
    lines += ["", f"{same} of {len(report.weights)} weights are byte for byte what vlpack makes of the checkpoint."]
    lines += [f"\n- {finding.stage}: {finding.message}" for finding in report.findings]
    return "\n".join([*lines, "", f"With {versions}.", ""])
