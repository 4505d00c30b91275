"""Sampling policies: budgets, order, gaps and determinism; and what ``adaptive`` sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.errors import MediaError, NoSuchStreamError
from vllm_mm_ext.media.decode.decoders.base import thumbnail_size
from vllm_mm_ext.media.decode.decoders.pyav_decoder import PyAVDecoder
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.sampling import basic, select, thumbnail_scan, timeline, windows
from vllm_mm_ext.media.sampling.adaptive import Thumbnails
from vllm_mm_ext.media.sampling.short_events import motion_score
from vllm_mm_ext.media.sampling.thumbnail_planes import planes
from vllm_mm_ext.media.types import (
    DecodeLimits,
    FrameSelection,
    MediaInfo,
    PacketTable,
    SamplingSpec,
    VideoStream,
)
from vllm_mm_ext.testing.media import Event, make_clip


def media(
    time: npt.NDArray[np.float64],
    size: npt.NDArray[np.int64] | None = None,
    key: npt.NDArray[np.bool_] | None = None,
    order: npt.NDArray[np.int64] | None = None,
) -> MediaInfo:
    count = len(time)
    size = np.full(count, 1000) if size is None else size
    key = np.arange(count) % 30 == 0 if key is None else key
    gap = (time[-1] - time[0]) / (count - 1) if count > 1 else 0.0
    packets = PacketTable(
        pts=np.round(time * 90000).astype(np.int64),
        time=time,
        size=size.astype(np.int32),
        is_key=key,
        time_base=1 / 90000,
        order=np.arange(count) if order is None else order,
    )
    duration = float(time[-1] + gap)
    fps = 1 / gap if gap else 0.0
    stream = VideoStream(
        *(0, "h264", 640, 360, 0, fps, False, count, duration, "yuv420p"),
        num_keyframes=int(key.sum()),
    )
    return MediaInfo("mp4", 1, duration, stream, (), packets)


def even(count: int, fps: float = 30.0, gop: int = 30) -> MediaInfo:
    return media(np.arange(count) / fps, key=np.arange(count) % gop == 0)


def in_gray(luma: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Thumbnails ``[n, h * 3 / 2, w]`` without colour, of uint8 ``[n, h, w]``."""
    return np.pad(luma, [(0, 0), (0, luma.shape[1] // 2), (0, 0)], constant_values=128)


def noise_thumbnails(seed: int = 0) -> object:
    def thumbnails(indices: Sequence[int], _likely: Sequence[int]) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng([seed, *indices[:1]])
        return rng.integers(0, 256, (len(indices), 12, 16), dtype=np.uint8)

    return thumbnails


def chosen(info: MediaInfo, **options: object) -> FrameSelection:
    return select(info, SamplingSpec(**options), noise_thumbnails())  # type: ignore[arg-type]


@st.composite
def clips(draw: st.DrawFn) -> MediaInfo:
    count = draw(st.integers(1, 900))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gaps = {
        "even": np.ones(count),
        "uneven": rng.uniform(0.2, 4.0, count),
        "bursts": rng.choice([0.05, 30.0], count, p=[0.95, 0.05]),
        "still": np.zeros(count),
    }[draw(st.sampled_from(["even", "uneven", "bursts", "still"]))] / 30.0
    time = np.concatenate([[0.0], np.cumsum(gaps[1:])])
    size = {
        "flat": np.full(count, 500),
        "random": rng.integers(1, 100_000, count),
        "spikes": np.where(rng.random(count) < 0.02, 90_000, 400 + rng.integers(0, 50, count)),
        "empty": np.zeros(count, np.int64),
    }[draw(st.sampled_from(["flat", "random", "spikes", "empty"]))]
    key = {
        "gop": np.arange(count) % draw(st.integers(1, 300)) == 0,
        "random": rng.random(count) < 0.05,
        "all": np.ones(count, np.bool_),
        "none": np.zeros(count, np.bool_),
    }[draw(st.sampled_from(["gop", "random", "all", "none"]))]
    order = np.arange(count)
    if draw(st.booleans()) and count > 3:
        # I B P B P ...: each odd frame is decoded after the one that follows it.
        order[1:-1:2], order[2::2] = order[2::2].copy()[: len(order[1:-1:2])], order[1:-1:2].copy()
    return media(time, size, key, order)


specs = st.builds(
    SamplingSpec,
    policy=st.sampled_from(["uniform", "keyframe", "adaptive"]),
    fps=st.sampled_from([0.1, 1.0, 2.0, 30.0]),
    max_frames=st.integers(1, 64),
    min_frames=st.integers(0, 16),
    min_fps=st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    max_fps=st.sampled_from([0.5, 2.0, 8.0, 1000.0]),
    multiple_of=st.sampled_from([1, 2, 4]),
)


@settings(max_examples=80)
@given(info=clips(), spec=specs)
def test_any_policy_keeps_its_budget_order_and_times(info: MediaInfo, spec: SamplingSpec) -> None:
    selection = select(info, spec, noise_thumbnails())  # type: ignore[arg-type]
    again = select(info, spec, noise_thumbnails())  # type: ignore[arg-type]
    assert info.packets is not None
    count = len(selection.indices)
    assert 1 <= count <= min(spec.max_frames, len(info.packets))
    assert (np.diff(selection.indices) > 0).all()
    assert selection.indices[0] >= 0
    assert selection.indices[-1] < len(info.packets)
    assert (selection.times == info.packets.time[selection.indices]).all()
    assert (selection.indices == again.indices).all()
    if count >= spec.multiple_of:
        assert count % spec.multiple_of == 0
    # What a planner without the packets counts on.
    planned = timeline.target_count(replace(info, packets=None), spec)
    assert count == planned if spec.policy == "keyframe" else count <= planned
    least = min(spec.min_frames, spec.max_frames, len(info.packets))
    assert count >= least - least % spec.multiple_of
    assert (selection.profile is not None) == (spec.policy == "adaptive")


@settings(max_examples=30)
@given(info=clips(), count=st.integers(2, 64))
def test_adaptive_leaves_no_gap_wider_than_eight_uniform_spacings(
    info: MediaInfo, count: int
) -> None:
    assert info.packets is not None
    if len(info.packets) <= count:
        return
    selection = chosen(
        info, policy="adaptive", fps=1000.0, max_frames=count, min_frames=count, max_fps=1000.0
    )
    assert len(selection.indices) == count
    time = info.packets.time
    spacing = (time[-1] - time[0]) / (count - 1)
    # Where no frame is to be had for longer, the bound cannot hold.
    widest = float(np.diff(time).max())
    assert np.diff(selection.times).max(initial=0.0) <= 8 * spacing + 2 * widest + 1e-6


@settings(max_examples=30)
@given(
    info=clips(),
    fps=st.sampled_from([0.5, 4.0]),
    min_fps=st.sampled_from([0.1, 0.5, 1.0, 3.0]),
    ceiling=st.integers(1, 9),
)
def test_adaptive_keeps_the_floor_and_the_ceiling(
    info: MediaInfo, fps: float, min_fps: float, ceiling: int
) -> None:
    assert info.packets is not None
    selection = chosen(
        info,
        policy="adaptive",
        fps=fps,
        max_frames=200,
        min_frames=0,
        min_fps=min_fps,
        max_fps=float(ceiling),
    )
    time, most = info.packets.time, max(ceiling, int(np.ceil(min_fps)), int(np.ceil(fps)))
    assert np.bincount(timeline.second_of(selection.times)).max() <= most
    # Where no frame is to be had for longer, or a second is full, the bound cannot hold.
    hole = np.diff(time).max(initial=0.0)
    spacing = float(time[-1] - time[0]) / len(selection.indices)
    covered = np.diff(selection.times).max(initial=0.0)
    assert covered <= max(1 / min_fps, 2 * spacing) + 2 * hole + 1 + 1e-6


@pytest.mark.parametrize(
    ("seconds", "fps", "least", "most", "frames"),
    [(4, 1.0, 64, 64, 64), (10, 10.0, 4, 200, 100), (10, 10.0, 4, 50, 50), (2, 30.0, 4, 60, 60)],
)
def test_adaptive_takes_as_many_frames_as_asked_for_though_they_are_more_than_max_fps(
    seconds: int, fps: float, least: int, most: int, frames: int
) -> None:
    clip = even(30 * seconds)
    selection = chosen(clip, policy="adaptive", fps=fps, min_frames=least, max_frames=most)
    assert len(selection.indices) == frames


def test_a_high_rate_does_not_raise_the_ceiling_of_what_the_budget_leaves() -> None:
    size = np.where(np.arange(1800) // 30 == 20, 90_000, 400)
    clip = media(np.arange(1800) / 30.0, size)
    selection = chosen(clip, policy="adaptive", fps=30.0, max_frames=64, max_fps=3.0)
    assert len(selection.indices) == 64
    assert np.bincount(timeline.second_of(selection.times)).max() <= 3


@settings(max_examples=30)
@given(info=clips(), count=st.integers(3, 32))
def test_the_look_at_the_pixels_is_bounded_and_happens_once(info: MediaInfo, count: int) -> None:
    packets = info.packets
    assert packets is not None
    calls: list[tuple[list[int], list[int]]] = []

    def thumbnails(indices: Sequence[int], likely: Sequence[int]) -> npt.NDArray[np.uint8]:
        calls.append((list(indices), list(likely)))
        return np.zeros((len(indices), 12, 16), np.uint8)

    # The budget binds, so that there is one window.
    spec = SamplingSpec(policy="adaptive", fps=1000.0, max_frames=count, min_frames=count)
    selection = select(info, spec, thumbnails)
    assert len(calls) <= 1
    for indices, likely in calls:
        assert (np.diff(indices) > 0).all()
        assert len(indices) <= thumbnail_scan.MAX_THUMBNAILS
        assert np.isin(likely, indices).all()
        # So the pictures that were kept of the look are those that are wanted: there is no event.
        assert np.isin(selection.indices, likely).all()


@settings(max_examples=30)
@given(info=clips(), count=st.integers(3, 64))
def test_the_first_and_the_last_second_have_a_chosen_frame(info: MediaInfo, count: int) -> None:
    assert info.packets is not None
    selection = chosen(
        info, policy="adaptive", fps=1000.0, max_frames=count, min_frames=count, max_fps=1000.0
    )
    time = info.packets.time
    assert selection.times[0] - time[0] <= 1.0 + 1e-6
    assert time[-1] - selection.times[-1] <= 1.0 + 1e-6


@pytest.mark.parametrize("hours", [0.05, 2.0])
@pytest.mark.parametrize("frames", [4, 8, 32])
def test_the_first_and_the_last_second_of_a_long_clip_have_a_frame(
    hours: float, frames: int
) -> None:
    count = int(hours * 3600 * 24)
    selection = chosen(even(count, 24.0, gop=250), policy="adaptive", max_frames=frames)
    assert len(selection.times) == frames
    assert selection.times[0] <= 1
    assert selection.times[-1] >= count / 24 - 1 - 1 / 24


@pytest.mark.parametrize("multiple_of", [1, 2])
@pytest.mark.parametrize("fps", [0.1, 0.25, 0.3, 1.0])
def test_the_look_is_bounded_and_happens_where_windows_have_few_frames(
    fps: float, multiple_of: int
) -> None:
    looks: list[int] = []

    def thumbnails(indices: Sequence[int], _likely: Sequence[int]) -> npt.NDArray[np.uint8]:
        looks.append(len(indices))
        return np.random.default_rng(0).integers(0, 256, (len(indices), 12, 16), np.uint8)

    spec = SamplingSpec("adaptive", fps=fps, max_frames=768, multiple_of=multiple_of)
    for seconds in (120, 600):
        looks.clear()
        times = select(even(24 * seconds, 24.0), spec, thumbnails).times
        assert len(times) == timeline.target_count(even(24 * seconds, 24.0), spec)
        assert len(looks) == 1
        most = thumbnail_scan.MAX_THUMBNAILS + 6 * fps * seconds
        assert len(times) < looks[0] <= most
        assert times[0] <= 1
        assert times[-1] >= seconds - 1 - 1 / 24


def with_pauses(*parts: tuple[float, float]) -> MediaInfo:
    """A clip of 30 fps that shows new frames between pairs of moments alone; one GOP."""
    numbers = [np.arange(round(30 * first), round(30 * last)) for first, last in parts]
    time = np.concatenate(numbers) / 30.0
    return media(time, key=np.arange(len(time)) == 0)


@pytest.mark.parametrize(
    ("fps", "multiple_of", "seconds", "resumes"),
    [(1.0, 1, 135.04, 152), (1.0, 1, 135.1, 152), (2.0, 1, 79.04, 96), (2.0, 2, 79.04, 96)],
)
def test_a_window_that_has_only_what_the_one_before_left_to_it_can_choose(
    fps: float, multiple_of: int, seconds: float, resumes: int
) -> None:
    clip = with_pauses((0, seconds), (resumes, resumes + 8))
    selection = chosen(clip, policy="adaptive", fps=fps, max_frames=768, multiple_of=multiple_of)
    assert selection.times[-1] >= resumes + 7 - 1 / 30
    # At least what is due in the seconds that have frames, but for a window that is cut short.
    assert len(selection.times) >= fps * (int(seconds) - 8)


@pytest.mark.parametrize("within", [(), ((12.0, 12.05),)])
def test_the_second_before_a_pause_gets_no_frames_for_the_pause(
    within: tuple[tuple[float, float], ...],
) -> None:
    clip = with_pauses((0, 8), *within, (60, 80))
    times = chosen(clip, policy="adaptive", max_frames=768).times
    seconds = np.bincount(timeline.second_of(times), minlength=80)
    assert seconds[7] <= 2
    assert seconds[60:].sum() >= 18


@settings(max_examples=30)
@given(
    pauses=st.lists(st.tuples(st.floats(0.1, 20), st.floats(0, 30)), min_size=1, max_size=8),
    fps=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    min_frames=st.sampled_from([0, 4, 100, 300]),
    multiple_of=st.sampled_from([1, 2, 4]),
)
def test_windows_of_long_clips_with_pauses_choose_as_many_frames_as_they_have(
    pauses: list[tuple[float, float]], fps: float, min_frames: int, multiple_of: int
) -> None:
    parts = [(0.0, 130 / fps)]
    for seconds, pause in pauses:
        resumes = parts[-1][1] + pause
        parts.append((resumes, resumes + seconds))
    clip = with_pauses(*parts)
    assert clip.packets is not None
    likely = np.zeros(0, np.int64)

    def thumbnails(indices: Sequence[int], some: Sequence[int]) -> npt.NDArray[np.uint8]:
        nonlocal likely
        likely = np.array(some)
        return np.zeros((len(indices), 12, 16), np.uint8)

    spec = SamplingSpec(
        *("adaptive", fps),
        max_frames=2000,
        min_frames=min_frames,
        max_fps=30.0,
        multiple_of=multiple_of,
    )
    indices = select(clip, spec, thumbnails).indices
    assert len(indices) >= min(min_frames, len(clip.packets)) - multiple_of + 1
    for window in windows.windows_of(clip, spec):
        assert np.count_nonzero((likely >= window.low) & (likely < window.high)) >= window.count


def changing(first: float, last: float, fps: float = 25.0) -> Thumbnails:
    """Thumbnails of a clip that changes four times a second between two moments, else never."""

    def thumbnails(indices: Sequence[int], _likely: Sequence[int]) -> npt.NDArray[np.uint8]:
        scenes = [int(4 * i / fps) if first < i / fps < last else 0 for i in indices]
        luma = [np.random.default_rng(scene).integers(0, 256, (36, 64)) for scene in scenes]
        return in_gray(np.array(luma, np.uint8))

    return thumbnails


@pytest.mark.parametrize(
    ("frames", "min_fps"), [(16, 0.2), (32, 0.5), (40, 0.5), (40, 0.6), (60, 0.9), (60, 0.1)]
)
def test_adaptive_leaves_no_gap_wider_than_the_floor_and_two_mean_gaps(
    frames: int, min_fps: float
) -> None:
    spec = SamplingSpec("adaptive", fps=2.0, max_frames=frames, min_fps=min_fps)
    times = select(even(1500, 25.0), spec, changing(0, 20)).times
    assert len(times) == frames
    assert np.diff(times).max() <= max(1 / min_fps, 2 * 60 / frames) + 1e-6


@pytest.mark.parametrize(
    ("seconds", "fps", "first", "last"),
    [(20, 2.0, 2, 17.5), (20, 1.0, 3, 16), (30, 1.0, 3, 26), (59, 1.0, 4, 55), (12, 0.5, 3, 9)],
)
def test_the_first_and_the_last_second_have_a_frame_though_all_change_is_between(
    seconds: int, fps: float, first: float, last: float
) -> None:
    spec = SamplingSpec("adaptive", fps=fps, max_frames=64, multiple_of=2)
    times = select(even(25 * seconds, 25.0), spec, changing(first, last)).times
    assert times[0] <= 1
    assert times[-1] >= seconds - 1 - 1 / 25


def test_a_long_clip_is_looked_at_at_keyframes_and_where_packets_are_large() -> None:
    count = 20 * 60 * 30
    size = np.full(count, 1000)
    size[17_000:17_009] = 30_000
    info = media(np.arange(count) / 30, size=size, key=np.arange(count) % 60 == 0)
    calls: list[list[int]] = []

    def thumbnails(indices: Sequence[int], _likely: Sequence[int]) -> npt.NDArray[np.uint8]:
        calls.append(list(indices))
        return np.zeros((len(indices), 12, 16), np.uint8)

    select(info, SamplingSpec(policy="adaptive", max_frames=32), thumbnails)
    (looked,) = calls
    assert len(looked) <= thumbnail_scan.MAX_THUMBNAILS
    assert sum(index % 60 == 0 for index in looked) >= 4 * 32
    assert sum(17_000 <= index < 17_009 for index in looked) >= 2


def test_later_windows_of_a_long_clip_show_what_large_packets_hold() -> None:
    time = np.arange(300 * 24) / 24.0
    starts = np.linspace(150, 284, 8)
    shown = ((time[:, None] >= starts) & (time[:, None] < starts + 0.25)).any(axis=1)
    size = np.random.default_rng(0).integers(900, 1100, len(time)) * np.where(shown, 8, 1)
    still = np.random.default_rng(1).integers(60, 160, (36, 64)).astype(np.uint8)

    def thumbnails(indices: Sequence[int], _likely: Sequence[int]) -> npt.NDArray[np.uint8]:
        small = np.stack([still] * len(indices))
        small[shown[np.array(indices)], 10:20, 10:24] = 250
        return in_gray(small)

    spec = SamplingSpec("adaptive", fps=0.5, max_frames=768, multiple_of=2)
    times = select(media(time, size, np.arange(len(time)) % 250 == 0), spec, thumbnails).times
    assert all(((times >= start) & (times < start + 0.25)).any() for start in starts)


def test_uniform_equals_the_choice_of_stock_loaders_where_a_budget_binds() -> None:
    for count in (1, 2, 31, 32, 33, 119, 1801):
        wanted = min(32, count, max(4, count // 30))
        expected = np.linspace(0, count - 1, wanted, dtype=int)
        selection = chosen(even(count))
        assert (selection.indices == expected).all()
        assert selection.step is None


def test_uniform_takes_the_frame_on_screen_at_each_moment_of_a_fixed_grid() -> None:
    selection = chosen(even(610, fps=30.5), fps=1.5, multiple_of=2)
    moments = np.arange(30) / 1.5
    assert (selection.times <= moments + 1e-6).all()
    assert (selection.times > moments - 1 / 30.5).all()
    assert selection.step == pytest.approx(1 / 1.5)


def test_a_source_slower_than_asked_gives_all_its_frames_at_its_own_step() -> None:
    selection = chosen(even(50, fps=5.0), fps=25.0, max_frames=1000)
    assert selection.indices.tolist() == list(range(50))
    assert selection.step == pytest.approx(1 / 5)


def test_a_still_picture_in_an_uneven_clip_is_taken_once() -> None:
    time = np.concatenate([np.arange(60) / 10, [12.0], 18.0 + np.arange(60) / 10])
    selection = chosen(media(time))
    assert (np.diff(selection.indices) > 0).all()
    assert selection.times.tolist() == [0, 1, 2, 3, 4, 5, 5.9, 12, *range(18, 24)]
    assert selection.step is None


def test_uniform_follows_time_not_index_on_uneven_clips() -> None:
    time = np.concatenate([np.arange(100) * 0.01, 1.0 + np.arange(9) * 1.0])
    times = chosen(media(time), max_frames=9, min_frames=9).times
    assert (np.abs(times - np.linspace(0, 9, 9)) <= 1.0).all()
    assert (times <= np.linspace(0, 9, 9) + 1e-9).all()


@pytest.mark.parametrize(
    ("max_frames", "min_frames", "multiple_of", "expected"),
    [(32, 4, 1, 10), (7, 4, 1, 7), (32, 12, 1, 12), (7, 4, 2, 6), (1, 4, 2, 1), (32, 4, 4, 8)],
)
def test_count_is_clamped_then_rounded(
    max_frames: int, min_frames: int, multiple_of: int, expected: int
) -> None:
    spec = SamplingSpec(max_frames=max_frames, min_frames=min_frames, multiple_of=multiple_of)
    assert timeline.target_count(even(300), spec) == expected


def test_keyframe_takes_keyframes_only_while_there_are_enough() -> None:
    few = chosen(even(300, gop=50), policy="keyframe", min_frames=4)
    assert few.indices.tolist() == [0, 50, 100, 150, 200, 250]
    thinned = chosen(even(3000, gop=10), policy="keyframe", max_frames=7)
    assert len(thinned.indices) == 7
    assert (thinned.indices % 10 == 0).all()
    filled = chosen(even(300, gop=300), policy="keyframe", min_frames=4)
    assert len(filled.indices) == 4
    assert filled.indices[0] == 0


@settings(max_examples=40)
@given(info=clips(), count=st.integers(1, 64))
def test_keyframes_are_filled_up_in_the_middle_of_the_widest_gap_each_time(
    info: MediaInfo, count: int
) -> None:
    assert info.packets is not None
    time, keys = info.packets.time, np.flatnonzero(info.packets.is_key)
    count = min(count, len(time))
    if len(keys) > count:
        return
    wanted = keys.tolist() or [0]
    while len(wanted) < count:
        gaps = [
            (time[min(b, len(time) - 1)] - time[max(a, 0)], b - a, -a)
            for a, b in itertools.pairwise([-1, *wanted, len(time)])
            if b - a > 1
        ]
        _, width, low = max(gaps)
        start, end = time[max(-low, 0)], time[min(width - low, len(time) - 1)]
        middle = int(np.searchsorted(time, (start + end) / 2, side="right")) - 1
        wanted = sorted([*wanted, min(max(middle, 1 - low), width - low - 1)])
    selection = chosen(info, policy="keyframe", max_frames=count, min_frames=count)
    assert selection.indices.tolist() == wanted


class Counted(np.ndarray):  # type: ignore[type-arg]
    """An array that counts how often an item of it is read."""

    reads = 0

    def __getitem__(self, key: object) -> object:
        Counted.reads += 1
        return super().__getitem__(key)  # type: ignore[index]


def test_work_to_fill_keyframes_up_grows_with_their_number_not_with_its_square() -> None:
    time = (np.arange(20_000) / 30.0).view(Counted)
    keys = np.arange(0, 20_000, 200)
    assert len(basic._fill_up(time, keys, 1000)) == 1000
    assert Counted.reads <= 10 * 1000


def test_explicit_indices_are_checked() -> None:
    info = even(100)
    assert chosen(info, policy="explicit", indices=(3, 3, 99)).indices.tolist() == [3, 3, 99]
    for bad in ((), (5, 4), (-1,), (100,), tuple(range(33))):
        with pytest.raises(MediaError):
            chosen(info, policy="explicit", indices=bad)


def test_impossible_specs_and_files_without_video_are_client_errors() -> None:
    with pytest.raises(MediaError, match="max_frames"):
        chosen(even(10), max_frames=0)
    with pytest.raises(NoSuchStreamError):
        chosen(MediaInfo("wav", 1, 1.0, None, ()))


def test_hours_of_video_are_chosen_from_like_seconds() -> None:
    selection = chosen(even(2 * 3600 * 30, gop=250), policy="adaptive", max_frames=256)
    assert len(selection.indices) == 256


def test_b_frames_are_looked_at_only_where_no_other_frame_is_near() -> None:
    count = 30 * 60 + 1
    number = np.arange(count)
    # Two B frames before each P frame in presentation order, after it in decoding order.
    order = np.where(number % 3 == 0, number - 2, number + 1)
    order[0] = 0
    for fps, near in ((30.0, True), (10.0, False)):
        info = media(number / fps, key=number == 0, order=order)
        assert info.packets is not None
        looked = thumbnail_scan.plan(info.packets, np.zeros(count), 32)
        assert (looked % 3 == 0).all() == near
        # An event of 0.2 s is seen.
        assert np.diff(info.packets.time[looked]).max() <= 0.2 + 1e-6 or not near


def test_motion_score_is_the_mean_difference_and_blind_to_fades() -> None:
    rng = np.random.default_rng(0)
    still = rng.integers(60, 160, (18, 32)).astype(np.uint8)
    time = np.arange(100) * 0.15
    fading = np.stack([(still * (0.6 + 0.004 * k)).astype(np.uint8) for k in range(100)])
    fading[50, 4:8, 4:8] = 255
    motion, transient = motion_score(planes(in_gray(fading)), time, time)
    assert transient[np.isfinite(transient)].argmax() == 50 - np.isfinite(transient).argmax()
    others = np.delete(motion, [0, 50, 51])
    assert others.max() < 0.01 < motion[50] < 1.0


def look(path: Path, **options: object) -> tuple[FrameSelection, MediaInfo]:
    info = probe(str(path), DecodeLimits())
    decoder = PyAVDecoder(10**7)

    def thumbnails(indices: Sequence[int], _likely: Sequence[int]) -> npt.NDArray[np.uint8]:
        rows = np.array(indices, np.int64)
        small = decoder.thumbnails(str(path), info, rows, 64, 1, _likely)
        height, width = thumbnail_size(info, 64)
        assert small.shape == (len(indices), height * 3 // 2, width)
        return small

    return select(info, SamplingSpec(**options), thumbnails), info  # type: ignore[arg-type]


@pytest.mark.parametrize("scene", ["static", "talking_head", "fade", "noise"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_adaptive_shows_a_sub_second_event_that_uniform_misses(
    tmp_path: Path, scene: str, codec: str
) -> None:
    events = [Event("flash", 7.1, 7.35), Event("insert", 17.35, 17.7)]
    truth = make_clip(
        tmp_path / "clip.mp4",
        width=160,
        height=90,
        fps=25,
        duration=30.0,
        gop=250,
        scene=scene,  # type: ignore[arg-type]
        codec=codec,
        events=events,
        bframes=2,
    )
    options = {"max_frames": 12, "min_frames": 12}
    assert truth.caught(look(truth.path, policy="uniform", **options)[0].times) == 0
    assert truth.caught(look(truth.path, policy="adaptive", **options)[0].times) == 2


def test_intra_only_clips_are_looked_at_instead(tmp_path: Path) -> None:
    truth = make_clip(
        tmp_path / "clip.avi",
        width=160,
        height=90,
        duration=20.0,
        codec="mjpeg",
        scene="talking_head",
        events=[Event("object", 7.1, 7.4)],
    )
    selection, _ = look(truth.path, policy="adaptive", max_frames=8)
    assert truth.caught(selection.times) == 1
    assert selection.profile is not None
    assert np.isfinite(selection.profile.confirmed).mean() > 0.5
