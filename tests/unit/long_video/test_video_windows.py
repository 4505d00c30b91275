"""Windows of videos: they cover everything, overlap, and stay where they are as a video grows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.errors import OptionBoundError
from vllm_mm_ext.long_video.video_windows import windows_of

DURATIONS = st.floats(0.001, 2000)
WINDOW_S = st.floats(4, 600)
OVERLAPS = st.floats(0, 0.5)  # As a part of the window.
MANY = 1 << 20


@settings(max_examples=30)
@given(st.lists(DURATIONS, min_size=1, max_size=3), WINDOW_S, OVERLAPS)
def test_windows_cover_each_video_in_order_and_overlap(
    durations: list[float], window_s: float, part: float
) -> None:
    overlap_s = part * window_s
    windows = windows_of(durations, window_s, overlap_s, MANY)
    assert [w.video for w in windows] == sorted(w.video for w in windows)
    for video, duration in enumerate(durations):
        of_video = [w for w in windows if w.video == video]
        assert [w.number for w in of_video] == list(range(len(of_video)))
        assert of_video[0].start == 0
        assert of_video[-1].end == duration
        for before, after in pairwise(of_video):
            assert before.end - before.start == pytest.approx(window_s)
            assert before.end - after.start == pytest.approx(overlap_s, abs=1e-6)
            assert after.end > before.end


@settings(max_examples=30)
@given(DURATIONS, WINDOW_S, OVERLAPS)
def test_the_last_window_is_never_shorter_than_the_overlap_nor_much_longer_than_a_window(
    duration: float, window_s: float, part: float
) -> None:
    windows = windows_of([duration], window_s, part * window_s, MANY)
    last = windows[-1].end - windows[-1].start
    assert last <= window_s + 1
    if len(windows) > 1:
        assert last >= max(part * window_s, 1) - 1e-6


@settings(max_examples=30)
@given(DURATIONS, st.floats(0, 10_000), WINDOW_S, OVERLAPS)
def test_a_video_that_has_grown_keeps_all_windows_but_the_last(
    duration: float, more: float, window_s: float, part: float
) -> None:
    before = windows_of([duration], window_s, part * window_s, MANY)
    after = windows_of([duration + more], window_s, part * window_s, MANY)
    assert after[: len(before) - 1] == before[:-1]


@pytest.mark.parametrize("duration", [1e-300, 5e-324, 1.0])
def test_a_video_of_next_to_no_length_is_one_window(duration: float) -> None:
    assert [w.end for w in windows_of([duration], 30, 2, 1000)] == [duration]


@pytest.mark.parametrize("duration", [1e15, 1.7e308])
def test_an_absurdly_long_video_is_refused_at_once(duration: float) -> None:
    with pytest.raises(OptionBoundError, match="hours would fit"):
        windows_of([duration], 30, 2, 1000)


def test_too_many_windows_are_refused_with_the_window_that_would_fit() -> None:
    with pytest.raises(OptionBoundError, match="window_s = 72 would fit") as caught:
        windows_of([7000.0], 30, 2, 100)
    assert caught.value.message.startswith("250 windows of 30 s are more than max_windows = 100")
    assert len(windows_of([7000.0], 72, 2, 100)) <= 100
    assert len(windows_of([7000.0], 71, 2, 200)) > 100


def test_where_no_window_is_long_enough_the_refusal_says_how_many_hours_fit() -> None:
    with pytest.raises(OptionBoundError, match=r"of 600 s, 0\.3 hours would fit"):
        windows_of([7200.0], 30, 0, 2)
