"""Cuts: together the whole video, within bounds, and the same for a longer clip."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.video.cuts import (
    Cut,
    cut_between,
    cut_silent,
    cut_sounding,
    cut_units,
    reduced_runs,
    unit_ends,
)
from vllm_mm_ext.video.grid_times import (
    GridTimes,
    even_grid,
    interleave_chunks,
    interleave_tokens,
)


def tokens(per_grid: int, temporal: int = 1) -> Callable[[int], int]:
    return lambda grids: -(-grids // temporal) * per_grid


silent = st.tuples(
    st.integers(1, 200), st.integers(1, 700), st.integers(0, 4096), st.integers(1, 4)
)


@given(silent)
def test_silent_segments_are_the_whole_video_within_the_target(case: tuple[int, int, int, int]):
    grids, per_grid, target, unit = case
    cuts = cut_silent(grids, per_grid, target, tokens(per_grid), unit)
    assert cuts[0].grids[0] == 0
    assert cuts[-1].grids[1] == grids
    assert all(a.grids[1] == b.grids[0] for a, b in pairwise(cuts))
    for cut in cuts:
        size = cut.grids[1] - cut.grids[0]
        assert size >= 1
        assert not target or size <= unit or size * per_grid <= target
    assert target or len(cuts) == 1


@given(silent, st.integers(1, 50))
def test_a_longer_silent_video_keeps_all_but_the_last_segment(case, longer):
    grids, per_grid, target, unit = case
    short = cut_silent(grids, per_grid, target, tokens(per_grid), unit)
    long = cut_silent(grids + longer, per_grid, target, tokens(per_grid), unit)
    if target:
        assert long[: len(short) - 1] == short[:-1]


def test_grids_that_merge_stay_together():
    assert [c.grids for c in cut_silent(10, 100, 500, tokens(100), 2)] == [(0, 4), (4, 8), (8, 10)]
    assert [c.grids for c in cut_silent(4, 100, 100, tokens(100), 2)] == [(0, 2), (2, 4)]


def test_segments_hold_as_many_grids_as_their_reduced_tokens_allow():
    assert [c.grids for c in cut_silent(9, 100, 100, lambda n: 25 * n)] == [(0, 4), (4, 8), (8, 9)]


sounding = st.tuples(
    st.integers(1, 40),  # grids
    st.integers(1, 60),  # tokens per grid
    st.sampled_from([0.5, 1.0, 2.0, 4.0, 1 / 3]),  # seconds per grid
    st.integers(1, 700),  # audio tokens
    st.integers(1, 600),  # target
)


def runs_of(family: str, grids: GridTimes, per_grid: int, audio: int) -> list[tuple[int, int]]:
    if family == "chunks":
        return interleave_chunks(
            grids,
            tokens_per_grid=per_grid,
            num_audio_tokens=audio,
            positions_per_second=25,
            seconds_per_chunk=2.0,
        )
    return interleave_tokens(
        grids, tokens_per_grid=per_grid, num_audio_tokens=audio, positions_per_second=13
    )


def flat(runs) -> str:
    return "".join("v" * visual + "a" * audio for visual, audio in runs)


def check(cuts: list[Cut], runs: list[tuple[int, int]], per_grid: int, unit: int) -> None:
    assert flat(run for cut in cuts for run in cut.runs) == flat(runs)
    total = sum(audio for _, audio in runs)
    for cut in cuts:
        assert sum(visual for visual, _ in cut.runs) == (cut.grids[1] - cut.grids[0]) * per_grid
        assert sum(audio for _, audio in cut.runs) == cut.audio[1] - cut.audio[0]
        assert cut.grids[1] > cut.grids[0]
        assert cut.audio[0] % unit == 0 or cut.audio[0] == total
    assert all(a.grids[1] == b.grids[0] and a.audio[1] == b.audio[0] for a, b in pairwise(cuts))


@pytest.mark.parametrize(("family", "unit"), [("chunks", 50), ("tokens", 13), ("tokens", 104)])
@given(case=sounding)
def test_sounding_segments_hold_whole_grids_and_whole_windows(family, unit, case):
    grids, per_grid, step, audio, target = case
    runs = runs_of(family, even_grid(grids, step), per_grid, audio)
    check(
        cut_sounding(runs, per_grid, target, tokens(per_grid), audio_unit=unit),
        runs,
        per_grid,
        unit,
    )
    assert len(cut_sounding(runs, per_grid, 0, tokens(per_grid), audio_unit=unit)) == 1


@given(case=sounding, more=st.integers(1, 10))
def test_a_longer_video_keeps_the_segments_before_the_end_of_the_shorter(case, more):
    grids, per_grid, step, audio, target = case
    whole = [
        cut_sounding(
            runs_of("chunks", even_grid(n, step), per_grid, sound),
            per_grid,
            target,
            tokens(per_grid),
            audio_unit=50,
        )
        for n, sound in ((grids, audio), (grids + more, audio + 50 * more))
    ]
    # The last segment goes on, and so does one whose window the short clip's sound does not fill.
    kept = [cut for cut in whole[0][:-1] if cut.audio[1] < audio]
    assert whole[1][: len(kept)] == kept


def test_a_last_piece_of_sound_that_is_too_short_stays_with_its_neighbour():
    runs = [(10, 50), (10, 50), (10, 3)]
    cuts = cut_sounding(runs, 10, 40, tokens(10), audio_unit=50, audio_least=13)
    assert [cut.audio for cut in cuts] == [(0, 50), (50, 103)]
    cuts = cut_sounding(runs, 10, 40, tokens(10), audio_unit=50, audio_least=3)
    assert [cut.audio for cut in cuts] == [(0, 50), (50, 100), (100, 103)]


@given(case=sounding, temporal=st.integers(1, 3), data=st.data())
def test_reduced_runs_keep_all_tokens_that_are_left_and_all_sound(case, temporal, data):
    grids, per_grid, step, audio, _ = case
    runs = runs_of("chunks", even_grid(grids, step), per_grid, audio)
    groups = -(-grids // temporal)
    left = data.draw(st.lists(st.integers(0, 9), min_size=groups, max_size=groups))
    reduced = reduced_runs(runs, per_grid, left, temporal)
    assert sum(visual for visual, _ in reduced) == sum(left)
    assert [audio for _, audio in reduced] == [audio for _, audio in runs]


def test_without_reduction_runs_of_whole_grids_stay_as_they_are():
    runs = [(20, 50), (10, 50), (0, 7)]
    assert reduced_runs(runs, 10, [10, 10, 10], 1) == runs


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 60)), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(0, 200),
    st.integers(1, 20),
)
def test_cuts_between_runs_are_all_runs_within_the_target_and_the_same_for_a_longer_video(
    kinds: list[tuple[bool, int]], unit: int, target: int, per_grid: int
) -> None:
    runs = [(unit * per_grid, 0) if seen else (0, audio) for seen, audio in kinds]
    cuts = cut_between(runs, per_grid, target, tokens(per_grid, unit))
    assert [run for cut in cuts for run in cut.runs] == runs
    assert all(a.grids[1] == b.grids[0] and a.audio[1] == b.audio[0] for a, b in pairwise(cuts))
    for cut in cuts:
        size = tokens(per_grid, unit)(cut.grids[1] - cut.grids[0]) + cut.audio[1] - cut.audio[0]
        assert len(cut.runs) == 1 or not target or size <= target
        assert (cut.grids[1] - cut.grids[0]) % unit == 0
    shorter = cut_between(runs[:-1] or runs, per_grid, target, tokens(per_grid, unit))
    assert cuts[: len(shorter) - 1] == shorter[:-1]


@pytest.mark.parametrize(
    ("family", "per_second", "unit_s"), [("chunks", 25, 2.0), ("tokens", 13, 2.0)]
)
@given(data=st.data(), per_grid=st.integers(1, 60), units=st.integers(1, 8))
def test_units_of_a_growing_video_keep_their_segments_whatever_follows(
    family, per_second, unit_s, data, per_grid, units
):
    places = st.lists(st.floats(0, 0.999), min_size=1, max_size=4).map(sorted)
    times = [round((unit + at) * unit_s, 6) for unit in range(units) for at in data.draw(places)]
    last = data.draw(st.integers(0, round(per_second * unit_s)))
    per_unit = round(per_second * unit_s)

    def cuts(until: int, audio: int) -> list[Cut]:
        grids = GridTimes(tuple(at for at in times if at < until * unit_s), None)
        runs = runs_of(family, grids, per_grid, audio)
        ends = unit_ends(grids.seconds, unit_s, audio=audio, audio_per_unit=per_unit)
        made = cut_units(runs, per_grid, ends)
        check(made, runs, per_grid, 1)
        return made

    whole = cuts(units, (units - 1) * per_unit + last)
    assert len(whole) == units
    for until in range(1, units):
        assert cuts(until, until * per_unit) == whole[:until]


def test_sound_after_the_last_grid_belongs_to_the_last_unit():
    assert unit_ends([0.0, 1.0, 4.5], 2.0, audio=500, audio_per_unit=50) == [(2, 50), (3, 500)]
    assert unit_ends([0.0, 1.0, 4.5], 2.0) == [(2, 0), (3, 0)]


@given(units=st.lists(st.integers(1, 9), min_size=1, max_size=5), target=st.integers(1, 90))
def test_a_large_unit_is_cut_further_and_no_segment_goes_beyond_its_end(units, target):
    per_grid, borders = 10, [sum(units[: n + 1]) for n in range(len(units))]
    runs = [(per_grid, 0)] * borders[-1]
    cuts = cut_units(
        runs,
        per_grid,
        [(border, 0) for border in borders],
        lambda own: cut_between(own, per_grid, target, tokens(per_grid)),
    )
    check(cuts, runs, per_grid, 1)
    assert set(borders) <= {cut.grids[1] for cut in cuts}
    assert all((cut.grids[1] - cut.grids[0]) * per_grid <= max(target, per_grid) for cut in cuts)
