"""Times of temporal grids and the interleaving of video with sound, as pure arithmetic."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2_5OmniProcessor

from vllm_mm_ext.video.grid_times import (
    GridTimes,
    even_grid,
    grid_times,
    interleave_chunks,
    interleave_tokens,
    step_holds,
)

ascending = st.lists(st.floats(0, 600), min_size=1, max_size=60).map(sorted)


def chunks(grids: GridTimes, per_grid: int, audio: int) -> list[tuple[int, int]]:
    return interleave_chunks(
        grids,
        tokens_per_grid=per_grid,
        num_audio_tokens=audio,
        positions_per_second=25,
        seconds_per_chunk=2,
    )


def reference_chunks(positions: np.ndarray, per_chunk: int) -> list[int]:
    found = Qwen2_5OmniProcessor.get_chunked_index(SimpleNamespace(), positions, per_chunk)
    return [end - start for start, end in found]


@given(
    st.integers(1, 40),
    st.one_of(st.floats(0.05, 30), st.sampled_from([0.4, 0.7, 1.0, 2 / 3, 2.0, 4.0])),
    st.integers(1, 30),
    st.integers(1, 700),
)
def test_even_grids_interleave_as_in_transformers(num_grids, step, per_grid, audio):
    positions = np.repeat(np.arange(num_grids), per_grid) * step * 25
    visual = reference_chunks(positions, 50)
    audible = reference_chunks(np.arange(audio), 50)
    length = max(len(visual), len(audible))
    expected = [
        (visual[i] if i < len(visual) else 0, audible[i] if i < len(audible) else 0)
        for i in range(length)
    ]
    assert chunks(even_grid(num_grids, step), per_grid, audio) == expected


@given(ascending, st.integers(1, 9), st.integers(0, 700))
def test_every_token_is_in_exactly_one_run(times, per_grid, audio):
    grids = GridTimes(tuple(times), None)
    by_time = interleave_tokens(
        grids, tokens_per_grid=per_grid, num_audio_tokens=audio, positions_per_second=13
    )
    for runs in (chunks(grids, per_grid, audio), by_time):
        assert sum(v for v, _ in runs) == per_grid * len(times)
        assert sum(a for _, a in runs) == audio
        assert min(min(run) for run in runs) >= 0


@given(ascending, st.integers(1, 9), st.integers(1, 700))
def test_uneven_grids_are_in_the_chunk_of_their_time(times, per_grid, audio):
    visual = [v for v, _ in chunks(GridTimes(tuple(times), None), per_grid, audio)]
    for index, count in enumerate(visual):
        assert count == per_grid * sum(50 * index <= 25 * t < 50 * (index + 1) for t in times)


@given(ascending, st.integers(1, 5), st.integers(1, 300))
def test_token_by_token_a_grid_precedes_sound_that_begins_no_earlier(times, per_grid, audio):
    runs = interleave_tokens(
        GridTimes(tuple(times), None),
        tokens_per_grid=per_grid,
        num_audio_tokens=audio,
        positions_per_second=13,
    )
    heard = runs[0][1]
    for time, (_, following) in zip(times, runs[1:], strict=True):
        assert heard == min(audio, int(np.ceil(time * 13)))
        heard += following


@given(st.integers(2, 60), st.sampled_from([0.1, 0.5, 1.0, 1.4, 2.0, 3.0, 12.5]), st.data())
def test_frames_on_an_even_grid_give_its_rate(num_frames, fps, data):
    offset = data.draw(st.floats(0, 1 / fps))
    made = grid_times(
        [offset + i / fps for i in range(num_frames)], temporal_patch=2, assumed_step=9.0
    )
    assert made.step == pytest.approx(2 / fps, rel=1e-8)
    assert len(made.seconds) == (num_frames + 1) // 2


def test_rounding_to_source_frames_is_even_and_content_adaptive_is_not():
    source = np.arange(0, 20, 1001 / 24000)
    rounded = [float(source[np.argmin(abs(source - t))]) for t in np.arange(0, 10, 0.5)]
    assert grid_times(rounded, temporal_patch=2, assumed_step=1.0).step == pytest.approx(1, 0.01)
    bunched = [0.0, 1.0, 2.0, 2.1, 2.2, 2.3, 3.0, 4.0]
    made = grid_times(bunched, temporal_patch=2, assumed_step=1.0)
    assert made.step is None
    assert made.seconds == (0.0, 2.0, 2.2, 3.0)


def test_frames_of_the_end_of_a_clip_keep_their_place_in_it():
    made = grid_times([30.0, 30.5, 31.0, 31.5], temporal_patch=2, assumed_step=1.0)
    assert made.step is None
    assert made.temporal_positions(25).tolist() == [750, 775]


def test_one_frame_is_placed_at_the_start():
    assert grid_times([7.0], temporal_patch=2, assumed_step=1.0) == even_grid(1, 1.0)


@given(ascending, st.sampled_from([2, 13, 25]))
def test_uneven_grids_have_a_position_each_at_their_time_or_right_after_the_last(times, rate):
    positions = GridTimes(tuple(times), None).temporal_positions(rate).tolist()
    assert all(a < b for a, b in pairwise(positions))
    for index, (time, position) in enumerate(zip(times, positions, strict=True)):
        at_its_time = position == round(time * rate)
        assert at_its_time or position == positions[index - 1] + 1 > round(time * rate)


def test_a_guess_from_frame_counts_holds_and_a_wrong_one_does_not():
    even = [i * 60 / 31 for i in range(32)]  # first and last frame of 60 s included
    assert step_holds(even, temporal_patch=2, assumed_step=2 * 60 / 32)
    assert not step_holds(even, temporal_patch=2, assumed_step=1.0)
    assert not step_holds([0, 0.1, 0.2, 9], temporal_patch=2, assumed_step=6.0)
    assert step_holds([3.0], temporal_patch=2, assumed_step=1.0)


@pytest.mark.parametrize("times", [[], [1.0, 0.5]])
def test_times_that_are_none_or_go_back_are_refused(times):
    with pytest.raises(ValueError, match=r"frame"):
        grid_times(times, temporal_patch=2, assumed_step=1.0)
