"""Answers the rows of a batch on a Ray cluster: finds out what is left to do, and leaves it to the pipeline."""

from __future__ import annotations

import secrets
import time

from vlpack.bulk.assignment import Assignment
from vlpack.bulk.cluster import Cluster
from vlpack.bulk.output import JOURNAL, Output
from vlpack.bulk.plan import plan
from vlpack.bulk.progress import BatchResult, Meter
from vlpack.bulk.shards import format_of
from vlpack.bulk.storage import Local, storage
from vlpack.bulk.units import Job
from vlpack.bulk.written import Written

SHARD_ROWS = 128
"""Number of rows of a shard if the user gives none. It is small, because a killed run loses the shards it has begun."""


def answer_on_ray(given: Assignment, address: str) -> BatchResult:
    """Answers the rows on a cluster.

    Args:
        given: what the run is given.
        address: address of the cluster, ``auto``, or ``local`` for a new one on this machine.

    Raises:
        OptionError: Ray is not installed, there is no cluster at the address, or it is too small.
        VlpackError: the input cannot be read, the package cannot be loaded, or the output cannot be written.
    """
    with Cluster(address) as cluster:
        threads = cluster.threads(given.setting.options.threads, given.workers)
        place = storage(given.output)
        shards = format_of(given.format, given.source.types)
        if isinstance(place, Local):
            place = Local(place.folder.absolute())
            if (place.folder / JOURNAL).exists():  # a run without Ray was killed
                with Output(place.folder, given.form.layout, shards, given.identity, given.record) as output:
                    output.finish()
        written = Written(place, given.form.layout, shards, given.identity, retry_errors=given.retry_errors)
        try:
            with written.told():
                written.lock()
                written.read()
                return _answered(given, written, cluster, threads)
        finally:
            written.unlock()


def _answered(given: Assignment, written: Written, cluster: Cluster, threads: int) -> BatchResult:
    """Answers the rows that are not in the output, and returns the result."""
    from vlpack.bulk import pipeline

    run = secrets.token_hex(8)
    written.begin({**given.record, "run": run})
    package_hash = str(given.identity["package"]["sha256"])
    job = Job(given.setting, package_hash, written.place, given.format, given.source.types, run)
    meter = Meter(written, None, written.place.name, given.report)
    started = time.perf_counter()
    units, meter.result.total = plan(
        pipeline.index(given.source, job), given.ids(), written, given.shard_rows or SHARD_ROWS, given.limit
    )
    meter.result.load_seconds = round(time.perf_counter() - started, 3)
    meter.start()
    if units:
        for done in pipeline.answer(units, job, cluster, min(given.workers, len(units)), threads):
            written.rows += done.rows
            written.errors += done.failed
            meter.add(done.rows, done.failed, done.tokens)
            if done.repaired:
                written.repaired(done.repaired)
            if meter.too_many(given.max_errors):
                break
    written.count_failed()
    return meter.tell(last=True)
