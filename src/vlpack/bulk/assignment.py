"""What a run of a batch is given: input, output, question, package, and limits, all checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlpack.bulk.form import Form
from vlpack.bulk.progress import Progress
from vlpack.bulk.row import Ids
from vlpack.bulk.source import Source
from vlpack.bulk.workers import Setting


@dataclass(frozen=True)
class Assignment:
    """What a run is given.

    Args:
        source: the input.
        output: path or URI of the folder of the output.
        setting: settings of the engines; their threads are those of all processes together, or None for all cores.
        form: form of the rows.
        identity: what all rows of the output have in common: ``package`` and ``question``, as JSON-like data.
        record: what the manifest records about this run, as JSON-like data.
        format: format of the output, ``jsonl`` or ``parquet``.
        shard_rows: number of rows of a shard; None for the usual number.
        retry_errors: whether rows that failed in earlier runs are answered again.
        limit: number of rows from the beginning of the input that are answered; None for all.
        max_errors: number of rows that may fail before the run stops; None for any number.
        workers: number of processes that answer rows.
        report: function that is called with the progress; None for no reports.
    """

    source: Source
    output: str
    setting: Setting
    form: Form
    identity: dict[str, Any]
    record: dict[str, Any]
    format: str
    shard_rows: int | None
    retry_errors: bool
    limit: int | None
    max_errors: int | None
    workers: int
    report: Callable[[Progress], object] | None

    def ids(self) -> Ids:
        """A new function that gives ids to rows."""
        return Ids(self.form.id_column, self.setting.question.record())
