"""`search`: a first look at all windows, a second at few, and where those are."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.long_video.asking import Window
from vllm_mm_ext.long_video.looking import SeenWindow
from vllm_mm_ext.long_video.search import choose


def seen(relevances: list[float], activities: list[float] | None = None) -> list[SeenWindow]:
    return [
        SeenWindow(
            Window(0, number, number * 28.0, number * 28.0 + 30),
            relevance=relevance,
            activity=activities[number] if activities else None,
        )
        for number, relevance in enumerate(relevances)
    ]


def numbers(windows: list[Window]) -> list[int]:
    return [window.number for window in windows]


def test_the_most_relevant_windows_get_a_second_look() -> None:
    relevances = [0.01] * 100
    relevances[10], relevances[50], relevances[90] = 0.7, 0.9, 0.8
    assert numbers(choose(seen(relevances), 12)) == [50, 90, 10]


def test_of_windows_as_relevant_the_more_active_one_comes_first() -> None:
    relevances, activities = [0.501, 0.5] + [0.0] * 8 + [0.502], [0.2, 0.1] + [0.0] * 8 + [0.9]
    assert numbers(choose(seen(relevances, activities), 1)) == [10]


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), max_size=60), st.integers(1, 20), st.randoms())
def test_the_choice_is_bounded_and_does_not_depend_on_the_order_of_replies(
    values: list[float], count: int, order: random.Random
) -> None:
    windows = seen(values)
    chosen = choose(windows, count)
    order.shuffle(windows)
    assert choose(windows, count) == chosen
    assert len(set(chosen)) == len(chosen) <= count
    if values:
        top = chosen[0].number
        assert values[top] >= max(values) - 0.01
