"""Which of the frames looked at are taken: the least error, events, full seconds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.media.sampling.coverage import Event, Looked, _Gaps, choose
from vllm_mm_ext.media.sampling.short_events import events, motion_score
from vllm_mm_ext.media.sampling.thumbnail_planes import planes
from vllm_mm_ext.media.sampling.timeline import distinct

Floats = npt.NDArray[np.float64]


def look(pixels: npt.NDArray[np.float32], *marked: Event, fps: float = 8.0) -> Looked:
    return Looked(np.arange(len(pixels)) / fps, np.ones(len(pixels)), pixels, marked)


def take(looked: Looked, count: int, ceiling: int = 1000, ends: float = math.inf) -> list[int]:
    both = (ends, ends)
    return choose(looked, count, widest=1e9, ends=both, ceiling=ceiling, taken={}).tolist()


def error(looked: Looked, chosen: list[int]) -> float:
    total = 0.0
    for frame, time in enumerate(looked.time):
        nearest = min(chosen, key=lambda other: abs(looked.time[other] - time))
        differs = np.abs(looked.pixels[frame] - looked.pixels[nearest]).mean()
        total += float(looked.weight[frame] * differs)
    return total


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 11), count=st.integers(1, 5))
def test_no_other_choice_has_less_error(seed: int, size: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = np.cumsum(rng.normal(0, 20, (size, 6)), axis=0).astype(np.float32)
    looked = look(pixels)
    chosen = take(looked, count)
    assert len(chosen) == min(count, size)
    best = min(error(looked, list(c)) for c in itertools.combinations(range(size), len(chosen)))
    # Of choices that hardly differ, an even one is taken.
    assert error(looked, chosen) <= best + 0.2 * size


def test_frames_of_a_still_picture_are_spread_evenly() -> None:
    chosen = take(look(np.full((80, 4), 7, np.float32)), 8)
    assert set(np.diff(chosen)) <= {9, 10, 11}


def test_every_scene_is_shown_whatever_its_length() -> None:
    scenes = np.repeat([0.0, 90.0, 30.0, 200.0], [60, 5, 3, 50]).astype(np.float32)
    chosen = take(look(scenes[:, None]), 4)
    assert [float(scenes[index]) for index in chosen] == [0, 90, 30, 200]


def test_an_event_is_shown_although_it_is_too_short_to_change_the_error() -> None:
    rng = np.random.default_rng(0)
    pixels = np.cumsum(rng.normal(0, 3, (160, 16)), axis=0).astype(np.float32)
    event = Event(33, 34, 3.0)
    missed, shown = take(look(pixels), 8), take(look(pixels, event), 8)
    assert not set(missed) & {33, 34}
    assert set(shown) & {33, 34}


def test_many_events_do_not_make_a_choice_worse_than_an_even_one() -> None:
    rng = np.random.default_rng(1)
    pixels = np.cumsum(rng.normal(0, 3, (200, 16)), axis=0).astype(np.float32)
    marked = [Event(i, i, 1.5) for i in range(3, 40, 4)]
    even = np.linspace(0, 199, 8).astype(int).tolist()
    looked = look(pixels, *marked)
    assert error(looked, take(looked, 8)) <= error(looked, even)


@pytest.mark.parametrize("count", [8, 16, 32])
def test_strong_events_cost_no_more_than_a_frame_or_than_an_even_choice(count: int) -> None:
    rng = np.random.default_rng(1)
    pixels = np.cumsum(rng.normal(0, 3, (600, 16)), axis=0).astype(np.float32)
    marked = [Event(i, i, float(rng.uniform(20, 40))) for i in range(3, 600, 15)]
    for event in marked:
        pixels[event.first] = 240
    looked = look(pixels, *marked)
    even = np.linspace(0, 599, count).astype(int).tolist()
    worst = max(error(looked, even), error(looked, take(look(pixels), count - 1)))
    # In a clip that hardly moves, the choice is bound to differences that are assumed, too.
    assert error(looked, take(looked, count)) <= 1.01 * worst


@pytest.mark.parametrize("count", [8, 16, 32])
def test_cuts_at_random_are_represented_as_well_as_by_an_even_choice(count: int) -> None:
    rng = np.random.default_rng(2)
    lengths = np.maximum(1, np.round(8 * rng.exponential(3.0, 33))).astype(int)
    scenes = np.repeat(rng.uniform(0, 255, (33, 16)), lengths, axis=0).astype(np.float32)
    ends = np.cumsum(lengths)
    marked = [
        Event(int(end - long), int(end) - 1, 20.0)
        for end, long in zip(ends, lengths, strict=True)
        if long < 7
    ]
    looked = look(scenes, *marked)
    even = np.linspace(0, len(scenes) - 1, count).astype(int).tolist()
    assert len(marked) >= 6
    assert error(looked, take(looked, count)) <= error(looked, even)


def test_events_are_bounded_though_even_moments_share_a_picture() -> None:
    rng = np.random.default_rng(3)
    pixels = np.cumsum(rng.normal(0, 3, (200, 16)), axis=0).astype(np.float32)
    marked = [Event(i, i, 20.0) for i in range(3, 40, 4)]
    time = np.concatenate([np.arange(100) / 8, 100 + np.arange(100) / 8])
    looked = Looked(time, np.ones(200), pixels, marked)
    plain = Looked(time, np.ones(200), pixels)
    # Six of eight even moments lie in the hole between the two halves.
    moments = np.linspace(0, time[-1], 8)
    even = distinct(np.searchsorted((time[1:] + time[:-1]) / 2, moments), 200).tolist()
    assert error(looked, take(looked, 8)) <= max(error(looked, even), error(plain, take(plain, 7)))


def test_a_second_with_all_the_change_gets_no_more_than_the_ceiling() -> None:
    pixels = np.zeros((80, 4), np.float32)
    pixels[40:48] = np.random.default_rng(0).normal(0, 99, (8, 4))
    looked = look(pixels)
    assert sum(40 <= index < 48 for index in take(looked, 10)) > 3
    limited = take(looked, 10, ceiling=3)
    assert 1 <= sum(40 <= index < 48 for index in limited) <= 3
    assert len(limited) == 10


def test_the_ceiling_rises_as_far_as_the_least_number_of_frames_needs() -> None:
    # Two seconds of eight frames, and one that two frames were already taken of.
    looked = look(np.zeros((24, 4), np.float32))

    def most(least: int) -> list[int]:
        ends = (math.inf, math.inf)
        found = choose(looked, 20, widest=1e9, ends=ends, ceiling=3, taken={2: 2}, least=least)
        return np.bincount(found // 8, minlength=3).tolist()

    assert most(0) == [3, 3, 1]
    assert most(9) == [4, 4, 2]
    assert sum(most(99)) == 20


def test_the_first_and_the_last_moment_are_shown() -> None:
    pixels = np.random.default_rng(0).normal(0, 50, (160, 4)).astype(np.float32)
    chosen = take(look(pixels), 4, ends=0.5)
    assert chosen[0] <= 4
    assert chosen[-1] >= 155


def test_noise_alone_makes_few_and_weak_events() -> None:
    score: Floats = np.abs(np.random.default_rng(3).normal(0, 1, 500))
    found = events(score, 32)
    assert len(found) <= 40
    assert all(event.strength < 1.3 for event in found)
    score[200:203] = 20.0
    strongest = events(score, 32)[0]
    assert (strongest.first, strongest.last) == (200, 202)
    assert strongest.strength > 5


def test_pictures_of_a_few_pixels_have_scores() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 6, 6)).astype(np.uint8)
    for height, width in ((2, 2), (2, 6), (4, 4), (4, 2)):
        seen = planes(noise[:, : height * 3 // 2, :width])
        time = np.arange(200) * 0.13
        motion, transient = motion_score(seen, time, time)
        assert np.isfinite(motion).all()
        assert np.isfinite(transient[10:-10]).all()


def test_a_gap_pays_for_the_events_inside_it_alone() -> None:
    rng = np.random.default_rng(1)
    bounds = np.sort(rng.choice(60, 24, replace=False)).reshape(-1, 2)
    events = [Event(int(a), int(b), float(rng.uniform(0.5, 5))) for a, b in bounds]
    looked = Looked(np.arange(60.0), np.ones(60), rng.random((60, 9), np.float32), events)
    gaps = _Gaps(looked, 8, 20.0, (10.0, 10.0), np.arange(60))
    before, inside, after = gaps._missed(1.0, 2.0)
    counted = [event for event in events if event.strength >= 1.0]
    for right in range(60):
        past = sum(2.0 * e.strength for e in counted if e.last < right)
        rest = sum(2.0 * e.strength for e in counted if e.first > right)
        assert (before[right], after[right]) == pytest.approx((past, rest))
        for column, left in enumerate(gaps._left[right].tolist()):
            missed = sum(2.0 * e.strength for e in counted if left < e.first and e.last < right)
            assert inside[right, column] == pytest.approx(missed)


@pytest.mark.parametrize("ceiling", [1, 2])
def test_what_strong_events_may_cost_is_found_once_though_seconds_are_full(
    ceiling: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = []
    best, solve = _Gaps.best, _Gaps._solve

    def begun(gaps: _Gaps, count: int, allowed: npt.NDArray[np.bool_]) -> object:
        rounds.append(0)
        return best(gaps, count, allowed)

    def counted(gaps: _Gaps, *args: object) -> object:
        rounds[-1] += 1
        return solve(gaps, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(_Gaps, "best", begun)
    monkeypatch.setattr(_Gaps, "_solve", counted)
    rng = np.random.default_rng(0)
    pixels = np.cumsum(rng.normal(0, 3, (200, 16)), axis=0).astype(np.float32)
    frames = [8 * second + frame for second in (2, 6, 7, 13) for frame in (0, 2, 4, 6)]
    marked = [Event(frame, frame, float(rng.uniform(5, 40))) for frame in frames]
    pixels[frames] += rng.normal(0, 40, (16, 16))
    take(look(pixels, *marked), 12, ceiling=ceiling)
    assert len(rounds) > 1
    # One frame less and no price, three strengths; the price, only in the first round.
    assert rounds[0] <= 11
    assert max(rounds[1:]) <= 6
