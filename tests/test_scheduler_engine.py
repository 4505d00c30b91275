"""The scheduler changes no greedy answer, whatever is preempted.

On CPUs vLLM schedules synchronously; ``test_scheduler_steps`` drives the asynchronous class.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

MODES = {"stock": "Scheduler", "plugin": "MMExtScheduler"}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """What each mode says."""
    script = Path(__file__).with_name("scheduler_engine.py")
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env["HF_HUB_OFFLINE"] = "1"
    found = {}
    for mode in MODES:
        done = subprocess.run(
            [sys.executable, str(script), mode],
            env=env,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found[mode] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(1200)
def test_200_mixed_requests_get_the_answers_of_stock(outcomes: dict[str, Any]) -> None:
    assert outcomes["plugin"]["tokens"] == outcomes["stock"]["tokens"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("mode", "name"), MODES.items())
def test_requests_were_preempted_and_none_is_left(
    outcomes: dict[str, Any], mode: str, name: str
) -> None:
    """Otherwise equal answers would prove little."""
    found = outcomes[mode]
    assert found["scheduler"] == name
    assert found["preempted"] > 5
    assert found["items"] >= 12
    assert found["left"] == 0
