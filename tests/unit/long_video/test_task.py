"""A request's options and the server's settings make a task, or a refusal that says what fits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vllm_mm_ext.config.long_video_settings import LongVideoOptions, LongVideoSettings
from vllm_mm_ext.errors import MediaError, OptionBoundError
from vllm_mm_ext.long_video.task import Task, strategy_for, task_of


def task(settings: LongVideoSettings, *durations: float | None, **options: Any) -> Task:
    return task_of(
        settings,
        LongVideoOptions(**options),
        strategy="map_reduce",
        question="?",
        durations=durations or (100.0,),
        answer_room=1000,
    )


def test_what_a_request_leaves_out_is_as_configured() -> None:
    made = task(LongVideoSettings(window_s=20, max_parallel=3), 50.0, fps=2)
    assert [(w.start, w.end) for w in made.windows] == [(0, 20), (18, 38), (36, 50)]
    assert (made.max_parallel, made.total_tokens, made.fps) == (3, None, 2)


def test_a_configured_overlap_is_shortened_for_short_windows() -> None:
    made = task(LongVideoSettings(window_s=60, overlap_s=20), 10.0, window_s=6)
    assert [(w.start, w.end) for w in made.windows] == [(0, 6), (3, 9), (6, 10)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"overlap_s": 20}, "overlap_s = 20: must be at most half of window_s, 15"),
        ({"max_parallel": 9}, "max_parallel = 9: must be at most 4 on this server"),
        ({"max_windows": 4000}, "max_windows = 4000: must be at most 2048 on this server"),
        ({"max_windows": 2}, "4 windows of 30 s are more than max_windows = 2: window_s = 51"),
    ],
)
def test_an_option_past_a_bound_is_refused_with_the_bound(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(OptionBoundError) as caught:
        task(LongVideoSettings(), **options)
    assert says in caught.value.message


@pytest.mark.parametrize("duration", [None, 0.0, -1.0, math.nan, math.inf])
def test_a_video_without_a_duration_is_refused(duration: float) -> None:
    with pytest.raises(MediaError, match="Video 2 does not tell how long it is"):
        task(LongVideoSettings(), 100.0, duration)


def test_auto_is_one_prompt_where_all_fits_and_a_named_strategy_is_used() -> None:
    assert strategy_for("auto", "How many?", fits=True) == "single"
    assert strategy_for("auto", "How many?", fits=False) == "auto"
    for whole in (" ", "Describe the video.", "In which order do the shapes appear?"):
        assert strategy_for("auto", whole, fits=False) == "map_reduce"
    assert strategy_for("rolling", "How many?", fits=True) == "rolling"
