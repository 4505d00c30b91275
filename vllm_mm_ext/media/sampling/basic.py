"""The policies that need no look at the content: uniform, keyframe and explicit."""

from __future__ import annotations

import itertools
from heapq import heappop, heappush

import numpy as np

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.sampling.timeline import (
    Indices,
    Times,
    asked_count,
    is_unbound,
    rounding,
    shown_at,
    spread,
    target_count,
)
from vllm_mm_ext.media.types import FrameSelection, MediaInfo, PacketTable, SamplingSpec


def select_uniform(info: MediaInfo, spec: SamplingSpec) -> FrameSelection:
    """Frames on a fixed grid of time, or spread evenly where a budget binds.

    While ``fps`` asks for no more than ``max_frames`` and no fewer than ``min_frames``, frame k of
    the selection is the one on screen at k / fps, whatever the length of the clip. A frame on
    screen at several of these moments is taken once. Otherwise the frames are evenly spaced from
    the first frame of the clip to the last; so they are where fewer than ``min_frames`` or
    ``multiple_of`` different frames are on screen at these moments.
    """
    packets = _packets(info)
    if is_unbound(info, spec):
        indices, step = _on_grid(info, packets, spec)
        if len(indices) >= _least(packets, spec):
            return FrameSelection("uniform", indices, packets.time[indices], step=step)
    indices = spread(packets.time, target_count(info, spec))
    return FrameSelection("uniform", indices, packets.time[indices])


def _on_grid(
    info: MediaInfo, packets: PacketTable, spec: SamplingSpec
) -> tuple[Indices, float | None]:
    """Frames on screen at k / fps, and the seconds between them (see ``FrameSelection.step``)."""
    moments = np.arange(asked_count(info, spec)) / spec.fps
    shown = shown_at(packets.time, moments, rounding(packets))
    indices = np.unique(shown)
    assert info.video is not None
    step: float | None = None
    if len(indices) == len(shown):
        step = 1.0 / spec.fps
    elif len(indices) == int(indices[-1]) + 1 and not info.video.is_vfr and info.video.fps > 0:
        # The clip has fewer frames per second than asked for, and all of them are taken.
        step = 1.0 / info.video.fps
    return indices[: len(indices) - len(indices) % spec.multiple_of], step


def _least(packets: PacketTable, spec: SamplingSpec) -> int:
    """Frames a selection must have: ``min_frames`` or all the clip has, and at least one."""
    least = min(spec.min_frames, len(packets))
    return max(1, least - least % spec.multiple_of)


def select_keyframe(info: MediaInfo, spec: SamplingSpec) -> FrameSelection:
    """Keyframes, thinned evenly on time to ``max_frames`` or filled up to ``min_frames``.

    The number of frames does not follow ``fps``: it is the clip's number of keyframes, kept within
    ``min_frames``..``max_frames`` and rounded down to ``multiple_of`` as for the other policies.
    """
    packets = _packets(info)
    keys = np.flatnonzero(packets.is_key).astype(np.int64)
    count = target_count(info, spec)
    if count <= len(keys) <= spec.max_frames:
        # Rounding takes from the end: a longer clip keeps its leading keyframes.
        indices = keys[:count]
    elif len(keys) >= count:
        indices = keys[spread(packets.time[keys], count)]
    else:
        indices = _fill_up(packets.time, keys, count)
    return FrameSelection("keyframe", indices, packets.time[indices])


def select_explicit(info: MediaInfo, spec: SamplingSpec) -> FrameSelection:
    """The frames asked for.

    Raises:
        MediaError: There are no indices, more than ``max_frames``, unsorted ones, or some outside
            the clip.
    """
    packets = _packets(info)
    indices = np.array(spec.indices or (), np.int64)
    if not len(indices):
        raise MediaError("explicit sampling needs at least one frame index", parameter="indices")
    if len(indices) > spec.max_frames:
        raise MediaError(
            f"{len(indices)} frames asked for, the limit is {spec.max_frames}",
            parameter="indices",
            value=len(indices),
        )
    if (np.diff(indices) < 0).any():
        raise MediaError("frame indices must be sorted", parameter="indices")
    low, high = int(indices[0]), int(indices[-1])
    if low < 0 or high >= len(packets):
        raise MediaError(
            f"frame indices must be 0 to {len(packets) - 1}, got {low} to {high}",
            parameter="indices",
            value=low if low < 0 else high,
        )
    return FrameSelection("explicit", indices, packets.time[indices])


def _packets(info: MediaInfo) -> PacketTable:
    assert info.packets is not None
    return info.packets


def _fill_up(time: Times, keys: Indices, count: int) -> Indices:
    """Add frames in the middle of the widest gaps until there are ``count`` frames."""
    chosen, last = keys.tolist() or [0], len(time) - 1
    # The widest gap first; of equal ones that with the most frames, then the earliest.
    gaps: list[tuple[float, int, int, int]] = []

    def add(low: int, high: int) -> None:
        if high - low > 1:
            heappush(gaps, (time[max(low, 0)] - time[min(high, last)], low - high, low, high))

    for low, high in itertools.pairwise([-1, *chosen, len(time)]):
        add(low, high)
    while len(chosen) < count:
        *_, low, high = heappop(gaps)
        moment = (time[max(low, 0)] + time[min(high, last)]) / 2
        middle = int(np.searchsorted(time, moment, side="right")) - 1
        middle = min(max(middle, low + 1), high - 1)
        chosen.append(middle)
        add(low, middle)
        add(middle, high)
    return np.array(sorted(chosen), np.int64)
