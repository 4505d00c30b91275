"""Short events that thumbnails show, beside pictures that stand still or move all the time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.unit.media.test_sampling import even, in_gray, look, media
from vllm_mm_ext.media.sampling import Thumbnails, select
from vllm_mm_ext.media.sampling.short_events import motion_score
from vllm_mm_ext.media.sampling.thumbnail_planes import planes
from vllm_mm_ext.media.types import SamplingSpec
from vllm_mm_ext.synthetic.scenes import EVENT_KINDS, Event, SceneName
from vllm_mm_ext.testing.media import make_clip


@pytest.mark.parametrize("start", [27.1, 51.63, 67.0])
def test_a_flash_in_a_still_picture_is_shown(start: float) -> None:
    info = even(2790, gop=500)
    assert info.packets is not None
    time = info.packets.time

    def thumbnails(indices: Sequence[int], _likely: Sequence[int]) -> npt.NDArray[np.uint8]:
        small = np.full((len(indices), 36, 64), 100, np.uint8)
        here = time[np.asarray(indices)]
        small[(here >= start) & (here < start + 0.21)] = 180
        return in_gray(small)

    chosen = select(info, SamplingSpec("adaptive", max_frames=32), thumbnails).times
    assert ((chosen >= start) & (chosen < start + 0.21)).any()


def marked(count: int, fps: float, start: float) -> Thumbnails:
    """Thumbnails in which a box moves all the time, and another one is shown for 0.3 s."""
    still = np.random.default_rng(6).integers(40, 200, (9, 16)).repeat(4, 0).repeat(4, 1)
    small = still + np.random.default_rng(7).normal(0, 1.5, (count, 36, 64))
    for picture, moment in zip(small, np.arange(count) / fps, strict=True):
        across = int(6 * moment) % 56
        picture[20:26, across : across + 6] = 230
        if start <= moment < start + 0.3:
            picture[6:16, 40:52] = 250
    luma = np.clip(np.rint(small), 0, 255).astype(np.uint8)
    return lambda indices, _likely: in_gray(luma[np.asarray(indices)])


@pytest.mark.parametrize("fps", [0.5, 1.0])
@pytest.mark.parametrize(
    "start", [0.3, 0.6, 6.5, 6.9, 7.1, 7.5, 7.8, 14.7, 15.2, 15.6, 23.1, 30.7, 31.3]
)
def test_an_event_at_the_end_of_a_window_or_of_the_clip_is_shown(start: float, fps: float) -> None:
    spec = SamplingSpec("adaptive", fps=fps, max_frames=32, multiple_of=2)
    times = select(even(768, 24.0), spec, marked(768, 24.0, start)).times
    assert len(times) == 32 * fps
    assert ((times >= start) & (times < start + 0.3)).any()


@pytest.mark.parametrize("seconds", [3, 5])
def test_most_events_of_a_clip_of_a_few_seconds_are_shown(seconds: int) -> None:
    count = 24 * seconds
    starts = np.arange(0.4, seconds - 0.7, 0.2)
    spec = SamplingSpec("adaptive", fps=1.0, max_frames=4, min_frames=4)
    shown = 0
    for start in starts:
        times = select(even(count, 24.0), spec, marked(count, 24.0, start)).times
        shown += bool(((times >= start) & (times < start + 0.3)).any())
    assert shown >= 0.75 * len(starts)


@pytest.mark.parametrize(("frames", "slides"), [(8, 6), (16, 11), (32, 11)])
@pytest.mark.parametrize("start", [3.0, 29.0, 61.0, 82.0, 98.0])
def test_pictures_count_by_the_seconds_that_they_are_on_screen(
    start: float, frames: int, slides: int
) -> None:
    """A recording of a screen: slides of one packet each, a moving picture, and a pop-up."""
    shown = {8.0 * k: k for k in range(8)} | {8.0 * k + 4: k for k in range(9, 14)}
    shown |= {64 + k / 30: 100 + k for k in range(300)}
    shown |= {start: -1, start + 0.4: -2}
    time, what = (np.array(values) for values in zip(*sorted(shown.items()), strict=True))
    rng = np.random.default_rng(1)
    still = {k: rng.integers(20, 220, (9, 16)).repeat(4, 0).repeat(4, 1) for k in range(14)}
    small = np.zeros((len(time), 36, 64), np.uint8)
    for number, kind in enumerate(what.tolist()):
        if kind >= 100:
            small[number] = np.roll(still[8], (kind - 100) // 4, 1)
        elif kind >= 0:
            small[number] = still[kind]
        else:
            small[number] = small[number + kind]
    small[what == -1, 8:24, 16:44] = 250
    info = media(time, key=np.arange(len(time)) == 0)
    spec = SamplingSpec("adaptive", max_frames=frames, multiple_of=2)
    chosen = what[
        select(info, spec, lambda rows, _likely: in_gray(small[np.asarray(rows)])).indices
    ]
    # With as few frames as there are slides, an event may cost too much.
    assert -1 in chosen or frames < 13
    assert ((chosen >= 0) & (chosen < 14)).sum() >= slides


def test_a_faint_box_counts_for_more_than_what_moves_all_the_time() -> None:
    rng = np.random.default_rng(3)
    time = np.linspace(0.0, 38.9, 300)
    small = np.full((300, 36, 64), 100, np.uint8)
    small[:, 5:20, 5:20] += rng.integers(0, 60, (300, 15, 15), np.uint8)
    event = (time >= 20) & (time < 20.6)
    small[event, 25:30, 45:55] += 12
    _, transient = motion_score(planes(in_gray(small)), time, time)
    inside, around = transient[event], np.nan_to_num(transient[~event])
    assert inside.min() > around.max()


def test_the_last_thumbnails_count_like_the_others() -> None:
    time = np.linspace(0.0, 37.6, 290)
    small = np.random.default_rng(4).integers(98, 103, (290, 36, 64)).astype(np.uint8)
    for first in (100, 276):
        small[first : first + 4, 10:16, 10:20] += 60
    _, transient = motion_score(planes(in_gray(small)), time, time)
    assert transient[276:280].min() > transient[100:104].min() / 2


def test_what_appears_counts_for_more_than_what_moves_past() -> None:
    time = np.linspace(0.0, 38.9, 300)
    rows, columns = np.mgrid[:36, :64]

    def disc(across: float, down: float, radius: float) -> npt.NDArray[np.bool_]:
        return (columns - across) ** 2 + (rows - down) ** 2 <= radius**2  # type: ignore[no-any-return]

    small = np.full((300, 36, 64), 100, np.uint8)
    event = (time >= 20) & (time < 20.5)
    for picture, at, here in zip(small, time, event, strict=True):
        picture[disc(32 + 26 * np.cos(0.7 * at), 18 + 13 * np.sin(1.1 * at), 4)] = 200
        if here:
            picture[disc(12, 9, 2)] = 180
    _, transient = motion_score(planes(in_gray(small)), time, time)
    assert transient[event].max() > 2 * np.nanmax(transient[~event])


def test_what_appears_in_another_colour_counts_like_what_appears_in_another_shade() -> None:
    time = np.linspace(0.0, 38.9, 300)
    event = (time >= 20) & (time < 20.5)
    noise = np.random.default_rng(5).integers(98, 103, (300, 54, 64)).astype(np.uint8)
    peaks = []
    for plane in range(3):
        small = noise.copy()
        luma, chroma = small[:, :36], small[:, 36:].reshape(300, 2, 18, 32)
        if plane:
            chroma[event, plane - 1, 5:8, 5:10] += 60
        else:
            luma[event, 10:16, 10:20] += 60
        _, transient = motion_score(planes(small), time, time)
        peaks.append(transient[event].min())
        assert np.nanmax(transient[~event]) < peaks[-1] / 4
    assert min(peaks) > 0.9 * max(peaks)


def test_scenes_of_different_colours_and_the_same_brightness_each_have_a_frame() -> None:
    info = even(1800)
    assert info.packets is not None
    time = info.packets.time
    begins = np.array([0, 2, 4, 6, 8, 10, 12, 14, 16, 38])

    def thumbnails(indices: Sequence[int], _likely: Sequence[int]) -> npt.NDArray[np.uint8]:
        scene = np.searchsorted(begins, time[np.asarray(indices)], side="right")
        small = in_gray(np.full((len(indices), 36, 64), 100, np.uint8))
        small[:, 36:45] = (80 + 40 * (scene % 3))[:, None, None]
        return small

    chosen = select(info, SamplingSpec("adaptive", max_frames=16), thumbnails).times
    shown = np.searchsorted(begins, chosen, side="right")
    assert set(shown.tolist()) == set(range(1, len(begins) + 1))


@pytest.mark.parametrize("scene", ["noise", "cuts"])
def test_an_event_as_bright_as_what_it_hides_is_shown(tmp_path: Path, scene: SceneName) -> None:
    events = [
        Event(kind, start, start + 0.3, colour_only=True)
        for kind, start in zip(EVENT_KINDS, (4.1, 10.2, 17.4, 24.3), strict=True)
    ]
    truth = make_clip(
        tmp_path / "clip.mp4",
        width=320,
        height=180,
        fps=25,
        duration=30.0,
        gop=250,
        scene=scene,
        events=events,
        bframes=2,
    )
    options = {"max_frames": 16, "min_frames": 16}
    assert truth.caught(look(truth.path, policy="uniform", **options)[0].times) < 2
    assert truth.caught(look(truth.path, policy="adaptive", **options)[0].times) == 4
