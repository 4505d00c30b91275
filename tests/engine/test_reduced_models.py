"""vLLM's models behind ``ReducedVideoModel``: bounded encoder calls, reduced videos."""

from __future__ import annotations

from typing import Any

import pytest
from engine_script import run_script

from vllm_mm_ext.testing.checkpoints import checkpoint

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "qwen3_omni")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """What the models of all families make of the same videos; one process for all."""
    for family in FAMILIES:
        checkpoint(family)
    answers: dict[str, Any] = run_script("reduced_model.py", "float32", *FAMILIES, timeout_s=300)
    return answers


@pytest.mark.engine
@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_calls_are_bounded_and_each_video_is_reduced_as_its_fields_ask(
    outcomes: dict[str, Any], family: str
) -> None:
    answer = outcomes[family]
    assert answer["calls_unbounded"] == [6 * 96 + 96 + 5 * 72]
    assert answer["calls_bounded"] == [192, 192, 192, 168, 144, 144]
    # Only the order of additions inside a matrix product may differ between sizes of calls.
    for name, value in answer.items():
        if name.startswith("difference"):
            assert value < 2e-5, name
    # Of 3 x 2 x 3 cells 0.3 are kept; no reduction; 2 x 2 x 1 cells.
    assert answer["counts"] == [6, 24, 4]
    assert max(answer.get("calls_manager", [0])) <= 200
    assert ("calls_manager" in answer) == family.endswith("_vl")
