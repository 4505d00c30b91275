"""A video in segments gets the answer that stock vLLM gives to the whole video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from engine_script import asked_for, run_script
from segments_engine import WHOLE_PROMPT, make_media

# LLaVA-OneVision and InternVL, and bfloat16: ``test_per_frame_engine``.
FAMILIES = ("qwen2_5_omni", "qwen2_5_vl", "qwen3_vl", "qwen3_omni")
# Qwen3-VL numbers the frames of a video in its prompt.
MERGE_POSITIONS = ("qwen2_5_omni", "qwen2_5_vl", "qwen3_omni")
OMNI = ("qwen2_5_omni", "qwen3_omni")
# Run unless the slow tests are asked for: one with sound, and the one that numbers its frames.
USUAL = ("qwen2_5_omni", "qwen3_vl")
TOLERANCE = 1e-4
SPLIT = ("smallest", "larger")
WHOLE = f"steps of {WHOLE_PROMPT}"

pytestmark = pytest.mark.engine


def marked(families: Sequence[str]) -> list[Any]:
    """The families as values of a parameter."""
    slow = pytest.mark.slow
    return [name if name in USUAL else pytest.param(name, marks=slow) for name in families]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What both modes say, by mode and family; one process for all families of a mode."""
    families = asked_for(request, "family", FAMILIES)
    media = tmp_path_factory.mktemp("segments")
    make_media(media)
    return {
        mode: run_script("segments_engine.py", mode, media, *families, timeout_s=560)
        for mode in ("stock", "plugin")
    }


def assert_equal(got: list[Any], expected: list[Any], case: str) -> None:
    assert len(got) == len(expected) == 3
    for one, other in zip(got, expected, strict=True):
        assert one["prompt"] == other["prompt"], case
        assert one["tokens"] == other["tokens"], case
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=TOLERANCE), case


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", marked(FAMILIES))
def test_segments_change_no_answer_of_stock(outcomes: dict[str, Any], family: str) -> None:
    (stock,) = (asked["silent"] for asked in outcomes["stock"][family].values())
    for case, asked in outcomes["plugin"][family].items():
        for name, got in asked["silent"].items():
            if name != "not merged":
                assert_equal(got, stock, f"{case}, {name}")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", marked(OMNI))
def test_segments_with_sound_change_no_answer_of_the_whole(
    outcomes: dict[str, Any], family: str
) -> None:
    """The whole is what transformers' models answer (``test_omni_engine``); stock is not."""
    whole = outcomes["plugin"][family][WHOLE]["sounding"]["whole"]
    for case, asked in outcomes["plugin"][family].items():
        for name in SPLIT:
            if name in asked["sounding"]:
                assert_equal(asked["sounding"][name], whole, f"{case}, {name}")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", marked(FAMILIES))
def test_reduced_videos_take_as_many_tokens_as_foretold(
    outcomes: dict[str, Any], family: str
) -> None:
    whole, *reduced = outcomes["plugin"][family][WHOLE]["reduced"]
    for one in (whole, *reduced):
        assert one["prompt"] == one["foretold"]
    assert all(one["prompt"] < whole["prompt"] for one in reduced)
    assert len({tuple(one["tokens"]) for one in (whole, *reduced)}) > 1


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", marked(FAMILIES))
def test_videos_really_are_several_segments(outcomes: dict[str, Any], family: str) -> None:
    for case, asked in outcomes["plugin"][family].items():
        for kind in {"silent", "sounding"} & asked.keys():
            by_size = asked[kind]
            for name in set(SPLIT) & by_size.keys():
                least = 3 if name == "smallest" else 2
                assert min(one["items"] for one in by_size[name]) >= least, (case, kind, name)
            if "whole" in by_size:
                assert {one["items"] for one in by_size["whole"]} == {1}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", marked(MERGE_POSITIONS))
def test_segments_at_positions_of_their_own_change_answers(
    outcomes: dict[str, Any], family: str
) -> None:
    """Otherwise equal answers would prove nothing about positions."""
    asked = outcomes["plugin"][family][WHOLE]
    for kind in {"silent", "sounding"} & asked.keys():
        by_size = asked[kind]
        tokens = [one["tokens"] for one in by_size["whole"]]
        assert [one["tokens"] for one in by_size["not merged"]] != tokens, kind
