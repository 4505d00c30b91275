"""Token reduction of encoder outputs: pool in space, merge over time, merge or prune static cells.

All shapes follow from the grid and from the number of cells kept, both known on the host, so the
host does not wait for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812

from vllm_mm_ext.config.options import Reduction


def reduce_tokens(
    tokens: torch.Tensor,
    grid: tuple[int, int, int],
    reduction: Reduction,
    kept: torch.Tensor | None = None,
    weigh_dim: int | None = None,
) -> torch.Tensor:
    """Reduce the encoder outputs of one segment; computed in float32.

    Args:
        tokens: ``[grids * height * width, channels]``.
        grid: Number of temporal grids, and height and width of a grid in tokens.
        reduction: The token reduction.
        kept: int64 ``[kept]`` ascending flat indices of the cells of the pooled and merged grid
            that stay; needed by ``static`` reductions, None for others.
        weigh_dim: Number of leading channels that decide how similar tokens are, None for all of
            them. Qwen3-VL appends the channels of its deepstack layers to those of the token.

    Returns:
        ``[reduction.count(*grid), channels]`` (with ``kept``, a row for each index) in the dtype of
        ``tokens``.

    Raises:
        ValueError: ``tokens`` are not as many as ``grid`` says, or ``kept`` is missing, or given
            without a ``static`` reduction.
    """
    if len(tokens) != math.prod(grid):
        raise ValueError(f"{len(tokens)} tokens are not a grid of {grid}")
    if (reduction.static != "none") != (kept is not None):
        raise ValueError(f"kept cells and static={reduction.static!r} go together")
    if reduction.is_identity:
        return tokens
    cells = pooled(tokens.float().view(*grid, -1), reduction.pool)
    cells = temporally_merged(cells, reduction.temporal, weigh_dim)
    merged, height, width = cells.shape[:3]
    cells = cells.reshape(merged, height * width, -1)
    if kept is None:
        return cells.flatten(0, 1).to(tokens.dtype)
    kept = kept.to(cells.device, non_blocking=True)
    if reduction.static == "merge":
        cells = runs_averaged(cells, kept)
    return cells.flatten(0, 1)[kept].to(tokens.dtype)


def pooled(tokens: torch.Tensor, pool: int) -> torch.Tensor:
    """Average cells of ``pool`` x ``pool`` tokens of each grid.

    A cell at the right or lower edge may have fewer tokens; its average is over those.

    Args:
        tokens: ``[grids, height, width, channels]``.
        pool: Side of a cell in tokens.

    Returns:
        ``[grids, ceil(height / pool), ceil(width / pool), channels]``.
    """
    if pool == 1:
        return tokens
    planes = F.avg_pool2d(tokens.permute(0, 3, 1, 2), pool, ceil_mode=True, count_include_pad=False)
    return planes.permute(0, 2, 3, 1)


def temporally_merged(
    tokens: torch.Tensor, temporal: int, weigh_dim: int | None = None
) -> torch.Tensor:
    """Similarity-weighted average over groups of ``temporal`` consecutive grids.

    At each place of the grid, the weight of a group's member ``x`` is ``1 + cos(x, m)``, where
    ``m`` is the mean of the group, divided by the sum of these weights over the group. So a member
    that differs from the rest of its group counts less, and one that points the other way counts
    nothing. Equal members, and members whose mean is zero, get equal weights. The weights cannot
    all be zero: the products of the members with their mean sum to ``members * |m|**2``, which is
    not negative.

    Args:
        tokens: float ``[grids, height, width, channels]``.
        temporal: Grids per group; the last group may have fewer.
        weigh_dim: Number of leading channels from which the cosine is taken, None for all.

    Returns:
        ``[ceil(grids / temporal), height, width, channels]``.
    """
    if temporal == 1:
        return tokens
    whole = len(tokens) // temporal * temporal
    parts = [
        _group_average(part.unflatten(0, (-1, size)), weigh_dim)
        for part, size in ((tokens[:whole], temporal), (tokens[whole:], len(tokens) - whole))
        if len(part)
    ]
    return torch.cat(parts)


def _group_average(groups: torch.Tensor, weigh_dim: int | None) -> torch.Tensor:
    """``[groups, members, height, width, channels]`` averaged over the members."""
    compared = groups[..., :weigh_dim]
    mean = compared.mean(dim=1, keepdim=True)
    weights = 1 + F.cosine_similarity(compared, mean, dim=-1)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.einsum("gmhw,gmhwc->ghwc", weights, groups)


def runs_averaged(cells: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Replace each kept cell by the mean of itself and the dropped cells that follow it in time.

    The dropped cells up to the next kept cell at the same place of the grid count. Cells before the
    first kept cell of their place are in no mean.

    Args:
        cells: float ``[grids, places, channels]``.
        kept: Flat indices of the kept cells.

    Returns:
        ``[grids, places, channels]``; the values of dropped cells have no meaning.
    """
    dropped = torch.ones(cells.shape[:2], device=cells.device, dtype=cells.dtype)
    dropped.view(-1).index_fill_(0, kept, 0.0)
    sums = cells.clone()
    counts = torch.ones_like(dropped)
    # From the last grid to the first: a dropped cell hands its sum to the cell before it in time.
    for at in range(len(cells) - 2, -1, -1):
        sums[at].addcmul_(sums[at + 1], dropped[at + 1].unsqueeze(-1))
        counts[at].addcmul_(counts[at + 1], dropped[at + 1])
    return sums / counts.unsqueeze(-1)
