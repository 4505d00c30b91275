"""When a video's temporal grids happen, from the real times of its frames.

A video whose frames say when they are gets the positions of those times; any other keeps what vLLM
and transformers assume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from vllm_mm_ext.video.grid_times import GridTimes, even_grid, grid_times, step_holds


class TimedFrames(Protocol):
    """Frames that may know their times."""

    @property
    def times(self) -> Sequence[float] | None:
        """Presentation time of each frame in seconds."""

    @property
    def step(self) -> float | None:
        """Nominal seconds between frames sampled on a fixed grid from 0."""


def place(
    frames: TimedFrames,
    *,
    num_grids: int,
    temporal_patch: int,
    assumed_step: float,
    exact: bool,
) -> GridTimes | None:
    """Times of a video's grids, or None where the model's own assumption stands.

    Args:
        frames: The video's frames.
        num_grids: Grids they make.
        temporal_patch: Frames per grid.
        assumed_step: Seconds between grids that the model assumes.
        exact: Do not keep an assumption that is only right to within a frame interval.
    """
    if frames.times is None:
        return None
    times = frames.times
    if math.ceil(len(times) / temporal_patch) != num_grids:
        return None  # The processor chose among the frames.
    if frames.step is not None:
        # What was meant, not what the clip's frames allowed: a longer clip says the same.
        return even_grid(num_grids, temporal_patch * frames.step)
    if not exact and step_holds(times, temporal_patch=temporal_patch, assumed_step=assumed_step):
        return None
    return grid_times(times, temporal_patch=temporal_patch, assumed_step=assumed_step)
