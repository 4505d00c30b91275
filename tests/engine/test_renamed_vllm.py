"""A vLLM whose private names have changed serves as stock, with one warning for each feature."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from engine_script import run_script
from renamed_vllm import build_renamed

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import make_clip

pytestmark = pytest.mark.engine

# At least one name of every feature and every part that the command line names.
RENAMED = (
    "create_engine_config",
    "MultiModalDataParser",
    "get_video_loader_backend_for_processor",
    "VideoLoader",
    "serialize_item",
    "cache_full_blocks",
    "call_utility_async",
    "register_model",
    "_resolve_mm_embedding_inputs",
    "process_for_engine_async",
    "_get_session_id",
    "_get_priority",
    "default_chat_tok_params",
    "_get_cache_missing_items",
    "get_core_engine_for_request",
    "_merge_mm_kwargs",
    "_process_mm_uuids",
    "get_and_update_features",
    "_try_schedule_encoder_inputs",
    "get_freed_mm_hashes",
    "_tokenize_prompt",
    "verify_token",
    "get_request_counts",
    "check_health",
    "use_beam_search",
    "score_data_to_prompts",
)


def test_an_engine_on_a_changed_vllm_answers_as_stock(tmp_path: Path) -> None:
    build_renamed(tmp_path / "site", RENAMED)
    clip = tmp_path / "clip.mp4"
    make_clip(clip, width=64, height=48, duration=2.0)
    path = os.pathsep.join(filter(None, (str(tmp_path / "site"), os.environ.get("PYTHONPATH"))))
    env = {
        "PYTHONPATH": path,
        "VLLM_PLUGINS": "mm_ext",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "DO_NOT_TRACK": "1",
    }
    found = run_script(
        "renamed_vllm_engine.py", checkpoint("qwen2_5_vl"), clip, timeout_s=400, env=env, fresh=True
    )
    assert found["tokens"] == 8
    assert found["active"] == []
    assert found["changed"] == {}
    warned = [text.split("'")[1] for text in found["loaded"]]
    assert warned == found["features"], "one warning for each feature"
    assert found["scheduler"].startswith("vllm.")
    assert found["encoder_cache"].startswith("vllm.")
    for part in ("scheduler", "encoder cache"):
        assert sum(part in text for text in found["later"]) == 1, found["later"]
