"""The route ``/metrics``: counters, gauges and histograms of the server in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vlpack.server.asking import Asked
from vlpack.server.models import Models, Served

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 200, 500, 1000)

_COUNTED = {
    "prompt_tokens": "Prompt tokens that were computed.",
    "reused_tokens": "Prompt tokens that were found in the cache.",
    "answer_tokens": "Generated tokens.",
    "steps": "Calls of the decoder that generate tokens.",
    "chunks": "Calls of the decoder that process a chunk of a prompt.",
}


class Metrics(Collector):
    """The metrics of a server.

    Args:
        models: packages of the server, whose engines are read whenever metrics are collected.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self._registry = CollectorRegistry()
        self._registry.register(self)
        names: dict[str, Any] = {"registry": self._registry, "namespace": "vlpack"}
        self._requests = Counter("requests", "Requests by route and status.", ["route", "status"], **names)
        self._first = Histogram(
            "first_token_seconds",
            "Seconds from a request to the first token of its answer.",
            ["model"],
            buckets=_SECONDS,
            **names,
        )
        self._whole = Histogram(
            "answer_seconds", "Seconds from a request to the end of its answers.", ["model"], buckets=_SECONDS, **names
        )
        self._rate = Histogram(
            "answer_tokens_per_second",
            "Generated tokens per second of each answer, after its first token.",
            ["model"],
            buckets=_RATES,
            **names,
        )

    def answered(self, route: str, status: int) -> None:
        """Counts the response to a request; a stream is counted when it begins."""
        self._requests.labels(route, str(status)).inc()

    def generated(self, served: Served, asked: Asked, began: float) -> None:
        """Records the times of a request that has ended; of cancelled answers only the total time is recorded."""
        self._whole.labels(served.name).observe(time.perf_counter() - began)
        for handle in asked.handles:
            if not handle.done:
                continue
            try:
                stats = handle.result(0).stats
            except Exception:  # the answer failed, and the client has received the error
                continue
            if stats.new_tokens:
                self._first.labels(served.name).observe(asked.submitted - began + stats.first_token_seconds)
            if stats.new_tokens > 1:
                self._rate.labels(served.name).observe(stats.tokens_per_second)

    def collect(self) -> Iterator[Metric]:
        """Yields the engines' current values; prometheus_client calls this method."""
        gauges = {
            "loaded": GaugeMetricFamily("vlpack_loaded", "Whether a package is in memory.", labels=["model"]),
            "slots": GaugeMetricFamily(
                "vlpack_slots", "Number of slots, each of which generates one answer at a time.", labels=["model"]
            ),
            "busy": GaugeMetricFamily("vlpack_slots_busy", "Slots that are in use.", labels=["model"]),
            "waiting": GaugeMetricFamily("vlpack_requests_waiting", "Requests that wait for a slot.", labels=["model"]),
        }
        counters = {
            name: CounterMetricFamily(f"vlpack_{name}", text, labels=["model"]) for name, text in _COUNTED.items()
        }
        for served in self._models.served.values():
            engine = served.engine
            gauges["loaded"].add_metric([served.name], float(served.loaded))
            if engine is not None:
                for name, value in engine.occupancy._asdict().items():
                    gauges[name].add_metric([served.name], value)
            counted = served.counters
            for name, family in counters.items():
                family.add_metric([served.name], getattr(counted, name))
        yield from gauges.values()
        yield from counters.values()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return bytes(generate_latest(self._registry))
