"""M-RoPE positions of the tokens that a reduction leaves. Pure numpy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.config.options import Reduction

Positions = npt.NDArray[np.int64]


def reduced_positions(
    temporal: Positions,
    height: int,
    width: int,
    reduction: Reduction,
    kept: Positions | None = None,
) -> Positions:
    """Positions of the tokens that are left, on the grid of the tokens before reduction.

    A pooled cell has the position of its centre, rounded down. A group of merged grids has the
    position of its first grid.

    Args:
        temporal: int64 ``[grids]`` position of each temporal grid before reduction.
        height, width: Tokens of a grid before reduction, vertically and horizontally.
        reduction: The token reduction.
        kept: Flat indices of the cells that stay, where ``reduction.static`` drops some; None
            where all stay.

    Returns:
        int64 ``[3, tokens]``: temporal, vertical and horizontal position of each token.
    """
    axes = (
        temporal[:: reduction.temporal],
        _centres(height, reduction.pool),
        _centres(width, reduction.pool),
    )
    cells = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    return cells if kept is None else cells[:, kept]


def _centres(tokens: int, pool: int) -> Positions:
    first = pool * np.arange(math.ceil(tokens / pool))
    centres: Positions = first + (np.minimum(pool, tokens - first) - 1) // 2
    return centres
