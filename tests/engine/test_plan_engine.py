"""Real engine with a written plan: tokens, blocks and concurrency are as planned."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_script import run_script

from vllm_mm_ext.testing.checkpoints import checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_written_plan_runs_as_many_requests_as_it_says_and_one_more_waits(tmp_path: Path) -> None:
    env = {"VLLM_PLUGINS": "mm_ext", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "DO_NOT_TRACK": "1"}
    found = run_script(
        "plan_engine.py", checkpoint("qwen2_5_omni"), tmp_path, timeout_s=400, env=env
    )
    assert found["fits"]
    for served in found["served"]:
        assert served == found["planned"]
    recorded, concurrency = found["recorded"], len(found["served"]) - 1
    assert recorded["preempted"] == 0
    assert max(recorded["running"]) == concurrency
    waits = zip(recorded["running"], recorded["waiting"], strict=True)
    assert (concurrency, 1) in waits
    assert found["kv_blocks"] == concurrency * found["planned"]["blocks"]
