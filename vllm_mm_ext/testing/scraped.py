"""What a scrape of ``/metrics`` holds."""

from __future__ import annotations

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families


class Scraped:
    """A scrape, read by Prometheus' own parser for Python.

    Args:
        text: Body of the answer.
    """

    def __init__(self, text: str) -> None:
        self.families: list[Metric] = list(text_string_to_metric_families(text))
        self._samples = [sample for family in self.families for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """Sum of all series of that name that have these labels."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def labels(self) -> dict[str, set[str]]:
        """The labels of the series of each name."""
        found: dict[str, set[str]] = {}
        for sample in self._samples:
            found.setdefault(sample.name, set()).update(sample.labels)
        return found
