"""Real engine, KV for half of the conversations: what is found again, and that it is right."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_script import run_script

from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.testing.media import make_clip

pytestmark = pytest.mark.engine


def test_media_found_after_churn_give_the_answers_of_an_empty_cache(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for number in range(4):
        make_clip(media / f"{number}.mp4", width=448, height=224, duration=10.0, fps=4, seed=number)
    model = build("qwen2_5_vl", tmp_path / "model", video_max_pixels=448 * 448)
    env = {"VLLM_PLUGINS": "mm_ext", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "DO_NOT_TRACK": "1"}
    found = run_script("kv_engine.py", model, media, timeout_s=400, env=env)
    turns = found["turns"]
    assert found["kept"] > 0
    later = [turn for turn in turns if turn["turn"] > 1]
    assert sum(turn["cached"] for turn in later) > 0.1 * sum(turn["media"] for turn in later)
    assert [turn["answer"] for turn in turns if turn["cached"]] == found["cold"]
    # Whoever reads the engine's KV events knows which segments are cached, and where they begin.
    held = {tuple(place) for place in found["held"]}
    assert held
    assert held <= {tuple(place) for place in found["told"]}
    assert found["cleared"] > 0


@pytest.mark.slow
def test_a_pinned_sessions_media_outlive_others_until_it_is_released(tmp_path: Path) -> None:
    model = build("qwen2_5_vl", tmp_path / "model", video_max_pixels=448 * 448)
    env = {"VLLM_PLUGINS": "mm_ext", "DO_NOT_TRACK": "1"}
    found = run_script("kv_sessions_engine.py", model, timeout_s=400, env=env)
    # Blocks are found whole, and the prompt's last token is always computed.
    whole = found["tokens"] - 32
    assert found["pinned"] >= whole
    assert found["released"] < 32
    sessions = {media["identifier"]: media["sessions"] for media in found["listed"]}
    assert 1 in sessions.values()
