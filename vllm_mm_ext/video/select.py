"""Which cells of a segment stay. Pure numpy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.config.options import Reduction

Indices = npt.NDArray[np.int64]


def kept_cells(scores: npt.NDArray[np.floating], reduction: Reduction) -> Indices:
    """Cells that stay: those with the highest scores, the lower index first among equals.

    ``scores.static_scores`` gives the first grid infinite scores, so each place keeps its first
    cell before any later cell is looked at; where there are not enough for that, cells spread
    evenly over the first grid stay.

    Args:
        scores: ``[grids, height, width]`` of the pooled and merged grid, without NaN.
        reduction: ``keep`` says how many stay.

    Returns:
        Ascending flat indices into the grid, as many as ``reduction.count`` says.
    """
    flat = scores.reshape(-1)
    quota = (
        flat.size if reduction.static == "none" else max(1, math.ceil(flat.size * reduction.keep))
    )
    first = np.flatnonzero(np.isinf(flat))
    if quota < len(first):
        spread: Indices = first[(2 * np.arange(quota) + 1) * len(first) // (2 * quota)]
        return spread
    return np.sort(np.argsort(-flat, kind="stable")[:quota]).astype(np.int64)
