"""Which cells of a segment stay under a static reduction. Pure numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.config.options import Reduction

Indices = npt.NDArray[np.int64]


def kept_cells(scores: npt.NDArray[np.floating], reduction: Reduction) -> Indices:
    """The cells with the highest scores; of equal scores, the cell with the lower index.

    ``scores.static_scores`` gives the cells of the first grid infinite scores, so these cells stay
    before any later one. If fewer cells than the first grid has may stay, cells spread evenly over
    the first grid stay.

    Args:
        scores: ``[grids, height, width]`` of the pooled and merged grid, without NaN.
        reduction: ``keep`` of the reduction says which share of the cells stays.

    Returns:
        Ascending flat indices into the grid, ``reduction.kept(scores.size)`` of them.
    """
    flat = scores.reshape(-1)
    quota = reduction.kept(flat.size)
    first = np.flatnonzero(np.isinf(flat))
    if quota < len(first):
        spread: Indices = first[(2 * np.arange(quota) + 1) * len(first) // (2 * quota)]
        return spread
    return np.sort(np.argsort(-flat, kind="stable")[:quota]).astype(np.int64)
