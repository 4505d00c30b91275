"""Live sessions on a real engine: what is computed as units come, and that answers are the same."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from engine_script import run_script

from vllm_mm_ext.testing.checkpoints import build

pytestmark = pytest.mark.engine

BLOCK = 32


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_5_omni",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("composer", "qwen3_omni", "qwen2_5_vl", "qwen3_vl")
        ),
    ],
)
def test_units_are_computed_as_they_come_and_answers_are_those_of_the_whole_conversation(
    family: str, tmp_path: Path
) -> None:
    model = build(family, tmp_path / "model")
    tells = family == "composer"
    if tells:
        config = json.loads((model / "config.json").read_text())
        end = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
        (model / "config.json").write_text(json.dumps({**config, "turn_end_token_id": end}))
    env = {"VLLM_PLUGINS": "mm_ext", "DO_NOT_TRACK": "1"}
    found = run_script("live_engine.py", model, timeout_s=400, env=env)

    hears = not family.endswith("vl")
    assert len(found["turns"]) == (3 if hears else 2)
    for turn in found["turns"]:
        appends = turn["appends"]
        for (before, _), (tokens, computed) in pairwise(appends):
            assert computed <= tokens - before + BLOCK
        prompt, cached, written, sound, frames = turn["usage"]
        # The last whole unit was there; what is computed is the short one and the text.
        assert cached >= appends[-1][0] - BLOCK
        assert written <= 16
        assert (sound > 0) == hears
        assert 0 < sound + frames < prompt
        assert abs(turn["measured"] - prompt) <= 8
    # Nothing was cached when the whole conversation was asked at once.
    assert [(same, cached) for same, cached, *_ in found["exact"]] == [(True, 0)] * len(
        found["turns"]
    )

    # Random weights: no token is likely.
    assert (0 < found["turn_end"] < 0.5) if tells else found["turn_end"] is None
    assert found["stopped"] == [True, "ended", "next"]
    refused = found["refused"]
    assert refused["long"][1:4] == ["long", "invalid_request_error", "context_length_exceeded"]
    assert refused["empty"][1:4] == ["empty", "invalid_request_error", "invalid_conversation"]
    assert refused["append"] == ["appended", None, 0, None]
    assert refused["short"] == "ended"
    assert "unknown" in refused["unknown"]
