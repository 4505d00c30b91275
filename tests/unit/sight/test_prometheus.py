"""Metrics in one process, and the sum over several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from vllm_mm_ext.sight.prometheus import Metrics

# Two API servers of one service: each has requests of its own, and each is scraped in turn.
_SERVER = """
import json
import sys
from collections import Counter
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, multiprocess

from vllm_mm_ext.base.engine_figures import FIGURES, EngineBoard
from vllm_mm_ext.base.shared_state import open_state
from vllm_mm_ext.sight.collecting import collect_engine
from vllm_mm_ext.sight.prometheus import Metrics

board = EngineBoard(open_state("service", [Path(sys.argv[1])]))
metrics = Metrics(REGISTRY)
for line in sys.stdin:
    steps = float(line)
    board.write(0, dict.fromkeys(FIGURES, steps))
    metrics.add("mm_ext_prompt_tokens_total", 10, modality="video", source="computed")
    metrics.set("mm_ext_live_sessions", 3)
    metrics.observe("mm_ext_stage_seconds", 0.02, stage="fetch", modality="video")
    collect_engine(metrics, 0, board.take(0), board.figures(0), None)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    wanted = {"work": "decode", "le": "0.025", "state": "used"}
    found = Counter()
    for metric in registry.collect():
        for sample in metric.samples:
            assert "pid" not in sample.labels
            if all(sample.labels.get(label, value) == value for label, value in wanted.items()):
                found[sample.name] += sample.value
    print(json.dumps(found), flush=True)
"""


@pytest.fixture
def metrics() -> tuple[Metrics, CollectorRegistry]:
    registry = CollectorRegistry()
    return Metrics(registry), registry


def test_several_api_servers_add_up_whichever_is_scraped(tmp_path: Path) -> None:
    files = tmp_path / "prometheus"
    files.mkdir()
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(files)}
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for _ in range(2)
    ]

    def scrape(server: int, steps: int) -> dict[str, float]:
        process = servers[server]
        assert process.stdin is not None
        assert process.stdout is not None
        print(steps, file=process.stdin, flush=True)
        found: dict[str, float] = json.loads(process.stdout.readline())
        return found

    try:
        scrape(0, 5)
        scrape(1, 7)
        scrape(1, 7)
        found = scrape(0, 12)
    finally:
        for process in servers:
            process.communicate(timeout=30)
    assert found["mm_ext_engine_steps_total"] == 12
    assert found["mm_ext_kv_blocks"] == 12
    assert found["mm_ext_prompt_tokens_total"] == 40
    assert found["mm_ext_live_sessions"] == 6
    assert found["mm_ext_stage_seconds_count"] == 4
    assert found["mm_ext_stage_seconds_bucket"] == 4


def test_a_value_beyond_the_list_of_its_label_counts_as_other(
    metrics: tuple[Metrics, CollectorRegistry],
) -> None:
    made, registry = metrics
    made.add("mm_ext_frames_total", 2, policy="made up")
    made.add("mm_ext_frames_total", 3, policy="something else")
    made.add("mm_ext_frames_total", 1, policy="adaptive")
    name = "mm_ext_frames_total"
    assert registry.get_sample_value(name, {"policy": "other"}) == 5
    assert registry.get_sample_value(name, {"policy": "adaptive"}) == 1
    assert registry.get_sample_value(name, {"policy": "made up"}) is None


def test_a_counter_follows_counts_of_several_sources(
    metrics: tuple[Metrics, CollectorRegistry],
) -> None:
    made, registry = metrics
    for source, count in (("a", 3), ("b", 4), ("a", 5), ("a", 5)):
        made.follow(source, "mm_ext_decode_jobs_started_total", count)
    assert registry.get_sample_value("mm_ext_decode_jobs_started_total") == 9
