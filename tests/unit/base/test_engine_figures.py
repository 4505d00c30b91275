"""Figures of engines and times of requests in the shared state of a service."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.base.engine_figures import COUNTERS, FIGURES, EngineBoard, EngineTimes
from vllm_mm_ext.base.shared_state import open_state, private_state


@pytest.fixture
def board():
    state = private_state()
    yield EngineBoard(state)
    state.close()


def _figures(count):
    return {name: float(count + index) for index, name in enumerate(FIGURES)}


def test_an_engine_that_published_nothing_has_no_figures(board):
    assert board.figures(0) is None
    assert board.take(0) == {}


def test_figures_come_back_as_they_were_written(board):
    board.write(3, _figures(7))
    assert board.figures(3) == _figures(7)
    assert board.figures(2) is None
    board.clear(3)
    assert board.figures(3) is None


def test_an_engine_beyond_the_table_is_left_out(board):
    board.write(10**6, _figures(0))
    board.clear(10**6)
    assert board.figures(10**6) is None


@settings(max_examples=30)
@given(steps=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=20))
def test_what_processes_take_adds_up_to_the_counters(steps, tmp_path_factory):
    directories = [tmp_path_factory.mktemp("shared")]
    one, other = (open_state("service", directories) for _ in range(2))
    taken = dict.fromkeys(COUNTERS, 0.0)
    count = 0
    for more, by_one in steps:
        count += more
        EngineBoard(one).write(1, _figures(count))
        for name, grown in EngineBoard(one if by_one else other).take(1).items():
            taken[name] += grown
    expected = _figures(count) if steps else dict.fromkeys(COUNTERS, 0.0)
    assert taken == {name: expected[name] for name in COUNTERS}
    one.close()
    other.close()


def test_an_engine_that_begins_anew_counts_from_zero(board):
    board.write(0, _figures(1000))
    board.take(0)
    board.write(0, _figures(5))
    assert board.take(0)[COUNTERS[0]] == 5.0


def test_times_are_found_by_the_arrival_of_their_request(board):
    times = EngineTimes(1.0, 2.0, 3.0)
    assert board.times(1e9 + 0.125) is None
    board.write_times(1e9 + 0.125, times)
    assert board.times(1e9 + 0.125) == times
    assert board.times(1e9 + 0.25) is None


def test_times_outlast_those_of_thousands_of_later_requests(board):
    times = EngineTimes(1.0, 2.0, 3.0)
    dice = random.Random(1)
    arrivals = [1.7e9 + dice.uniform(0, 60) for _ in range(5000)]
    for arrival in arrivals:
        board.write_times(arrival, times)
    assert sum(board.times(arrival) == times for arrival in arrivals[:1000]) > 900


def test_the_first_of_several_samples_of_a_request_tells_its_times(board):
    board.write_times(5.5, EngineTimes(1.0, 2.0, 3.0))
    board.write_times(5.5, EngineTimes(0.0, 0.0, 0.0))
    assert board.times(5.5) == EngineTimes(1.0, 2.0, 3.0)


def test_requests_of_one_second_hardly_take_each_others_places(board):
    arrivals = [1_780_000_000 + number / 997 for number in range(200)]
    for number, arrival in enumerate(arrivals):
        board.write_times(arrival, EngineTimes(number, 0.0, 0.0))
    found = [board.times(arrival) for arrival in arrivals]
    # Of 200 among 4096 places, five are expected to share one.
    assert sum(times is None for times in found) < 15
    assert all(times is None or times.encode_s == n for n, times in enumerate(found))
