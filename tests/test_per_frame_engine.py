"""What per-frame models say about a video in segments is what stock vLLM says about the whole."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from per_frame_engine import ARCHITECTURES, MAX_PATCHES

# Patches of a frame of the tiny checkpoints: 112 pixels in patches of 14.
PATCHES = 64


def run(*arguments: str) -> Any:
    script = Path(__file__).with_name("per_frame_engine.py")
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.engine
@pytest.mark.parametrize("family", list(ARCHITECTURES))
@pytest.mark.parametrize(
    ("dtype", "chunk", "tolerance"),
    [("float32", 4096, 1e-4), ("bfloat16", 4096, 1e-2), ("float32", 96, 1e-4)],
)
def test_segments_change_no_answer(family: str, dtype: str, chunk: int, tolerance: float) -> None:
    whole = run(family, dtype, str(chunk), "stock")
    split = run(family, dtype, str(chunk), "plugin")
    for (name, answers), number in itertools.product(split["answers"].items(), range(len(whole))):
        expected, got = whole[number], answers[number]
        assert got["prompt"] == expected["prompt"], name
        assert got["tokens"] == expected["tokens"], name
        assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=tolerance), name
    assert max(split["calls"]) == MAX_PATCHES // PATCHES
