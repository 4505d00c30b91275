"""The metrics of ``metric_table`` as objects of ``prometheus_client``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vllm_mm_ext.sight.metric_table import METRICS, NUMBER, OTHER, Metric

# Series of a counter that are there from the start; more would crowd each scrape.
_MOST_AT_0 = 40


class Metrics:
    """The metrics of this process.

    vLLM serves them with its own on ``/metrics``: the registry's where there is one API server, the
    sum over all processes' files where there are several.

    Args:
        registry: Where they are registered.

    Raises:
        ValueError: The registry has them already.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._made = {name: _made(metric, registry) for name, metric in METRICS.items()}
        self._children: dict[tuple[object, ...], Any] = {}
        # What ``follow`` was told last.
        self._followed: dict[tuple[object, ...], float] = {}
        # A counter whose series begins at its first event hides that event from ``rate``.
        for metric in METRICS.values():
            series = math.prod(map(len, metric.labels.values()))
            if metric.kind == "counter" and series <= _MOST_AT_0:
                for values in itertools.product(*metric.labels.values()):
                    self.add(metric.name, 0.0, **dict(zip(metric.labels, values, strict=True)))

    def add(self, name: str, amount: float = 1.0, /, **labels: str) -> None:
        """Add to a counter."""
        self._child(name, labels).inc(amount)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Add a value to a histogram."""
        self._child(name, labels).observe(value)

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        self._child(name, labels).set(value)

    def follow(self, source: object, name: str, count: float, /, **labels: str) -> None:
        """Let a counter grow as a count that is kept elsewhere in this process.

        Args:
            source: Whose count it is; hashable. Counts of several sources add up.
            name: The counter.
            count: The count, since the source began.
            labels: Of the counter.
        """
        key = (source, name, *labels.items())
        before = self._followed.get(key, 0.0)
        self._followed[key] = count
        self._child(name, labels).inc(max(0.0, count - before))

    def _child(self, name: str, labels: Mapping[str, str]) -> Any:
        key = (name, *labels.items())
        child = self._children.get(key)
        if child is None:
            metric = METRICS[name]
            bounded = {
                label: _bounded(metric.labels[label], value) for label, value in labels.items()
            }
            made = self._made[name]
            child = made.labels(**bounded) if bounded else made
            # A value that is not in the list might be anything a client thinks of.
            if bounded == labels:
                self._children[key] = child
        return child


def _made(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    about = (metric.name, metric.help, tuple(metric.labels))
    if metric.kind == "counter":
        return Counter(*about, registry=registry)
    if metric.kind == "gauge":
        assert metric.mode
        return Gauge(*about, registry=registry, multiprocess_mode=metric.mode)
    return Histogram(*about, registry=registry, buckets=metric.buckets)


def _bounded(values: tuple[str, ...], value: str) -> str:
    if values is NUMBER or value in values:
        return value
    return OTHER


@lru_cache(maxsize=1)
def process_metrics() -> Metrics:
    """The metrics of this process in Prometheus' own registry, which takes them once."""
    return Metrics(REGISTRY)
