"""The time of each temporal grid of a video, and how a video's tokens interleave with its sound's.

A video processor groups ``temporal_patch`` consecutive frames into one temporal grid, and each grid
becomes ``tokens_per_grid`` tokens. The Qwen families compute the times of all grids from one number
per video, the seconds between grids. That is right for evenly spaced frames only; of frames chosen
by content each has a time of its own. Pure arithmetic: no torch, no vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
# Frames count as evenly spaced if each is at most this share of the interval away from its even
# place: samplers round to whole source frames. With 2 frames per second of a 23.976 fps clip,
# frames are off by up to 0.08 of the interval.
_EVEN_SHARE = 0.25


@dataclass(frozen=True)
class GridTimes:
    """Times of the temporal grids of one video.

    Attributes:
        seconds: Time of each grid in seconds from the start of the video.
        step: Seconds between grids when they are evenly spaced from 0, else None.
    """

    seconds: tuple[float, ...]
    step: float | None

    @property
    def mean_step(self) -> float:
        """Mean seconds between grids; 0 for a single grid."""
        if self.step is not None:
            return self.step
        if len(self.seconds) < 2:
            return 0.0
        return (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1)

    def temporal_positions(self, positions_per_second: float) -> Positions:
        """Temporal M-RoPE position of each grid, counted from the start of the video.

        Evenly spaced grids: the times are computed in float32 and cut to whole positions, as in
        transformers' ``get_rope_index``. Other grids: the times are rounded to the nearest
        position, and each grid is at least one position after the grid before, since the model
        takes grids at the same position for one moment (Qwen2.5-VL has only two positions per
        second).

        Args:
            positions_per_second: The model's positions per second of video.

        Returns:
            int64 ``[grids]``.
        """
        if self.step is not None:
            index = np.arange(len(self.seconds), dtype=np.float32)
            scaled = index * np.float32(self.step) * np.float32(positions_per_second)
            return scaled.astype(np.int64)
        rounded = np.rint(np.asarray(self.seconds) * positions_per_second).astype(np.int64)
        count = np.arange(len(rounded))
        ascending: Positions = np.maximum.accumulate(rounded - count) + count
        return ascending


def even_grid(num_grids: int, step: float) -> GridTimes:
    """Grids ``step`` seconds apart, the first at 0."""
    return GridTimes(tuple(i * step for i in range(num_grids)), step)


def grid_times(times: Sequence[float], *, temporal_patch: int, assumed_step: float) -> GridTimes:
    """Times of the grids of a video whose frame times are known.

    Args:
        times: Presentation time of each frame in seconds, ascending, at least one.
        temporal_patch: Frames per grid; an incomplete last grid counts as one.
        assumed_step: Seconds between grids, used for a video of a single frame.

    Raises:
        ValueError: ``times`` is empty or not ascending.
    """
    if not times:
        raise ValueError("a video has at least one frame")
    if any(b < a for a, b in pairwise(times)):
        raise ValueError("frame times must ascend")
    num_grids = math.ceil(len(times) / temporal_patch)
    if len(times) == 1:
        return even_grid(num_grids, assumed_step)
    interval = _mean_interval(times)
    if not _is_even(times, interval):
        return GridTimes(tuple(times[i * temporal_patch] for i in range(num_grids)), None)
    # The frame rate is rounded, not the interval: 3 frames per second are one every 0.333333 s.
    rate = float(f"{1 / interval:.9g}")
    return even_grid(num_grids, temporal_patch / rate)


def step_holds(times: Sequence[float], *, temporal_patch: int, assumed_step: float) -> bool:
    """Whether the model's own assumption about the seconds between grids is good enough.

    Model families derive the assumed step from frame counts, which over the whole video is off by
    up to one frame interval. The step is good enough if the frames are evenly spaced and it is off
    by no more than that.

    Args:
        times, temporal_patch: As for ``grid_times``.
        assumed_step: Seconds between grids that the model assumes.
    """
    if len(times) < 2:
        return True
    interval = _mean_interval(times)
    drift = (assumed_step / temporal_patch - interval) * (len(times) - 1)
    return _is_even(times, interval) and abs(drift) <= interval


def _mean_interval(times: Sequence[float]) -> float:
    return (times[-1] - times[0]) / (len(times) - 1)


def _is_even(times: Sequence[float], interval: float) -> bool:
    # If the first frame is later than one interval, a part of the clip was left out.
    if interval <= 0 or times[0] > interval:
        return False
    slack = _EVEN_SHARE * interval
    return all(abs(t - times[0] - i * interval) <= slack for i, t in enumerate(times))


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
    ``1 / positions_per_second`` seconds. For evenly spaced grids the result equals that of
    transformers' ``Qwen2_5OmniProcessor.get_chunked_index``. That function leaves no chunk without
    visual tokens: where grids are further apart than a chunk, a token opens one chunk at most.

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
    if grids.step is not None:
        index = np.repeat(np.arange(len(grids.seconds)), tokens_per_grid)
        visual = _advancing_chunks(index * grids.step * positions_per_second, per_chunk)
    else:
        chunk_of = (np.asarray(grids.seconds) * positions_per_second // per_chunk).astype(np.int64)
        visual = [int(n) * tokens_per_grid for n in np.bincount(chunk_of)]
    full, rest = divmod(num_audio_tokens, per_chunk)
    audible = [per_chunk] * full + [rest] * (rest > 0)
    length = max(len(visual), len(audible))
    visual += [0] * (length - len(visual))
    audible += [0] * (length - len(audible))
    return list(zip(visual, audible, strict=True))


def _advancing_chunks(positions: npt.NDArray[np.float64], per_chunk: int) -> list[int]:
    """Tokens of each chunk, where a token past the end of the last chunk opens just one more.

    Args:
        positions: float64 ``[tokens]`` temporal position of each visual token, ascending.
        per_chunk: Positions of a chunk.
    """
    sizes: list[int] = []
    start = 0
    while True:
        bound = (len(sizes) + 1) * per_chunk
        # The token that opens a chunk belongs to it, even if the token lies past the chunk's end.
        # So the search for the end begins after that token.
        first = 0 if start == 0 else start + 1
        end = first + int(np.searchsorted(positions[first:], bound, side="left"))
        if end >= len(positions):
            sizes.append(len(positions) - start)
            return sizes
        sizes.append(end - start)
        start = end


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
