"""Arithmetic on a clip's timeline: how many frames to take, which one is on screen at a moment."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.types import MediaInfo, PacketTable, SamplingSpec

Indices = npt.NDArray[np.int64]
Times = npt.NDArray[np.float64]


def target_count(info: MediaInfo, spec: SamplingSpec) -> int:
    """How many frames a policy should choose.

    That is ``floor(duration * fps)``, for ``keyframe`` the number of the clip's keyframes, kept
    within ``min_frames``..``max_frames`` and the frames that the clip has, then rounded down
    to ``multiple_of`` (but not to 0: a smaller number becomes ``multiple_of`` where ``max_frames``
    and the clip allow that many).
    """
    assert info.video is not None
    most = min(info.video.num_frames, spec.max_frames)
    by_keyframes = spec.policy == "keyframe"
    asked = info.video.num_keyframes if by_keyframes else asked_count(info, spec)
    count = min(most, max(spec.min_frames, asked, 1))
    rounded = count - count % spec.multiple_of
    return rounded or min(most, spec.multiple_of)


def is_unbound(info: MediaInfo, spec: SamplingSpec) -> bool:
    """True when the frames asked for by ``fps`` are within ``min_frames``..``max_frames``.

    A policy then chooses the frame for a moment by what is before that moment alone, so that a
    longer version of the clip gets the same leading frames.
    """
    asked = asked_count(info, spec)
    return max(spec.min_frames, spec.multiple_of) <= asked <= spec.max_frames


def asked_count(info: MediaInfo, spec: SamplingSpec) -> int:
    """How many frames ``fps`` asks for, whatever ``min_frames`` and ``max_frames`` say."""
    # A clip of exactly k seconds must not lose a frame to rounding in its timestamps.
    return math.floor(clip_duration(info) * spec.fps + 1e-6)


def clip_duration(info: MediaInfo) -> float:
    """Seconds of video; with a packet table, no less than the last frame's time."""
    assert info.video is not None
    table = info.packets
    last = float(table.time[-1]) if table is not None and len(table) else 0.0
    return max(info.video.duration, last)


def rounding(packets: PacketTable) -> float:
    """Seconds by which a frame may be shown before its time: half a unit of the container's clock.

    A clock whose unit is about the distance of frames counts frames, so its times are exact.
    """
    gap = float(np.median(np.diff(packets.time))) if len(packets) > 1 else 0.0
    half = 0.5 * packets.time_base
    return max(1e-6, half) if half < 0.2 * gap else 1e-6


def shown_at(time: Times, moments: Times, early: float = 1e-6) -> Indices:
    """Frame on screen at each moment: the last one at or before it, give or take a microsecond.

    Args:
        time: float64 ``[n]``, non-decreasing, seconds; the first frame is on screen before its
            time, too.
        moments: float64 ``[k]`` seconds.
        early: Seconds by which a frame counts as shown before its time; see ``rounding``.
    """
    found = np.searchsorted(time, moments + early, side="right") - 1
    return np.asarray(np.maximum(found, 0), np.int64)


def is_even(time: Times) -> bool:
    """True when frames are evenly spaced, up to the rounding of timestamps (half a gap)."""
    if len(time) < 3:
        return True
    line = np.linspace(time[0], time[-1], len(time))
    return bool(np.abs(time - line).max() < 0.5 * (time[-1] - time[0]) / (len(time) - 1))


def spread(time: Times, count: int) -> Indices:
    """``count`` distinct positions in ``time``, evenly spaced on time, first and last included.

    Each position is that of the frame on screen at an evenly spaced moment. On an even timeline
    the result is ``numpy.linspace`` over the positions, as in vLLM's own video loaders.

    Args:
        time: float64 ``[n]``, non-decreasing, seconds.
        count: How many positions, 1 to ``n``.
    """
    size = len(time)
    if is_even(time):
        return np.linspace(0, size - 1, count, dtype=np.int64)
    wanted = np.linspace(time[0], time[-1], count)
    tolerance = 1e-6 * max(1.0, time[-1] - time[0])
    return distinct(np.searchsorted(time, wanted + tolerance, side="right") - 1, size)


def distinct(positions: Indices, size: int) -> Indices:
    """Sorted ``positions`` moved as little as needed to be strictly increasing in ``0..size-1``.

    Args:
        positions: int64 ``[k]``, non-decreasing, ``k <= size``.
        size: Number of positions there are.
    """
    step = np.arange(len(positions))
    forward = np.maximum.accumulate(positions - step) + step
    capacity = size - len(positions)
    return np.asarray(np.minimum(forward - step, capacity) + step, np.int64)


def second_of(time: Times) -> npt.NDArray[np.int64]:
    """Whole second each time falls into (a frame at 2.9999999 s belongs to second 3)."""
    return np.asarray(np.floor(time + 1e-6), np.int64)


def is_leaf(packets: PacketTable) -> npt.NDArray[np.bool_]:
    """bool ``[n]``: B frames that no other frame refers to (leaves).

    A leaf is decoded after both its neighbours, in B pyramids as with single B frames. Other frames
    that nothing refers to are not recognised.
    """
    order = packets.order
    leaf = np.zeros(len(order), np.bool_)
    leaf[1:-1] = (order[1:-1] > order[:-2]) & (order[1:-1] > order[2:])
    return leaf


def is_reordered(packets: PacketTable) -> npt.NDArray[np.bool_]:
    """bool ``[n]``: B frames, decoded after a frame that is shown later."""
    later = np.minimum.accumulate(packets.order[::-1])[::-1]
    return np.asarray(packets.order > later)


def gop_starts(packets: PacketTable) -> Indices:
    """int64 ``[g]`` index of the first frame of each GOP; the first is always 0."""
    starts = np.flatnonzero(packets.is_key).astype(np.int64)
    return starts if len(starts) and starts[0] == 0 else np.concatenate([[0], starts])
