"""Which cells stay where a static reduction meets a video of several segments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.video.segments import Segment, VideoLayout, segment_digest, segments_of

Frames = npt.NDArray[np.uint8]
PATCH = 2


def noise(seed: int, *shape: int) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def split(
    frames: Frames,
    grid: tuple[int, int],
    reduction: Reduction,
    target: int,
    ends: Sequence[int] | None = None,
) -> list[Segment]:
    layout = VideoLayout(
        frames.shape[1:3],
        -(-len(frames) // PATCH),
        *grid,
        PATCH,
        ends=None if ends is None else tuple((end, 0) for end in ends),
    )
    return segments_of(layout, reduction, target, lambda part: frames[part])


def digests(parts: Sequence[Segment], frames: Frames) -> list[str]:
    own = [blake3(frame.tobytes()).digest() for frame in frames]
    return [segment_digest(part, frames.shape[1:3], own[part.frames], None) for part in parts]


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.4, 0.25])
def test_of_720p_frames_that_change_the_second_pair_keeps_cells(keep: float) -> None:
    """A grid has 720 tokens, most of what a segment may have."""
    frames = np.zeros((8, 560, 1008, 3), np.uint8)
    frames[2:4] = noise(0, 2, 560, 1008, 3)
    frames[4:] = frames[2:3]
    parts = split(frames, (20, 36), Reduction(static="prune", keep=keep), 1024)
    left = [tokens for part in parts for tokens in part.left]
    assert left[1] >= 360


def test_a_segment_spends_nothing_on_a_first_grid_that_goes_on_as_before() -> None:
    frames = np.concatenate([np.repeat(noise(1, 1, 56, 56, 3), 6, axis=0), noise(2, 2, 56, 56, 3)])
    parts = split(frames, (4, 4), Reduction(static="merge", keep=0.5), 16)
    assert [part.left for part in parts] == [(16, 0), (0, 16)]


def test_what_changes_in_segments_of_one_grid_is_what_stays() -> None:
    frames = np.repeat(noise(3, 1, 56, 56, 3), 8, axis=0)
    frames[4:, :14] = 255 - frames[4:, :14]
    parts = split(frames, (4, 4), Reduction(static="prune", keep=0.75), 12)
    assert [part.left for part in parts] == [(12,)] * 4
    assert parts[2].kept is not None
    assert parts[2].kept.tolist()[:4] == [0, 1, 2, 3]


def test_each_place_of_a_still_video_is_shown_by_the_second_segment() -> None:
    frames = np.repeat(noise(4, 1, 56, 56, 3), 8, axis=0)
    parts = split(frames, (4, 4), Reduction(static="prune", keep=0.75), 12)
    kept = [part.kept for part in parts[:2] if part.kept is not None]
    assert set(np.concatenate(kept).tolist()) == set(range(16))


@pytest.mark.parametrize("temporal", [1, 2, 3])
def test_each_frame_is_asked_for_once(temporal: int) -> None:
    frames, asked = noise(7, 24, 56, 56, 3), []

    def pixels(part: slice) -> Frames:
        asked.extend(range(*part.indices(len(frames))))
        return frames[part]

    layout = VideoLayout((56, 56), 12, 4, 4, PATCH)
    reduction = Reduction(static="prune", keep=0.5, temporal=temporal)
    assert len(segments_of(layout, reduction, 16, pixels)) > 1
    assert asked == list(range(24))


reductions = st.builds(
    Reduction,
    pool=st.integers(1, 2),
    temporal=st.integers(1, 3),
    static=st.sampled_from(["merge", "prune"]),
    keep=st.sampled_from([0.1, 0.3, 0.5, 0.75, 0.95]),
)


@given(reduction=reductions, frames=st.integers(1, 12), more=st.integers(1, 6))
@settings(max_examples=40)
def test_segments_stay_what_they_are_when_a_video_goes_on(
    reduction: Reduction, frames: int, more: int
) -> None:
    video = noise(5, 2 * frames + 2 * more, 28, 28, 3)
    short = split(video[: 2 * frames], (4, 3), reduction, 20)
    long = split(video, (4, 3), reduction, 20)
    names = digests(long, video)
    for at, part in enumerate(short[:-1]):
        assert part.key() == long[at].key()
        assert digests(short, video[: 2 * frames])[at] == names[at]


@given(reduction=reductions, units=st.lists(st.integers(1, 4), min_size=2, max_size=5))
@settings(max_examples=40)
def test_growing_videos_keep_as_many_cells_as_counted_and_their_units(
    reduction: Reduction, units: list[int]
) -> None:
    ends = np.cumsum(units).tolist()
    video = noise(6, PATCH * ends[-1], 28, 28, 3)
    parts = split(video, (4, 3), reduction, 20, ends)
    for part in parts:
        assert part.visual == reduction.count(part.num_grids, 4, 3)
    short = split(video[: PATCH * ends[-2]], (4, 3), reduction, 20, ends[:-1])
    assert [part.key() for part in parts[: len(short) - 1]] == [part.key() for part in short[:-1]]


def test_segments_of_the_same_frames_after_others_are_named_by_the_cells_they_keep() -> None:
    common = np.repeat(noise(7, 1, 56, 56, 3), 4, axis=0)
    after_itself = np.concatenate([common, common])
    half = common.copy()
    half[:, 28:] = 0
    after_half = np.concatenate([half, common])
    reduction = Reduction(static="prune", keep=0.25)
    one = split(after_itself, (4, 4), reduction, 8)
    other = split(after_half, (4, 4), reduction, 8)
    assert [part.grids for part in one] == [part.grids for part in other] == [(0, 2), (2, 4)]
    assert not np.array_equal(one[1].kept, other[1].kept)  # type: ignore[arg-type]
    assert digests(one, after_itself)[1] != digests(other, after_half)[1]
