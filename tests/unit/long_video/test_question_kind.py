"""`auto`: one prompt where all fits, else by the kind of the question."""

from __future__ import annotations

import pytest

from vllm_mm_ext.long_video.question_kind import strategy_for


@pytest.mark.parametrize(
    ("question", "strategy"),
    [
        ("When is the blue flash?", "search"),
        ("What is on screen when the high tone sounds?", "search"),
        ("Which colour is the car that the man in the hat gets into?", "search"),
        ("Does anybody open the door?", "search"),
        ("Wo ist der Hund?", "search"),
        ("How many blue flashes are there?", "map_reduce"),
        ("How often does the bell ring?", "map_reduce"),
        ("What comes after the green bar?", "map_reduce"),
        ("Is the red circle before the blue flash?", "map_reduce"),
        ("What is the pitch of the second tone?", "map_reduce"),
        ("Does the dog come back later?", "map_reduce"),
        ("Summarise the video.", "map_reduce"),
        ("What is this video about?", "map_reduce"),
        ("Write chapters with times.", "map_reduce"),
        ("", "map_reduce"),
        ("Explain step by step how the cake is made.", "rolling"),
        ("Tell the story of the film.", "rolling"),
    ],
)
def test_a_question_gets_the_strategy_of_its_kind(question: str, strategy: str) -> None:
    assert strategy_for("auto", question, fits=False) == strategy


def test_what_fits_is_asked_in_one_prompt_and_a_named_strategy_is_used() -> None:
    assert strategy_for("auto", "How many?", fits=True) == "single"
    assert strategy_for("rolling", "How many?", fits=True) == "rolling"
