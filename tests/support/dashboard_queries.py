"""What the dashboard and the alerts ask Prometheus, taken apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
# Labels that Prometheus adds to what it scrapes, and that of histograms' buckets.
ADDED = {"instance", "job", "le"}

_SERIES = re.compile(r"\b((?:mm_ext_|vllm:)\w+)(?:\{([^}]*)\})?")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPED = re.compile(r"\b(?:by|on|ignoring|without)\s*\(([^)]*)\)")


def dashboard() -> dict[str, Any]:
    """``dashboards/grafana.json``."""
    loaded: dict[str, Any] = json.loads((DASHBOARDS / "grafana.json").read_text())
    return loaded


def alerts() -> list[dict[str, Any]]:
    """The rules of ``dashboards/alerts.yaml``."""
    groups = yaml.safe_load((DASHBOARDS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> list[str]:
    """All queries, with values for Grafana's variables."""
    found = [
        target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())
    ]
    found += [rule["expr"] for rule in alerts()]
    return [one.replace("$__rate_interval", "5m").replace("$instance", ".*") for one in found]


def series_of(query: str) -> list[tuple[str, set[str]]]:
    """The metrics that a query names, each with the labels that it must have.

    Labels by which a query groups count for all its metrics: sums of series without the label would
    lose it, and what is matched by it would match nothing.
    """
    grouped = {
        label.strip() for found in _GROUPED.findall(query) for label in found.split(",") if label
    }
    return [
        (name, (set(_LABEL.findall(selector or "")) | grouped) - ADDED)
        for name, selector in _SERIES.findall(query)
    ]


def family_of(name: str) -> str:
    """The family of a series of a histogram."""
    return re.sub(r"_(bucket|sum|count)$", "", name)
