"""Times of temporal grids and the interleaving of video with sound, as pure arithmetic."""

from __future__ import annotations

import math
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
    # transformers cuts grids that are further apart than chunks into pieces.
    st.one_of(st.floats(0.05, 2.0), st.sampled_from([0.4, 0.7, 1.0, 2 / 3])),
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
def test_grids_are_in_the_chunk_of_their_time(times, per_grid, audio):
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


def test_frames_at_a_fixed_rate_have_grids_at_that_rate():
    # On screen at 0, 0.5, 1... are frames of a 23.976 fps source that begin a little earlier.
    frames = [math.floor(24000 / 1001 * t) * 1001 / 24000 for t in np.arange(0, 10, 0.5)]
    assert grid_times(frames, temporal_patch=2, step=0.5) == even_grid(10, 1.0)


@given(ascending, st.integers(1, 3))
def test_other_frames_have_grids_at_their_own_times(times, patch):
    made = grid_times(times, temporal_patch=patch, step=None)
    assert made.step is None
    assert list(made.seconds) == times[::patch]


@given(ascending, st.integers(0, 30), st.sampled_from([None, 0.5]))
def test_a_longer_video_has_the_same_leading_grids(times, more, step):
    longer = grid_times([*times, *[times[-1]] * 2 * more], temporal_patch=2, step=step)
    whole = len(times) // 2
    made = grid_times(times, temporal_patch=2, step=step)
    assert longer.seconds[:whole] == made.seconds[:whole]
    assert (longer.temporal_positions(25)[:whole] == made.temporal_positions(25)[:whole]).all()


@given(ascending, st.sampled_from([2, 13, 25]))
def test_grids_at_no_fixed_rate_have_the_position_nearest_to_their_time(times, rate):
    positions = GridTimes(tuple(times), None).temporal_positions(rate)
    assert (abs(positions - np.asarray(times) * rate) <= 0.5).all()


@pytest.mark.parametrize("times", [[], [1.0, 0.5]])
def test_times_that_are_none_or_go_back_are_refused(times):
    with pytest.raises(ValueError, match=r"frame"):
        grid_times(times, temporal_patch=2, step=None)
