"""Which tokens of a video stay, how many, and where they stand."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.adapters.models.mrope import vision_positions
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.video.positions import reduced_positions
from vllm_mm_ext.video.scores import Scores, block_sums, frame_blocks, static_scores
from vllm_mm_ext.video.select import kept_cells

Frames = npt.NDArray[np.uint8]


@st.composite
def reductions(draw: st.DrawFn) -> Reduction:
    static = draw(st.sampled_from(["none", "merge", "prune"]))
    return Reduction(
        pool=draw(st.integers(1, 8)),
        temporal=draw(st.integers(1, 8)),
        static=static,  # type: ignore[arg-type]
        keep=1.0 if static == "none" else draw(st.floats(0.01, 0.99)),
    )


grids = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


def noise(seed: int, *shape: int) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def slow_score(frames: Frames, at: tuple[int, int, int], span: int, side: tuple[int, int]) -> float:
    """Score of one cell whose 4 x 4 blocks per token divide evenly, by plain loops."""
    grid, row, column = at
    cell = frames[
        :,
        row * side[0] : (row + 1) * side[0],
        column * side[1] : (column + 1) * side[1],
    ].astype(np.float64)
    block = 7
    differences = []
    for index in range(grid * span, min((grid + 1) * span, len(frames))):
        for y in range(0, cell.shape[1], block):
            for x in range(0, cell.shape[2], block):
                here, before = (
                    cell[i, y : y + block, x : x + block].mean(axis=(0, 1))
                    for i in (index, index - span)
                )
                differences.append(np.abs(here - before).mean())
    return float(np.mean(differences))


def scores_of(
    frames: npt.NDArray[np.uint8],
    height: int,
    width: int,
    patch: int,
    reduction: Reduction,
    before: int = 0,
) -> Scores:
    blocks, (_, rows, columns, _) = frame_blocks(frames, height, width), frames.shape
    return static_scores(blocks, (rows, columns), height, width, patch, reduction, before)


@given(seed=st.integers(0, 99), pool=st.integers(1, 3), temporal=st.integers(1, 3))
@settings(max_examples=15)
def test_a_score_is_the_mean_difference_of_a_cells_blocks_to_the_cell_before(
    seed: int, pool: int, temporal: int
) -> None:
    height, width, patch, factor = 3, 4, 2, 28
    frames = noise(seed, 11, height * factor, width * factor, 3)
    scores = scores_of(frames, height, width, patch, Reduction(pool=pool, temporal=temporal))
    side = (pool * factor, pool * factor)
    for at in np.ndindex(scores.shape):
        if at[0]:
            expected = slow_score(frames, at, patch * temporal, side)
            assert scores[at] == pytest.approx(expected, rel=1e-5)


@given(grid=grids, reduction=reductions(), patch=st.integers(1, 2), odd=st.integers(0, 1))
def test_scores_have_one_value_per_cell_of_the_reduced_grid(
    grid: tuple[int, int, int], reduction: Reduction, patch: int, odd: int
) -> None:
    count = grid[0] * patch - odd * (patch - 1)
    frames = noise(0, count, grid[1] * 3 + 1, grid[2] * 5, 3)
    scores = scores_of(frames, grid[1], grid[2], patch, reduction)
    assert scores.shape == reduction.grid(*grid)
    assert np.isinf(scores[0]).all()
    assert np.isfinite(scores[1:]).all()
    assert scores.dtype == np.float32


def test_still_frames_score_zero_and_only_the_cell_that_changes_scores() -> None:
    frames = np.full((6, 112, 112, 3), 90, dtype=np.uint8)
    frames[4:, 28:56, 84:112] = 190
    scores = scores_of(frames, 4, 4, 2, NO_REDUCTION)
    assert scores[2, 1, 3] == 100
    scores[2, 1, 3] = 0
    assert not scores[1:].any()


def test_scores_do_not_depend_on_what_follows() -> None:
    frames = noise(1, 12, 64, 64, 3)
    reduction = Reduction(pool=2, temporal=2)
    whole = scores_of(frames, 4, 4, 2, reduction)
    start = scores_of(frames[:8], 4, 4, 2, reduction)
    np.testing.assert_array_equal(start, whole[:2])


def test_tokens_that_no_whole_number_of_pixels_fits_are_all_scored() -> None:
    frames = np.zeros((2, 384, 384, 3), dtype=np.uint8)
    frames[1, 383 - 13 :, 383 - 13 :] = 255
    scores = scores_of(frames, 14, 14, 1, NO_REDUCTION)
    assert scores[1, 13, 13] > 0
    assert scores[1].argmax() == 14 * 14 - 1


def test_fewer_pixels_than_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        scores_of(noise(0, 4, 3, 8, 3), 4, 4, 2, NO_REDUCTION)


@given(side_y=st.integers(1, 9), side_x=st.integers(1, 9), seed=st.integers(0, 9))
@settings(max_examples=25)
def test_block_sums_are_the_sums_of_blocks(side_y: int, side_x: int, seed: int) -> None:
    frames = noise(seed, 2, 20, 23, 3)
    sums = block_sums(frames, side_y, side_x)
    assert sums.shape == (2, 3, 20 // side_y, 23 // side_x)
    for n, channel, row, column in np.ndindex(sums.shape):
        block = frames[
            n,
            row * side_y : (row + 1) * side_y,
            column * side_x : (column + 1) * side_x,
            channel,
        ]
        assert sums[n, channel, row, column] == block.sum()


def test_the_brightest_and_largest_blocks_do_not_overflow() -> None:
    frames = np.full((1, 256, 256, 3), 255, dtype=np.uint8)
    assert (block_sums(frames, 256, 256) == 255 * 256 * 256).all()


@given(grid=grids, reduction=reductions(), levels=st.integers(1, 50), seed=st.integers(0, 99))
def test_kept_cells_are_as_many_as_counted_sorted_and_the_highest(
    grid: tuple[int, int, int], reduction: Reduction, levels: int, seed: int
) -> None:
    shape = reduction.grid(*grid)
    scores = np.random.default_rng(seed).integers(0, levels, shape).astype(np.float32)
    kept = kept_cells(scores, reduction)
    assert len(kept) == reduction.count(*grid)
    assert (np.diff(kept) > 0).all()
    flat = scores.reshape(-1)
    dropped = np.setdiff1d(np.arange(flat.size), kept)
    for cell in dropped:
        better = (flat[kept] > flat[cell]) | ((flat[kept] == flat[cell]) & (kept < cell))
        assert better.all()


def first_and_later(first: int, later: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Scores of a video's first segment: so many first cells, and rows of later ones."""
    return np.concatenate([np.full((1, first), np.inf), later]).reshape(-1, 1, first)


def test_first_cells_stay_before_later_ones_that_have_not_changed() -> None:
    still = first_and_later(16, np.zeros((5, 16)))
    few = kept_cells(still, Reduction(static="prune", keep=10 / 96))
    # Not enough for all places: spread over the first grid.
    assert few.tolist() == [0, 2, 4, 5, 7, 8, 10, 12, 13, 15]
    more = kept_cells(still, Reduction(static="prune", keep=20 / 96))
    assert more.tolist() == list(range(20))


def test_first_cells_leave_half_to_later_ones_that_have_changed() -> None:
    later = np.zeros((5, 16))
    later[2] = 10
    later[4, :3] = 20
    kept = kept_cells(first_and_later(16, later), Reduction(static="prune", keep=16 / 96))
    assert np.bincount(kept // 16, minlength=6).tolist() == [8, 0, 0, 5, 0, 3]
    # The later cells stand for places 0 to 4; the first ones are spread over the rest.
    assert kept[:8].tolist() == [5, 7, 8, 9, 11, 12, 13, 15]
    assert kept[8:].tolist() == [*range(48, 53), *range(80, 83)]


def test_changed_cells_take_no_more_from_the_first_ones_than_they_are() -> None:
    later = np.zeros((5, 16))
    later[3, 7] = 1
    kept = kept_cells(first_and_later(16, later), Reduction(static="prune", keep=16 / 96))
    assert kept.tolist() == [*range(7), *range(8, 16), 64 + 7]


def test_scores_of_a_later_segment_are_those_in_the_whole_video() -> None:
    frames, reduction = noise(3, 16, 64, 64, 3), Reduction(pool=2, temporal=2)
    whole = scores_of(frames, 4, 4, 2, reduction)
    later = scores_of(frames[4:13], 4, 4, 2, reduction, before=4)
    np.testing.assert_array_equal(later[0], whole[2])
    assert later.shape == (2, 2, 2)


def test_a_segment_after_less_than_a_cell_is_compared_with_what_there_is() -> None:
    frames = np.zeros((5, 64, 64, 3), dtype=np.uint8)
    frames[3:] = 8
    scores = scores_of(frames, 4, 4, 1, Reduction(temporal=3), before=2)
    # One of three frames is as those before.
    np.testing.assert_allclose(scores, np.full((1, 4, 4), 16 / 3), rtol=1e-6)


@given(grid=grids, start=st.integers(0, 50), step=st.integers(0, 9))
def test_positions_without_reduction_are_those_of_vision_tokens(
    grid: tuple[int, int, int], start: int, step: int
) -> None:
    temporal = start + step * np.arange(grid[0])
    expected = vision_positions(temporal, grid[1], grid[2])
    got = reduced_positions(temporal, grid[1], grid[2], NO_REDUCTION)
    np.testing.assert_array_equal(got, expected)


@given(grid=grids, reduction=reductions(), seed=st.integers(0, 99))
def test_positions_are_those_of_source_tokens_inside_their_cell(
    grid: tuple[int, int, int], reduction: Reduction, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    temporal = np.cumsum(rng.integers(0, 9, grid[0]))
    shape = reduction.grid(*grid)
    kept = None
    if reduction.static != "none":
        kept = kept_cells(rng.random(shape), reduction)
    got = reduced_positions(temporal, grid[1], grid[2], reduction, kept)
    assert got.shape == (3, reduction.count(*grid))
    assert got.dtype == np.int64
    cells = range(math.prod(shape)) if kept is None else kept.tolist()
    for (t, h, w), cell in zip(got.T.tolist(), cells, strict=True):
        group, row, column = (int(i) for i in np.unravel_index(cell, shape))
        assert t == temporal[group * reduction.temporal]
        for position, index, size in ((h, row, grid[1]), (w, column, grid[2])):
            members = range(index * reduction.pool, min((index + 1) * reduction.pool, size))
            assert position == members[(len(members) - 1) // 2]
