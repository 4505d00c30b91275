"""The composer in vLLM says what the same checkpoint says in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
from composer_engine import CASES, CASES_ASKED, MAX_PATCHES
from engine_script import run_script

PATCHES = 16
# A logit between 4 and 8 has steps of 2**-5 in bfloat16, and the two round in other places.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-5 + 1e-3}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """What engines and plain PyTorch say, all in one process."""
    made: dict[str, Any] = run_script("composer_engine.py", timeout_s=400)
    return made


@pytest.mark.engine
@pytest.mark.parametrize("name", CASES_ASKED)
def test_answers_are_those_of_plain_pytorch_however_the_video_is_cut(
    outcomes: dict[str, Any], name: str
) -> None:
    index = list(CASES_ASKED).index(name)
    for (dtype, _), engine in zip(CASES, outcomes["engines"], strict=True):
        expected = outcomes["plain"][dtype][name]
        for how, answers in engine["answers"].items():
            _assert_same(answers[index], expected, TOLERANCE[dtype], (dtype, how))


@pytest.mark.engine
def test_the_cases_have_answers_of_their_own(outcomes: dict[str, Any]) -> None:
    plain = outcomes["plain"]["float32"]
    # Among them equal frames at other times.
    assert len({tuple(answer["logprobs"]) for answer in plain.values()}) == len(plain)
    assert len({tuple(answer["tokens"]) for answer in plain.values()}) > len(plain) // 2


@pytest.mark.engine
def test_encoder_calls_are_bounded(outcomes: dict[str, Any]) -> None:
    assert max(outcomes["engines"][0]["calls"]) == MAX_PATCHES // PATCHES


@pytest.mark.engine
def test_a_second_question_finds_the_video_and_has_the_right_answer(
    outcomes: dict[str, Any],
) -> None:
    for (dtype, _), engine in zip(CASES, outcomes["engines"], strict=True):
        first, second = engine["follow_up"]
        _assert_same(first, outcomes["plain"][dtype]["uneven"], TOLERANCE[dtype], dtype)
        _assert_same(second, outcomes["plain"][dtype]["again"], TOLERANCE[dtype], dtype)
        assert first["cached"] == 0
        # Whole blocks, of up to 128 tokens.
        assert second["cached"] > len(first["prompt"]) - 128


@pytest.mark.engine
def test_the_kv_cache_knows_the_sound_inside_a_video(outcomes: dict[str, Any]) -> None:
    for engine in outcomes["engines"]:
        prompt = outcomes["plain"]["float32"]["again"]["prompt"]
        audio, video = (prompt.count(token) for token in engine["pads"])
        assert 0 < engine["cached"]["audio"] <= audio
        assert 0 < engine["cached"]["video"] <= video
        assert engine["cached"]["text"] > 0


@pytest.mark.engine
def test_a_lora_adapter_of_the_text_model_acts_as_if_added_to_its_weights(
    outcomes: dict[str, Any],
) -> None:
    adapted = outcomes["adapted"]
    _assert_same(adapted["got"], adapted["plain"], TOLERANCE["float32"], "adapted")
    assert adapted["plain"]["logprobs"] != outcomes["plain"]["float32"]["uneven"]["logprobs"]


def _assert_same(answer: Any, expected: Any, tolerance: float, what: object) -> None:
    assert answer["prompt"] == expected["prompt"], what
    assert answer["tokens"] == expected["tokens"], what
    assert answer["logprobs"] == pytest.approx(expected["logprobs"], abs=tolerance), what
