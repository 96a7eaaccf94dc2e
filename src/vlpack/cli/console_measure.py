"""Terminal and JSON output of the commands verify, eval and bench."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from vlpack.cli import console
from vlpack.errors import VlpackError

if TYPE_CHECKING:
    from vlpack.evaluation.benchmark import Benchmark
    from vlpack.evaluation.questions import Evaluation
    from vlpack.verification.result import Report


def show_verification(report: Report, page: Path | None, *, as_json: bool) -> None:
    """Prints the cases, findings and verdict of a verification, and writes its HTML report to ``page`` if given."""
    if page is not None:
        from vlpack.verification.report import html

        try:
            page.write_text(html(report), encoding="utf-8")
        except OSError as error:
            raise VlpackError(f"{page} cannot be written: {error.strerror}.") from None
    if as_json:
        from vlpack.verification.report import as_json as to_json

        print(json.dumps(to_json(report), indent=1))
        return
    from vlpack.verification.card import generation_columns

    columns = ("case", "graph error", "whole error", "KL, nats", "same top token", "answer's tokens agree")
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for case in report.cases:
        graph, whole = case.worst
        table.add_row(case.name, f"{graph:.1e}", f"{whole:.1e}", *generation_columns(case))
    console.out.print(table)
    if report.weights:  # empty if the package's files are damaged
        same = sum(weight.same for weight in report.weights)
        console.out.print(
            f"{same} of {len(report.weights)} weights are byte for byte what vlpack builds from the checkpoint."
        )
    if report.mean_kl is not None and report.precision in ("int8", "int4"):
        from vlpack.verification.metrics import describe_kl

        console.out.print(describe_kl(report.mean_kl))
    for finding in report.findings:
        console.out.print(f"[bold red]{console.escape(finding.stage)}:[/] {console.escape(finding.message)}")
    model = f"{console.escape(report.package)} ({report.precision} for {report.provider})"
    verdict = "[bold green]is[/]" if report.ok else "[bold red]is not[/]"
    took = f"{report.seconds:.0f} s, peak memory {console.size(report.peak_memory)}"
    console.out.print(
        f"{model} {verdict} {console.escape(report.reference)}. "
        f"{took}{', reference streamed' if report.streamed else ''}."
    )


@contextmanager
def question_progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar over the questions; yields None if standard error is not a terminal."""
    if not console.err.is_terminal:
        yield None
        return
    with Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console.err,
        transient=True,
    ) as bar:  # fmt: skip
        tasks: dict[str, Any] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        yield advance


def show_benchmark(
    result: Benchmark,
    changes: tuple[list[tuple[str, float, float]], list[str]] | None,
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Prints the median figures of a benchmark, with the changes from an earlier result, and writes them to ``output``.

    Args:
        result: the benchmark's result.
        changes: from a comparison, for each prompt its name and the ratios (now / then) of the time to the first token
            and of the time per token; and sentences about differences in the settings.
        output: JSON file to write, if any.
        as_json: whether to print JSON instead of tables.
    """
    shown = result.as_json()
    if changes:
        shown["compared"] = [{"name": n, "first_token": first, "token": token} for n, first, token in changes[0]]
        shown["differs"] = changes[1]
    if output is not None:
        try:
            output.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise VlpackError(f"{output} cannot be written: {error.strerror}.") from None
    if as_json:
        print(json.dumps(shown, indent=1))
        return
    columns = ("prompt", "tokens", "first token", "preprocessing", "vision", "prefill", "a token", "tokens/s", "memory")
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for work in result.works:
        parts = (work.first_token, work.preprocess, work.vision, work.prefill)
        seconds = [f"{part.median:.2f} s" if part.high else "-" for part in parts]
        token, memory = (
            f"{1e3 * work.token.median:.1f} ms",
            f"{console.size(work.resident)} (peak {console.size(work.peak)})",
        )
        speed = f"{1 / work.token.median:.1f}"
        table.add_row(work.name, str(work.prompt_tokens), *seconds, token, speed, memory)
    console.out.print(table)
    machine = result.machine
    what, load = (
        f"{console.escape(result.package)} ({result.precision}, {console.size(result.bytes)})",
        result.load.median,
    )
    console.out.print(
        f"{what} loads in {load:.2f} s, {load / result.read:.1f} times reading it. Medians of {result.repeat}, "
        f"{result.threads} threads, {console.escape(str(machine['processor']))}."
    )
    if changes:
        table = Table("prompt", "first token, now / then", "a token, now / then", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, first, later in changes[0]:
            table.add_row(name, f"{first:.2f}", f"{later:.2f}")
        console.out.print(table)
        for sentence in changes[1]:
            console.err.print(f"note: {console.escape(sentence)}")


def show_evaluation(evaluation: Evaluation, wrong: int = 10, *, as_json: bool) -> None:
    """Prints the scores of an evaluation, the differences between them, and some of the wrong answers.

    Args:
        evaluation: the evaluation.
        wrong: maximum number of wrong answers to print.
        as_json: whether to print everything as JSON instead.
    """
    if as_json:
        print(json.dumps(asdict(evaluation), indent=1, ensure_ascii=False))
        return
    table = Table("model", f"{evaluation.metric}, %", "95% interval", box=box.SIMPLE_HEAD, pad_edge=False)
    for score in evaluation.scores:
        table.add_row(score.name, f"{100 * score.mean:.1f}", f"{100 * score.low:.1f} to {100 * score.high:.1f}")
    console.out.print(table)
    console.out.print(f"{evaluation.questions} questions.")
    for one in evaluation.comparisons:
        console.out.print(
            f"{one.first} against {one.second}: {100 * one.mean:+.1f} points ({100 * one.low:+.1f} to "
            f"{100 * one.high:+.1f})."
        )
    missed = evaluation.wrong()
    if missed and wrong:
        console.out.print(f"Not right ({len(missed)} of {evaluation.questions}):")
    for question, answer, value in missed[:wrong]:
        named = f" ({', '.join(Path(image).name for image in question.images)})" if question.images else ""
        said = f"{question.question}{named}: {answer.strip()!r}, right is {' or '.join(map(repr, question.answers))}"
        console.print_plain("  " + " ".join(said.split()) + (f", {100 * value:.0f}%" if value else ""))
    if wrong and len(missed) > wrong:
        console.out.print(f"  … and {len(missed) - wrong} more: --wrong {len(missed)} lists all, as --json does.")
