"""Token reduction of encoder outputs against plain loops, and its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.video.reduce import reduce_tokens

Grid = tuple[int, int, int]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Grid, Reduction, torch.Tensor | None, torch.Tensor]:
    """A grid, a reduction, the cells it keeps, tokens."""
    grid = draw(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)))
    static = draw(st.sampled_from(["none", "merge", "prune"]))
    reduction = Reduction(
        pool=draw(st.integers(1, 4)),
        temporal=draw(st.integers(1, 4)),
        static=static,  # type: ignore[arg-type]
        keep=1.0 if static == "none" else draw(st.floats(0.05, 0.95)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    kept = None
    if static != "none":
        cells = math.prod(reduction.grid(*grid))
        kept = torch.from_numpy(np.sort(rng.permutation(cells)[: reduction.count(*grid)]))
    return grid, reduction, kept, torch.from_numpy(rng.normal(size=(math.prod(grid), 6))).float()


def reference(
    tokens: torch.Tensor,
    grid: Grid,
    reduction: Reduction,
    kept: torch.Tensor | None,
    weigh_dim: int | None,
) -> np.ndarray:
    x = tokens.double().numpy().reshape(*grid, -1)
    merged, height, width = reduction.grid(*grid)
    p, g = reduction.pool, reduction.temporal
    pooled = np.empty((grid[0], height, width, x.shape[-1]))
    for t, row, column in np.ndindex(pooled.shape[:3]):
        area = x[t, row * p : (row + 1) * p, column * p : (column + 1) * p]
        pooled[t, row, column] = area.reshape(-1, x.shape[-1]).mean(axis=0)
    cells = np.empty((merged, height, width, x.shape[-1]))
    for t, row, column in np.ndindex(cells.shape[:3]):
        members = pooled[t * g : (t + 1) * g, row, column]
        compared = members[:, :weigh_dim]
        mean = compared.mean(axis=0)
        weights = np.array(
            [1 + m @ mean / (np.linalg.norm(m) * np.linalg.norm(mean)) for m in compared]
        )
        cells[t, row, column] = weights @ members / weights.sum() if g > 1 else members[0]
    if kept is None:
        return cells.reshape(-1, x.shape[-1])
    flat = cells.reshape(merged, height * width, -1)
    chosen = set(kept.tolist())
    out = []
    for cell in kept.tolist():
        t, place = divmod(cell, height * width)
        run = [flat[t, place]]
        while (
            reduction.static == "merge"
            and (t := t + 1) < merged
            and t * height * width + place not in chosen
        ):
            run.append(flat[t, place])
        out.append(np.mean(run, axis=0))
    return np.array(out)


@given(case=cases(), weigh_dim=st.sampled_from([None, 2]))
def test_equals_a_loop_over_cells(
    case: tuple[Grid, Reduction, torch.Tensor | None, torch.Tensor], weigh_dim: int | None
) -> None:
    grid, reduction, kept, tokens = case
    got = reduce_tokens(tokens, grid, reduction, kept, weigh_dim)
    assert got.shape == (reduction.count(*grid), tokens.shape[1])
    expected = reference(tokens, grid, reduction, kept, weigh_dim)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)


@given(case=cases(), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_equal_tokens_stay_exactly_what_they_are(
    case: tuple[Grid, Reduction, torch.Tensor | None, torch.Tensor], dtype: torch.dtype
) -> None:
    grid, reduction, kept, tokens = case
    same = tokens[:1].to(dtype).expand(len(tokens), -1)
    got = reduce_tokens(same, grid, reduction, kept)
    assert got.dtype == dtype
    assert torch.equal(got, same[: len(got)])


@given(case=cases())
def test_half_precision_is_rounded_once_at_the_end(
    case: tuple[Grid, Reduction, torch.Tensor | None, torch.Tensor],
) -> None:
    grid, reduction, kept, tokens = case
    rounded = tokens.bfloat16()
    got = reduce_tokens(rounded, grid, reduction, kept)
    exact = reduce_tokens(rounded.float(), grid, reduction, kept)
    assert torch.equal(got, exact.bfloat16())


@given(case=cases(), scale=st.floats(0.01, 100))
def test_a_common_scale_passes_through(
    case: tuple[Grid, Reduction, torch.Tensor | None, torch.Tensor], scale: float
) -> None:
    grid, reduction, kept, tokens = case
    got = reduce_tokens(tokens * scale, grid, reduction, kept)
    expected = reduce_tokens(tokens, grid, reduction, kept) * scale
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * scale)


@given(case=cases(), seed=st.integers(0, 99))
def test_without_temporal_merging_reduction_is_linear(
    case: tuple[Grid, Reduction, torch.Tensor | None, torch.Tensor], seed: int
) -> None:
    grid, reduction, kept, tokens = case
    reduction = reduction.model_copy(update={"temporal": 1})
    if reduction.static != "none":
        kept = torch.arange(reduction.count(*grid))
    other = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed))
    got = reduce_tokens(2 * tokens - other, grid, reduction, kept)
    parts = [reduce_tokens(x, grid, reduction, kept) for x in (tokens, other)]
    torch.testing.assert_close(got, 2 * parts[0] - parts[1], rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 99), size=st.integers(2, 5))
def test_the_order_within_a_merged_group_does_not_matter(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grids = torch.randn(size, 6, 4, generator=generator)
    shuffled = grids[torch.randperm(size, generator=generator)]
    grid, reduction = (size, 2, 3), Reduction(temporal=size)
    torch.testing.assert_close(
        reduce_tokens(shuffled.flatten(0, 1), grid, reduction),
        reduce_tokens(grids.flatten(0, 1), grid, reduction),
    )


@given(case=cases())
def test_every_channel_stays_between_the_extremes_of_its_inputs(
    case: tuple[Grid, Reduction, torch.Tensor | None, torch.Tensor],
) -> None:
    grid, reduction, kept, tokens = case
    got = reduce_tokens(tokens, grid, reduction, kept)
    assert (got <= tokens.amax(dim=0) + 1e-5).all()
    assert (got >= tokens.amin(dim=0) - 1e-5).all()


def test_a_member_that_disagrees_with_its_group_counts_for_less() -> None:
    agrees, odd = torch.tensor([1.0, 0.0]), torch.tensor([-0.6, 0.8])
    merged = reduce_tokens(torch.stack([agrees, agrees, odd]), (3, 1, 1), Reduction(temporal=3))
    mean = torch.stack([agrees, agrees, odd]).mean(dim=0)
    assert (merged[0] - agrees).norm() < (mean - agrees).norm()


def test_members_that_cancel_are_averaged_plainly() -> None:
    x = torch.tensor([[1.0, -2.0], [-1.0, 2.0]])
    assert reduce_tokens(x, (2, 1, 1), Reduction(temporal=2)).abs().max() == 0
    zero = torch.zeros(2, 2)
    assert torch.equal(reduce_tokens(zero, (2, 1, 1), Reduction(temporal=2)), zero[:1])


def test_only_the_leading_channels_decide_similarity() -> None:
    tokens = torch.tensor([[1.0, 0.0, 5.0], [1.0, 0.0, -9.0]])
    got = reduce_tokens(tokens, (2, 1, 1), Reduction(temporal=2), weigh_dim=2)
    torch.testing.assert_close(got, tokens.mean(dim=0, keepdim=True))


def test_no_reduction_returns_the_tokens_themselves() -> None:
    tokens = torch.randn(12, 4)
    assert reduce_tokens(tokens, (3, 2, 2), NO_REDUCTION) is tokens


def test_what_does_not_fit_is_an_error() -> None:
    tokens = torch.randn(12, 4)
    prune = Reduction(static="prune", keep=0.5)
    with pytest.raises(ValueError, match="12 tokens are not a grid"):
        reduce_tokens(tokens, (3, 2, 3), NO_REDUCTION)
    with pytest.raises(ValueError, match="go together"):
        reduce_tokens(tokens, (3, 2, 2), prune)
    with pytest.raises(ValueError, match="go together"):
        reduce_tokens(tokens, (3, 2, 2), Reduction(pool=2), torch.arange(5))
