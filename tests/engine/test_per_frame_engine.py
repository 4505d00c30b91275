"""What per-frame models say about a video in segments is what stock vLLM says about the whole."""

from __future__ import annotations

from typing import Any

import pytest
from engine_script import asked_for, run_script
from per_frame_engine import CASES, FAMILIES, MAX_PATCHES

# Patches of a frame of the tiny checkpoints: 112 pixels in patches of 14.
PATCHES = 64


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What both modes say, by family; one process for all families of a mode."""
    families = asked_for(request, "family", FAMILIES)
    return {
        mode: run_script("per_frame_engine.py", mode, *families, timeout_s=300)
        for mode in ("stock", "plugin")
    }


@pytest.mark.engine
@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])]
)
def test_segments_and_bounded_encoder_calls_change_no_answer(
    outcomes: dict[str, Any], family: str
) -> None:
    stock, plugin = outcomes["stock"][family], outcomes["plugin"][family]
    whole_by_dtype = {dtype: whole for (dtype, _), whole in zip(CASES, stock, strict=False)}
    for (dtype, _), split in zip(CASES, plugin, strict=True):
        whole = whole_by_dtype[dtype]
        for name, answers in split["answers"].items():
            # A bfloat16 product may be rounded the other way where a call holds fewer frames; a
            # logit between 2 and 4 then moves by 2**-6.
            exact = dtype == "float32" or name != "bounded"
            tolerance = {"float32": 1e-4, "bfloat16": 1e-2}[dtype] if exact else 2**-6 + 1e-3
            for expected, got in zip(whole, answers, strict=True):
                assert got["prompt"] == expected["prompt"]
                assert got["tokens"] == expected["tokens"], (name, dtype)
                assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=tolerance)
        assert max(split["calls"]) == MAX_PATCHES // PATCHES
        # One rounding of a value up to 8.
        assert split["reduction_error"] <= {"float32": 1e-5, "bfloat16": 2**-6}[dtype]
