"""Stage 2 of ``adaptive``: which thumbnails to decode."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.sampling.container_profile import Scores
from vllm_mm_ext.media.sampling.timeline import (
    Indices,
    Times,
    gop_starts,
    is_leaf,
    is_reordered,
    shown_at,
)
from vllm_mm_ext.media.types import PacketTable

# Seconds between thumbnails. An event of 0.2 s holds at least one thumbnail, even where a cheaper
# frame up to _EARLIER_S before the intended one is taken.
STRIDE_S = 0.13
_EARLIER_S = 0.07
# The same for P frames and keyframes, which save all B frames: they lie at multiples of the time
# between them, so that three in four moments still have a frame as near as that.
_ANCHOR_S = 0.1
# Thumbnails for each frame to choose, so that there is something to choose from: where the clip is
# short, and where it is so long that not all of it is looked at every STRIDE_S.
_CLOSE, _SPARSE = 8, 4
# Thumbnails of a clip so short that fewer would not show what is usual in it.
_FEWEST = 64
# Most thumbnails, or _SPARSE for each frame if these are more; each costs scaling and a copy
# besides its decoding. Where frames are chosen window by window, the first windows have as many
# together, and later ones LATER_THUMBNAILS for each frame: _SPARSE of these spread over the window,
# as with fewer footage is represented worse, and the others where stage 1 saw most.
MAX_THUMBNAILS = 960
LATER_THUMBNAILS = 6
# Of the thumbnails, those whose frames can be chosen are _SPARSE for each frame to choose, but so
# many at least, evenly spread. With all of them, footage is represented 1 % better.
_FEWEST_ELIGIBLE = 128
# A thumbnail is compared with thumbnails this many seconds before and after it, beyond the ends of
# the events looked for (under a second).
REACH_S = 0.9
# A clip's first and last frame are at most this many seconds from a chosen one.
ENDS_S = 1.0


def plan(packets: PacketTable, score: Scores, count: int, most: int = MAX_THUMBNAILS) -> Indices:
    """Which frames to look at.

    A clip of up to two minutes is looked at all along. In a longer one some frames are spread over
    the clip, keyframes where there are any, and the others are where stage 1 saw most.

    Args:
        packets: The clip's packet table, ``n`` rows, at least one.
        score: float64 ``[n]`` stage-1 score of each frame.
        count: How many frames will be chosen, at least one.
        most: How many to look at, at most, or ``_SPARSE * count`` if these are more.

    Returns:
        int64 ``[k]`` sorted frame indices, ``min(n, count) <= k``. The first frame is among them,
        and one of the last ``ENDS_S`` seconds. To decode them never costs more than one sequential
        decode.
    """
    size, time = len(packets), packets.time
    capacity = min(size, max(most, _SPARSE * count))
    duration = float(time[-1] - time[0])
    stride = min(STRIDE_S, duration / max(_FEWEST, _CLOSE * count))
    steps = size if stride <= 0 else math.ceil(duration / stride)
    if steps >= size <= capacity:
        return np.arange(size)
    if steps < capacity:
        found = np.unique(_cheaper(packets, _shown_evenly(time, steps + 1)))
    else:
        ends = _ends(packets)
        found = np.union1d(_spread(packets, _SPARSE * count - len(ends)), ends)
        found = _dense(packets, score, found, capacity)
    if len(found) < min(capacity, _SPARSE * count):
        # Many frames in little time: evenly spaced moments show few of them.
        found = np.union1d(found, np.linspace(0, size - 1, capacity - len(found), dtype=np.int64))
    return found


def eligible(time: Times, count: int) -> npt.NDArray[np.bool_]:
    """Which of the frames looked at can be chosen, if they show no event.

    The pictures of these are kept until the choice is made, and memory for all pictures would cost
    about as much as decoding them.

    Args:
        time: float64 ``[k]`` times of the frames looked at in seconds, increasing.
        count: How many frames will be chosen.

    Returns:
        bool ``[k]``, true for ``count`` frames at least.
    """
    slots = max(_FEWEST_ELIGIBLE, _SPARSE * count)
    if len(time) <= slots or time[-1] <= time[0]:
        return np.ones(len(time), np.bool_)
    slot = np.floor((time - time[0]) / (time[-1] - time[0]) * slots)
    first = np.diff(slot, prepend=-1.0) > 0
    return first if first.sum() >= count else np.ones(len(time), np.bool_)


def at_least(looked_at: Indices, low: int, high: int, count: int) -> Indices:
    """``looked_at``, and an even choice of frames where ``low`` to ``high`` (exclusive) lack some.

    Returns:
        Sorted frame indices, of which ``min(count, high - low)`` are in ``low..high - 1``.
    """
    count = min(count, high - low)
    if np.count_nonzero((looked_at >= low) & (looked_at < high)) >= count:
        return looked_at
    return np.union1d(looked_at, np.linspace(low, high - 1, count, dtype=np.int64))


def _shown_evenly(time: Times, count: int) -> Indices:
    return shown_at(time, np.linspace(time[0], time[-1], count))


def _ends(packets: PacketTable) -> Indices:
    """The first frame, and of the last ``ENDS_S`` seconds the frame that is cheapest to decode."""
    late = np.flatnonzero(packets.time >= packets.time[-1] - ENDS_S)
    key, reordered = packets.is_key[late], is_reordered(packets)[late]
    return np.array([0, late[np.lexsort((late, reordered, ~key))[0]]], np.int64)


def _spread(packets: PacketTable, count: int) -> Indices:
    """One frame in each of ``count`` equal spans of time: a keyframe, or the one in the middle."""
    time = packets.time
    middles = (np.arange(count) + 0.5) * (time[-1] - time[0]) / count + time[0]
    frames = _cheaper(packets, shown_at(time, middles))
    keys = gop_starts(packets)
    nearest = keys[np.clip(np.searchsorted(time[keys], middles), 0, len(keys) - 1)]
    earlier = keys[np.clip(np.searchsorted(time[keys], middles) - 1, 0, len(keys) - 1)]
    closer = np.abs(time[earlier] - middles) < np.abs(time[nearest] - middles)
    nearest = np.where(closer, earlier, nearest)
    half = (time[-1] - time[0]) / count / 2
    return np.unique(np.where(np.abs(time[nearest] - middles) <= half, nearest, frames))


def _dense(packets: PacketTable, score: Scores, spread: Indices, capacity: int) -> Indices:
    """``spread``, and all along the surroundings of the highest stage-1 scores while they fit."""
    time = packets.time
    looked = np.zeros(len(time), np.bool_)
    looked[spread] = True
    left = capacity - int(looked.sum())
    seen = np.zeros(len(time), np.bool_)
    # All of half an event before and after the peak, and what to compare that with.
    half = REACH_S / 2
    offsets = np.concatenate([[-3 * half], np.arange(-half, half + STRIDE_S, STRIDE_S), [3 * half]])
    for peak in np.argsort(-score, kind="stable").tolist():
        if left <= 0 or score[peak] <= 0:
            break
        if seen[peak]:
            continue
        frames = np.unique(_cheaper(packets, shown_at(time, time[peak] + offsets)))
        low, high = np.searchsorted(time, time[peak] + np.array([-half, half]))
        seen[low : high + 1] = True
        frames = frames[~looked[frames]][:left]
        looked[frames] = True
        left -= len(frames)
    return np.flatnonzero(looked)


def _cheaper(packets: PacketTable, indices: Indices) -> Indices:
    """``indices``, but for a B frame a frame that is hardly earlier and costs less to decode.

    That is the P frame or keyframe before it, as B frames need not be decoded for those. Where
    that is too early, it is the frame before it, if that one is referred to and this one is not.
    """
    time, leaf = packets.time, is_leaf(packets)
    anchor = np.maximum.accumulate(np.where(is_reordered(packets), -1, np.arange(len(time))))
    earlier = np.maximum(anchor[indices], 0)
    before = np.maximum(indices - 1, 0)
    better = leaf[indices] & ~leaf[before] & (time[indices] - time[before] <= _EARLIER_S)
    found = np.where(better, before, indices)
    return np.where(time[indices] - time[earlier] <= _ANCHOR_S, earlier, found)
