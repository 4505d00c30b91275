"""Short events that thumbnails show, beside pictures that stand still or move all the time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.unit.media.test_sampling import even, in_gray, look
from vllm_mm_ext.media.sampling import select
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
