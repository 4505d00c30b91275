"""Real frame times of videos in the fields of Qwen's processors.

A video whose frames say when they are (``media.payload.SampledFrames.times``) gets the positions of
those times; any other keeps what vLLM and transformers assume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig

from vllm_mm_ext.media.payload import SampledFrames
from vllm_mm_ext.processing.grid_times import GridTimes, grid_times, step_holds

POSITIONS_FIELD = "video_grid_positions"
"""int64 ``[grids]`` per video: temporal position of each grid; empty where vLLM's own apply."""


def frames_of(item: object) -> SampledFrames | None:
    """The sampled frames inside a video item (bare, or beside metadata), if it has them."""
    frames = item[0] if isinstance(item, tuple) else item
    return frames if isinstance(frames, SampledFrames) else None


def place(
    frames: SampledFrames | None,
    *,
    num_grids: int,
    temporal_patch: int,
    assumed_step: float,
    exact: bool,
) -> GridTimes | None:
    """Times of a video's grids, or None where the model's own assumption stands.

    Args:
        frames: The video's frames, if they are sampled frames.
        num_grids: Grids the processor made of them.
        temporal_patch: Frames per grid.
        assumed_step: Seconds between grids that the model assumes.
        exact: Do not keep an assumption that is only right to within a frame interval.
    """
    if frames is None or frames.times is None:
        return None
    times = frames.times
    if math.ceil(len(times) / temporal_patch) != num_grids:
        return None  # The processor chose among the frames.
    if not exact and step_holds(times, temporal_patch=temporal_patch, assumed_step=assumed_step):
        return None
    return grid_times(times, temporal_patch=temporal_patch, assumed_step=assumed_step)


def with_positions_field(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Field configuration of a family with the field of positions added."""
    return {**fields, POSITIONS_FIELD: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}


def assumed_steps(data: Mapping[str, Any]) -> list[float]:
    """Seconds between grids of each video as the processor assumes them."""
    steps = torch.as_tensor(data["second_per_grid_ts"], dtype=torch.float32)
    return [float(step) for step in steps.flatten()]


def write(data: Any, placed: Sequence[GridTimes | None], per_second: float) -> None:
    """Put grid times into the fields of the videos they belong to.

    Args:
        data: The processor's output, one value per video in ``second_per_grid_ts``.
        placed: From ``place``, one per video.
        per_second: M-RoPE positions per second.
    """
    # float32: the model's dtype, to which vLLM casts the field, cannot hold 2/3 of a second.
    data["second_per_grid_ts"] = torch.tensor(
        [
            step if grids is None else grids.mean_step
            for step, grids in zip(assumed_steps(data), placed, strict=True)
        ],
        dtype=torch.float32,
    )
    data[POSITIONS_FIELD] = [
        torch.empty(0, dtype=torch.int64)
        if grids is None
        else torch.from_numpy(grids.temporal_positions(per_second))
        for grids in placed
    ]
