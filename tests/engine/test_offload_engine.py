"""vLLM's own KV offloading beside the plugin: what it loads gives the answers of an empty cache.

The copies between device and host are made by CUDA; a class of the tests stands in for them
(``tests/support/offload_on_cpu.py``). Everything else of vLLM's connector is its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_script import run_script

from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.testing.media import make_clip

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.mark.parametrize("policy", ["lru", "CostAwarePolicy"])
def test_kv_that_vllms_connector_loads_gives_the_answers_of_an_empty_cache(
    policy: str, tmp_path: Path
) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for number in range(4):
        make_clip(media / f"{number}.mp4", width=448, height=224, duration=10.0, fps=4, seed=number)
    model = build("qwen2_5_vl", tmp_path / "model", video_max_pixels=448 * 448)
    env = {"VLLM_PLUGINS": "mm_ext", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "DO_NOT_TRACK": "1"}
    found = run_script("offload_engine.py", model, media, policy, timeout_s=500, env=env)
    assert found["stored"] > 0
    assert found["loaded_when_cold"] > 0
    assert found["loaded_when_nothing_is_there"] == 0
    assert found["turns"] == found["again"] == found["computed"]
