"""How much each cell of a video changes over time, from its pixels. Pure numpy.

A cell is one token after pooling and temporal merging. The scores compare pixels, not encoder
outputs, so that it is known before encoding which cells stay. The measure is that of Run-Length
Tokenization (Choudhury et al., "Don't Look Twice", NeurIPS 2024), which finds repeated patches.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.config.options import Reduction

Scores = npt.NDArray[np.float32]
Blocks = npt.NDArray[np.int32]

# The pixels of a token are averaged over 4 x 4 blocks: the noise of single pixels averages out, an
# edge that moves by a few pixels does not.
_BLOCKS_PER_TOKEN = 4
# Sums of this many uint8 rows fit uint16.
_MAX_BLOCK = 256


def static_scores(
    blocks: Blocks,
    size: tuple[int, int],
    height: int,
    width: int,
    temporal_patch: int,
    reduction: Reduction,
    before: int = 0,
) -> Scores:
    """Mean absolute difference between each cell's pixels and those of the cell before it in time.

    Frame ``k`` of a cell is compared with frame ``k`` of the cell before it at the same place of
    the grid, both averaged over small blocks of pixels. A partial cell (right and lower edge, end
    of the segment) counts with the pixels and frames that it has. A score depends only on the
    frames of the cell and of the cell before it, so a longer version of a segment keeps its scores.

    Args:
        blocks: The ``frame_blocks`` of the segment's frames, and before them of those of the cells
            before its first.
        size: Rows and columns of a frame.
        height, width: Tokens of one temporal grid vertically and horizontally, before reduction.
        temporal_patch: Frames per temporal grid.
        reduction: ``pool`` and ``temporal`` of the reduction say how large a cell is.
        before: How many of the frames come before the segment; 0 for a video's first segment. They
            are at most those of a cell; where they are fewer, the earliest one stands for the rest.

    Returns:
        float32 ``[merged grids, pooled height, pooled width]`` in grey levels, 0 to 255; infinite
        for the first merged grid of a video, which has no grid before it.
    """
    own = len(blocks) - before
    grid = reduction.grid(math.ceil(own / temporal_patch), height, width)
    scores = np.full(grid, np.inf, dtype=np.float32)
    span = temporal_patch * reduction.temporal
    if not before and own <= span:
        return scores
    side_y, side_x = _block(size[0], height), _block(size[1], width)
    if before:
        blocks = np.concatenate([blocks[:1].repeat(span - before, axis=0), blocks])
    # Integers until the last division, so that every machine ranks cells alike.
    change = np.abs(blocks[span:] - blocks[:-span]).sum(axis=1)
    firsts = (
        np.arange(0, len(change), span),
        _first_blocks(blocks.shape[2], side_y, size[0], height, reduction.pool),
        _first_blocks(blocks.shape[3], side_x, size[1], width, reduction.pool),
    )
    for axis, first in enumerate(firsts):
        change = np.add.reduceat(change, first, axis=axis, dtype=np.int64)
    members = [
        np.diff(first, append=end)
        for first, end in zip(firsts, (len(blocks) - span, *blocks.shape[2:]), strict=True)
    ]
    pixels = 3 * side_y * side_x * np.einsum("i,j,k->ijk", *members)
    scores[0 if before else 1 :] = change / pixels
    return scores


def frame_blocks(frames: npt.NDArray[np.uint8], height: int, width: int) -> Blocks:
    """What ``static_scores`` compares of frames: ``block_sums``, several blocks to a token.

    Args:
        frames: uint8 ``[frames, rows, columns, 3]``, at least as many rows and columns as tokens.
        height, width: Tokens of one temporal grid vertically and horizontally, before reduction.

    Raises:
        ValueError: The frames have fewer rows or columns than tokens.
    """
    rows, columns = frames.shape[1:3]
    if rows < height or columns < width:
        raise ValueError(f"frames of {(rows, columns)} cannot hold {height} x {width} tokens")
    # A plain array: SampledFrames would run its own code for every slice.
    return block_sums(np.asarray(frames), _block(rows, height), _block(columns, width))


def block_sums(frames: npt.NDArray[np.uint8], side_y: int, side_x: int) -> Blocks:
    """Sum of the pixels of each block, per channel.

    Args:
        frames: ``[frames, rows, columns, channels]``.
        side_y, side_x: Rows (at most 256) and columns of a block; the rows and columns left over at
            the lower and right edge are ignored.

    Returns:
        int32 ``[frames, channels, rows // side_y, columns // side_x]``.
    """
    count, rows, columns, channels = frames.shape
    down, across = rows // side_y, columns // side_x
    out = np.empty((count, channels, down, across), dtype=np.int32)
    # Three times faster than one sum over both short axes: frame by frame, row by row, planes last.
    for frame, into in zip(frames[:, : down * side_y, : across * side_x], out, strict=True):
        lines = frame.reshape(down, side_y, across, side_x, channels)
        added: npt.NDArray[Any] = lines[:, 0].astype(np.uint16)
        for row in range(1, side_y):
            added += lines[:, row]
        np.ascontiguousarray(added.transpose(2, 3, 0, 1)).sum(axis=0, dtype=np.int32, out=into)
    return out


def _block(pixels: int, tokens: int) -> int:
    return min(max(1, pixels // (tokens * _BLOCKS_PER_TOKEN)), _MAX_BLOCK)


def _first_blocks(
    blocks: int, side: int, pixels: int, tokens: int, pool: int
) -> npt.NDArray[np.int64]:
    """First block of each cell along one axis; a block belongs to the cell that has its centre."""
    token = (2 * np.arange(blocks) + 1) * side * tokens // (2 * pixels)
    return np.searchsorted(token // pool, np.arange(math.ceil(tokens / pool)))
