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
    """Positions of what is left, on the grid the tokens had before.

    A pooled cell stands at its centre, rounded down; a group of merged grids stands at its first.

    Args:
        temporal: int64 ``[grids]`` position of each temporal grid before reduction.
        height, width: Tokens of a grid before reduction.
        reduction: How the tokens are made fewer.
        kept: Flat indices of the cells that stay, where ``reduction.static`` selects.

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
