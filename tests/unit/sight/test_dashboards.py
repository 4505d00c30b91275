"""The dashboard and the alerts ask for metrics that there are."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from dashboard_queries import DASHBOARDS, alerts, dashboard, family_of, queries, series_of

from vllm_mm_ext.sight.metric_table import METRICS

PROMTOOL = shutil.which("promtool")
with_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")


def _promtool_check(rules: Path) -> str:
    assert PROMTOOL is not None
    checked = subprocess.run(
        [PROMTOOL, "check", "rules", str(rules)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    return checked.stdout


@pytest.mark.parametrize("query", queries())
def test_a_query_names_metrics_and_labels_that_there_are(query: str) -> None:
    found = series_of(query)
    assert found
    for name, labels in found:
        if name.startswith("mm_ext_"):
            metric = METRICS[family_of(name)]
            assert (metric.kind == "histogram") == (name != metric.name)
            assert labels <= set(metric.labels), name


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {
        family_of(name)
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
        for name, _ in series_of(target["expr"])
    }
    assert set(METRICS) <= shown


def test_the_dashboard_imports_as_it_is() -> None:
    made = dashboard()
    assert made["schemaVersion"] >= 36
    # An id of another Grafana's database would overwrite what is there.
    assert "id" not in made
    variables = {variable["name"]: variable for variable in made["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["instance"]["datasource"] == source
    panels = made["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["datasource"] == source
            assert all(target["datasource"] == source for target in panel["targets"])
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    for one, other in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
    assert all(place["x"] + place["w"] <= 24 for place in places)


def test_every_alert_says_what_to_do() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"]


@with_promtool
def test_prometheus_takes_the_alerts() -> None:
    assert f"{len(alerts())} rules found" in _promtool_check(DASHBOARDS / "alerts.yaml")


@with_promtool
def test_origins_that_never_answered_raise_the_alert(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    failed = 'mm_ext_refused_requests_total{instance="a", reason="unreachable"}'
    (rule,) = (one for one in alerts() if one["alert"] == "MmExtOriginsFail")
    test = {
        "rule_files": [str(DASHBOARDS / "alerts.yaml")],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": failed, "values": "0+6x40"}],
                "alert_rule_test": [
                    {
                        "eval_time": "30m",
                        "alertname": "MmExtOriginsFail",
                        "exp_alerts": [
                            {
                                "exp_labels": {"severity": "warning", "instance": "a"},
                                "exp_annotations": rule["annotations"],
                            }
                        ],
                    }
                ],
            }
        ],
    }
    made = tmp_path / "test.yaml"
    made.write_text(yaml.safe_dump(test))
    told = subprocess.run(
        [PROMTOOL, "test", "rules", str(made)], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr


@with_promtool
def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(queries())]
    made = tmp_path / "rules.yaml"
    made.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(rules)} rules found" in _promtool_check(made)
