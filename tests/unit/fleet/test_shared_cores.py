"""The clock of a server whose threads want more cores than it has."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.fleet.shared_cores import SharedCores


def test_with_cores_enough_the_clock_is_the_real_one() -> None:
    clock = SharedCores()
    clock.engine = 4.0
    clock.work(0.0, 9.0, 3.0)
    assert clock.own(2.5) == 2.5
    assert clock.when(7.0) == 7.0
    assert clock.when(math.inf) == math.inf


def test_two_threads_on_a_core_take_twice_as_long() -> None:
    clock = SharedCores(1)
    clock.engine = 1.0
    clock.work(1.0, 3.0)
    # Alone for a second, at half the speed for four, and alone again.
    assert clock.when(2.0) == pytest.approx(3.0)
    assert clock.when(4.0) == pytest.approx(6.0)
    assert clock.own(3.0) == pytest.approx(2.0)
    assert clock.own(6.0) == pytest.approx(4.0)


def test_the_engine_is_not_slowed_before_it_works() -> None:
    clock = SharedCores(2)
    clock.work(0.0, 4.0, 2.0)
    assert clock.own(1.0) == pytest.approx(1.0)
    clock.engine = 2.0
    assert clock.own(3.0) == pytest.approx(2.0)


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.floats(0, 3), st.sampled_from([0.5, 1.0, 2.0])), max_size=12
    ),
    st.lists(st.floats(0, 4), min_size=1, max_size=8),
    st.integers(1, 3),
)
def test_what_is_expected_comes_true_if_no_more_work_comes(
    works: list[tuple[float, float, float]], pauses: list[float], cores: int
) -> None:
    clock = SharedCores(cores)
    clock.engine = 1.0
    for begins, takes, threads in works:
        clock.work(begins, begins + takes, threads)
    now = reached = 0.0
    for pause in pauses:
        expected = clock.when(reached + pause)
        assert expected >= now + pause - 1e-6
        now, before = expected, reached
        reached = clock.own(now)
        assert reached == pytest.approx(before + pause, abs=1e-6)
