"""The table of metrics: its names, its labels, its page."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_mm_ext.base.engine_figures import COUNTERS, FIGURES
from vllm_mm_ext.sight import collecting
from vllm_mm_ext.sight.metric_table import METRICS, to_markdown
from vllm_mm_ext.sight.prometheus import Metrics

DOCS = Path(__file__).parents[3] / "docs"
PROMTOOL = shutil.which("promtool")


def _full() -> CollectorRegistry:
    """A registry in which each metric has a series of each value of its last label."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for metric in METRICS.values():
        labels = {label: (values or ("0",))[0] for label, values in metric.labels.items()}
        if metric.kind == "histogram":
            metrics.observe(metric.name, 1.0, **labels)
        elif metric.kind == "gauge":
            metrics.set(metric.name, 1.0, **labels)
        else:
            metrics.add(metric.name, 1.0, **labels)
    return registry


def test_the_page_has_the_table_as_the_command_prints_it() -> None:
    assert to_markdown() in (DOCS / "watching.md").read_text()


def test_gauges_say_how_several_api_servers_add_up() -> None:
    for metric in METRICS.values():
        assert bool(metric.mode) == (metric.kind == "gauge"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name


def test_labels_are_bounded() -> None:
    for metric in METRICS.values():
        # Engines and load tiers are as many as the configuration says.
        series = math.prod(len(values) or 8 for values in metric.labels.values())
        assert series <= 260, metric.name


def test_every_figure_of_an_engine_is_in_a_metric() -> None:
    assert set(collecting._ENGINE_COUNTERS) == set(COUNTERS)
    gauges = set(FIGURES) - set(COUNTERS)
    assert gauges - set(collecting._ENGINE_GAUGES) == {"kv_blocks"}
    named = {name for name, _ in collecting._ENGINE_COUNTERS.values()}
    named |= {name for name, _ in collecting._ENGINE_GAUGES.values()}
    assert named <= set(METRICS)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_complain_of() -> None:
    assert PROMTOOL is not None
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"],
        input=generate_latest(_full()),
        capture_output=True,
        check=False,
    )
    assert (checked.returncode, checked.stderr.decode()) == (0, "")
