"""The time of each temporal grid of a video, and how a video's tokens interleave with its sound's.

A video processor groups ``temporal_patch`` consecutive frames into one temporal grid, and each grid
becomes ``tokens_per_grid`` tokens. The Qwen families compute the times of all grids from one number
per video, its duration divided by its number of grids. That holds for frames at a fixed rate from 0
on. Frames spread over a clip up to its last one are further apart, and frames chosen by content
have a time each. Pure arithmetic: no torch, no vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GridTimes:
    """Times of the temporal grids of one video.

    Attributes:
        seconds: Time of each grid in seconds from the start of the video.
        step: Seconds between grids that are at a fixed rate from 0 on, else None.
    """

    seconds: tuple[float, ...]
    step: float | None

    def temporal_positions(self, positions_per_second: float) -> Positions:
        """Temporal M-RoPE position of each grid, counted from the start of the video.

        Grids at a fixed rate: the times are computed in float32 and cut to whole positions, as in
        transformers' ``get_rope_index``. Other grids: the times are rounded to the nearest
        position. Either way, grids that are closer together than positions share one.

        Args:
            positions_per_second: The model's positions per second of video.

        Returns:
            int64 ``[grids]``.
        """
        if self.step is not None:
            index = np.arange(len(self.seconds), dtype=np.float32)
            scaled = index * np.float32(self.step) * np.float32(positions_per_second)
            return scaled.astype(np.int64)
        return np.rint(np.asarray(self.seconds) * positions_per_second).astype(np.int64)


def even_grid(num_grids: int, step: float) -> GridTimes:
    """Grids ``step`` seconds apart, the first at 0."""
    return GridTimes(tuple(i * step for i in range(num_grids)), step)


def grid_times(times: Sequence[float], *, temporal_patch: int, step: float | None) -> GridTimes:
    """Times of the grids of a video whose frame times are known: each grid at its first frame.

    Neither depends on how the video goes on, so a longer version of a clip has the same times.

    Args:
        times: Presentation time of each frame in seconds, ascending, at least one.
        temporal_patch: Frames per grid; an incomplete last grid counts as one.
        step: Seconds between the moments 0, ``step``, 2 ``step``... at which the frames are on
            screen, which are then the times of the frames; None for frames at no such moments.

    Raises:
        ValueError: ``times`` is empty or not ascending.
    """
    if not times:
        raise ValueError("a video has at least one frame")
    if any(b < a for a, b in pairwise(times)):
        raise ValueError("frame times must ascend")
    if step is not None:
        return even_grid(math.ceil(len(times) / temporal_patch), temporal_patch * step)
    return GridTimes(tuple(times[::temporal_patch]), None)


def interleave_chunks(
    grids: GridTimes,
    *,
    tokens_per_grid: int,
    num_audio_tokens: int,
    positions_per_second: float,
    seconds_per_chunk: float,
) -> list[tuple[int, int]]:
    """Interleave a video's tokens with those of its sound chunk by chunk (Qwen2.5-Omni).

    Chunk ``i`` holds the visual tokens of the seconds from ``i * seconds_per_chunk`` up to
    ``(i + 1) * seconds_per_chunk``, then the audio tokens of the same seconds. An audio token lasts
    ``1 / positions_per_second`` seconds. For grids at a fixed rate the result equals that of
    transformers' ``Qwen2_5OmniProcessor.get_chunked_index``, unless the grids are further apart
    than a chunk: that function leaves no chunk without visual tokens, so it cuts such grids into
    pieces that stand beside the sound of other seconds.

    Args:
        grids: Times of the temporal grids.
        tokens_per_grid: Visual tokens per grid.
        num_audio_tokens: Audio tokens of the whole sound track.
        positions_per_second: M-RoPE positions per second.
        seconds_per_chunk: Seconds of a chunk.

    Returns:
        Numbers of ``(visual tokens, audio tokens)`` of each chunk; together they are all tokens.
    """
    per_chunk = int(positions_per_second * seconds_per_chunk)
    chunk_of = (np.asarray(grids.seconds) * positions_per_second // per_chunk).astype(np.int64)
    visual = [int(n) * tokens_per_grid for n in np.bincount(chunk_of)]
    full, rest = divmod(num_audio_tokens, per_chunk)
    audible = [per_chunk] * full + [rest] * (rest > 0)
    length = max(len(visual), len(audible))
    visual += [0] * (length - len(visual))
    audible += [0] * (length - len(audible))
    return list(zip(visual, audible, strict=True))


def interleave_tokens(
    grids: GridTimes,
    *,
    tokens_per_grid: int,
    num_audio_tokens: int,
    positions_per_second: float,
) -> list[tuple[int, int]]:
    """Interleave a video's tokens with those of its sound by time, grid by grid (Qwen3-Omni).

    A grid comes before the first audio token that begins at the grid's time or later, as in
    transformers' ``Qwen3OmniMoeProcessor``.

    Args:
        grids: Times of the temporal grids.
        tokens_per_grid: Visual tokens per grid.
        num_audio_tokens: Audio tokens of the whole sound track.
        positions_per_second: M-RoPE positions per second; an audio token lasts one position.

    Returns:
        Numbers of ``(visual tokens, audio tokens)``: first ``(0, n)`` for the audio before the
        first grid, then one entry per grid.
    """
    # With the factors in this order, evenly spaced grids get the same floats as in transformers.
    positions = np.asarray(grids.seconds, dtype=np.float64) * positions_per_second
    before = np.minimum(np.ceil(positions).astype(np.int64), num_audio_tokens)
    runs = [(0, int(before[0]))]
    ends = [*before[1:].tolist(), num_audio_tokens]
    runs += [(tokens_per_grid, end - int(start)) for start, end in zip(before, ends, strict=True)]
    return runs
