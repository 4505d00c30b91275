"""Which cells of a segment stay under a static reduction. Pure numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.config.options import Reduction

Indices = npt.NDArray[np.int64]


def kept_cells(scores: npt.NDArray[np.floating], reduction: Reduction) -> Indices:
    """The cells with the highest scores; of equal scores, the cell with the lower index.

    Cells of the first grid with infinite scores are the first of the video at their places. They
    stay before any later cell that has not changed at all, and get up to half of what may stay
    where later cells have changed: else a grid as large as what may stay would let nothing else
    through, however much the picture changes. If not all of them may stay, those at places where
    no later cell stays come first, spread evenly.

    Args:
        scores: ``[grids, height, width]`` of the pooled and merged grid, without NaN.
        reduction: ``keep`` of the reduction says which share of the cells stays.

    Returns:
        Ascending flat indices into the grid, ``reduction.kept(scores.size)`` of them.
    """
    flat = scores.reshape(-1)
    quota = reduction.kept(flat.size)
    new = np.flatnonzero(np.isinf(flat))
    changed = int(np.count_nonzero(flat)) - len(new)
    share = min(len(new), max(quota - changed, -(-quota // 2)))
    best = np.argsort(-flat, kind="stable")[len(new) :][: quota - share]
    again = np.isin(new, best % scores[0].size)
    alone = _spread(new[~again], share)
    more = _spread(new[again], share - len(alone))
    return np.sort(np.concatenate([alone, more, best])).astype(np.int64)


def _spread(cells: Indices, count: int) -> Indices:
    """So many of the cells, spread evenly; all of them if there are not as many."""
    if count >= len(cells):
        return cells
    spread: Indices = cells[(2 * np.arange(count) + 1) * len(cells) // (2 * max(count, 1))]
    return spread
