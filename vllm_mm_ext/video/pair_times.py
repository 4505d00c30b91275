"""The times of a video's temporal grids, from the presentation times of its frames.

A video whose frame times are known gets positions by these times. Any other video keeps the times
that vLLM and transformers assume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from vllm_mm_ext.video.grid_times import GridTimes, even_grid, grid_times, step_holds


class TimedFrames(Protocol):
    """Frames whose times may be known."""

    @property
    def times(self) -> Sequence[float] | None:
        """Presentation time of each frame in seconds; None if not known."""

    @property
    def step(self) -> float | None:
        """Nominal seconds between frames sampled on a fixed grid of time from 0; None otherwise."""


def place(
    frames: TimedFrames,
    *,
    num_grids: int,
    temporal_patch: int,
    assumed_step: float,
    exact: bool,
) -> GridTimes | None:
    """Times of a video's grids, or None where the model's own assumption is used.

    Args:
        frames: The video's frames.
        num_grids: Temporal grids that the processor makes of the frames.
        temporal_patch: Frames per grid.
        assumed_step: Seconds between grids that the model assumes.
        exact: Return the times even if the assumption is right to within a frame interval.
    """
    if frames.times is None:
        return None
    times = frames.times
    if math.ceil(len(times) / temporal_patch) != num_grids:
        return None  # The processor has left out frames, so their times are not those given.
    if frames.step is not None:
        # The nominal step, not the real times: a longer version of the clip has the same step.
        return even_grid(num_grids, temporal_patch * frames.step)
    if not exact and step_holds(times, temporal_patch=temporal_patch, assumed_step=assumed_step):
        return None
    return grid_times(times, temporal_patch=temporal_patch, assumed_step=assumed_step)
