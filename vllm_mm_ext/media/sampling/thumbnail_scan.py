"""Stage 2 of ``adaptive``: which thumbnails to decode, and what they show for a short time only."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.sampling.container_profile import Scores, baseline
from vllm_mm_ext.media.sampling.coverage import Event
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
# Most thumbnails of one window, or _SPARSE for each frame if these are more; each costs scaling and
# a copy besides its decoding.
MAX_THUMBNAILS = 960
# Of the thumbnails, those whose frames can be chosen are _SPARSE for each frame to choose, but so
# many at least, evenly spread. With all of them, footage is represented 1 % better.
_FEWEST_ELIGIBLE = 128
# A thumbnail is compared with thumbnails this many seconds before and after it, beyond the ends of
# the events looked for (under a second).
_REACH_S = 0.9
# Pixels by which something moves from one thumbnail to the next, at most, to count as moving: a
# picture's width in two seconds. What is faster, or was not there, appears.
_STEP = 4
# Comparisons needed to know what is usual in a clip.
FEWEST = 32
# Comparisons before and after a thumbnail that show what is usual there: of a long clip of many
# scenes, each scene has its own noise.
_AROUND = 128
# Changes below this many grey levels (of 255) are noise of sensor and coding: of a few pixels, and
# of a whole frame's mean.
_LOCAL_FLOOR = 3.0
_GLOBAL_FLOOR = 1.0
# So many pixels are enough for an event.
_FEW_PIXELS = 4
# What counts of a pixel's change as usual there, at most: what an event shows is not usual.
_MOST_USUAL = 16.0


def plan(packets: PacketTable, score: Scores, count: int) -> Indices:
    """Which frames to look at.

    A clip of up to two minutes is looked at all along. In a longer one some frames are spread over
    the clip, keyframes where there are any, and the others are where stage 1 saw most.

    Args:
        packets: The clip's packet table, ``n`` rows.
        score: float64 ``[n]`` stage-1 score of each frame.
        count: How many frames will be chosen.

    Returns:
        int64 ``[k]`` sorted frame indices, ``count <= k``, and ``k`` at most ``MAX_THUMBNAILS`` or
        ``_SPARSE * count``. To decode them never costs more than one sequential decode.
    """
    size, time = len(packets), packets.time
    capacity = min(size, max(MAX_THUMBNAILS, _SPARSE * count))
    duration = float(time[-1] - time[0])
    stride = min(STRIDE_S, duration / (_CLOSE * count))
    steps = size if stride <= 0 else math.ceil(duration / stride)
    if steps >= size <= capacity:
        return np.arange(size)
    if steps < capacity:
        found = np.unique(_cheaper(packets, _shown_evenly(time, steps + 1)))
    else:
        found = _spread(packets, _SPARSE * count)
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


def _shown_evenly(time: Times, count: int) -> Indices:
    return shown_at(time, np.linspace(time[0], time[-1], count))


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
    half = _REACH_S / 2
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


def events(transient: Scores, count: int) -> list[Event]:
    """What the thumbnails show for a short time only.

    The highest of k values of normal noise is about ``sqrt(2 ln k)`` deviations. A score that
    chance reaches once among all thumbnails makes an event of strength 1. Lower scores make weaker
    events, down to what chance reaches ``count`` times. An event goes on while the score is at
    least half of its highest.

    Args:
        transient: float64 ``[k]`` from ``motion_score``.
        count: How many frames will be chosen.

    Returns:
        The events, strongest first, none of which overlap.
    """
    score = np.nan_to_num(transient)
    known = max(2, int(np.isfinite(transient).sum()))
    once = math.sqrt(2.0 * math.log(known))
    least = math.sqrt(2.0 * math.log(max(2.0, known / count)))
    free = np.ones(len(score) + 2, np.bool_)
    free[[0, -1]] = False
    found: list[Event] = []
    for peak in np.argsort(-score, kind="stable").tolist():
        if score[peak] <= least:
            break
        if not free[peak + 1]:
            continue
        first = last = peak
        while free[first] and score[first - 1] >= score[peak] / 2:
            first -= 1
        while free[last + 2] and score[last + 1] >= score[peak] / 2:
            last += 1
        free[first + 1 : last + 2] = False
        found.append(Event(first, last, float(score[peak]) / once))
    return found


def motion_score(
    thumbnails: npt.NDArray[np.uint8], time: npt.NDArray[np.float64]
) -> tuple[Scores, Scores]:
    """Score thumbnails by how much each shows that is there neither before nor after it.

    Args:
        thumbnails: uint8 gray ``[k, h, w]``.
        time: float64 ``[k]`` times of the thumbnails in seconds, increasing.

    Returns:
        ``(motion, transient)``, float64 ``[k]`` each. ``motion`` is the mean absolute pixel
        difference from the thumbnail before, divided by 255, after a fit of gain and offset that
        takes out fades and flicker. ``transient`` counts the robust deviations of a thumbnail from
        those before and after it (about 0 to 3 is usual), with what moves and without; NaN where it
        is not known: where there is none before or after it, or where fewer than ``FEWEST`` have
        both.
    """
    count = len(thumbnails)
    motion, transient = np.zeros(count), np.full(count, np.nan)
    if count < 3:
        return motion, transient
    frames = _smooth(thumbnails.astype(np.float32))
    flat = frames.reshape(count, -1)
    motion[1:] = np.abs(_unexplained(flat[1:], flat[:-1])).mean(axis=1) / 255.0
    before = np.searchsorted(time, time - _REACH_S + 1e-6, side="right") - 1
    after = np.searchsorted(time, time + _REACH_S - 1e-6)
    known = (before >= 0) & (after < count)
    known &= time - time[np.maximum(before, 0)] < 2 * _REACH_S
    known &= time[np.minimum(after, count - 1)] - time < 2 * _REACH_S
    rows = np.flatnonzero(known)
    if len(rows) < FEWEST:
        return motion, transient
    came_and_went = _came_and_went(frames, time).reshape(count, -1)
    local, appeared, brightness = np.zeros((3, len(rows)))
    # Equal parts: of a few thumbnails at the end, nothing would be usual.
    for at in np.array_split(np.arange(len(rows)), math.ceil(len(rows) / 256)):
        part = rows[at]
        here, back, ahead = flat[part], flat[before[part]], flat[after[part]]
        new = np.minimum(np.abs(_unexplained(here, back)), np.abs(_unexplained(here, ahead)))
        local[at] = _strongest(new)
        appeared[at] = _strongest(np.minimum(new, came_and_went[part]))
        rise, fall = (here - back).mean(axis=1), (here - ahead).mean(axis=1)
        agree = rise * fall > 0
        brightness[at] = np.where(agree, np.minimum(np.abs(rise), np.abs(fall)), 0.0)
    # What is close to others like it may count as moving: the first of these shows it all the same.
    scores = [_deviations(values, _LOCAL_FLOOR) for values in (local, appeared)]
    transient[rows] = np.maximum.reduce([*scores, _deviations(brightness, _GLOBAL_FLOOR)])
    return motion, transient


def _strongest(new: npt.NDArray[np.float32]) -> Scores:
    """What the pixels that changed most have changed by; changes ``[k, p]`` in grey levels."""
    # Where something moves all the time, a change says less than where nothing does.
    weighed = new / (1.0 + np.minimum(new, _MOST_USUAL).mean(axis=0) / _LOCAL_FLOOR)
    rows, most = np.arange(len(new)), min(_FEW_PIXELS, new.shape[1])
    total = np.zeros(len(new))
    for _ in range(most):  # A partition takes several times as long where many are equal.
        largest = weighed.argmax(axis=1)
        total += weighed[rows, largest]
        weighed[rows, largest] = -1.0
    return np.asarray(total / most, np.float64)


def _came_and_went(
    frames: npt.NDArray[np.float32], time: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """How much appeared at each place shortly before, and disappears there shortly after.

    What moves passes a place as quickly as an event does. But it was close by in the thumbnail
    before, and is close by in the next one.

    Args:
        frames: float32 ``[k, h, w]`` smooth thumbnails in grey levels.
        time: float64 ``[k]`` seconds.

    Returns:
        uint8 ``[k, h, w]`` grey levels.
    """
    # Time last: the shifts below are of long rows then.
    levels = np.ascontiguousarray(np.rint(frames).astype(np.uint8).transpose(1, 2, 0))
    low, high = levels, levels
    for axis in (0, 1):
        padding = [(_STEP, _STEP) if axis == number else (0, 0) for number in range(3)]
        low = _picked(np.pad(low, padding, mode="edge"), 2 * _STEP + 1, axis, np.minimum)
        high = _picked(np.pad(high, padding, mode="edge"), 2 * _STEP + 1, axis, np.maximum)
    near = max(1, math.ceil(_REACH_S / max(1e-3, float(np.median(np.diff(time))))) - 1)
    # All of the first thumbnail has appeared, and all of the last one disappears.
    came, went = np.zeros((2, *levels.shape[:2], near + len(frames)), np.uint8)
    came[..., near], went[..., -1 - near] = 255, 255
    came[..., near + 1 :] = _outside(levels[..., 1:], low[..., :-1], high[..., :-1])
    went[..., : -1 - near] = _outside(levels[..., :-1], low[..., 1:], high[..., 1:])
    both = np.minimum(*(_picked(values, near + 1, 2, np.maximum) for values in (came, went)))
    return np.ascontiguousarray(both.transpose(2, 0, 1))


def _picked(
    values: npt.NDArray[np.uint8], length: int, axis: int, pick: np.ufunc
) -> npt.NDArray[np.uint8]:
    """The least or largest of each ``length`` values in a row along an axis."""
    done = 1
    while done < length:
        step = min(done, length - done)
        later, earlier = [slice(None)] * 3, [slice(None)] * 3
        later[axis], earlier[axis] = slice(step, None), slice(-step)
        values = pick(values[tuple(later)], values[tuple(earlier)])
        done += step
    return values


def _outside(
    values: npt.NDArray[np.uint8], low: npt.NDArray[np.uint8], high: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """How far values are from the nearest of ``low`` to ``high``."""
    return np.asarray(np.maximum(np.maximum(values, high) - high, low - np.minimum(values, low)))


def pixels(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Thumbnails at half their size, float32 ``[k, p]`` in grey levels."""
    return _smooth(thumbnails.astype(np.float32))[:, ::2, ::2].reshape(len(thumbnails), -1)


def _smooth(frames: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """2x2 box filter, which halves the sensor noise that the reduction in size has left."""
    if frames.shape[1] < 2 or frames.shape[2] < 2:
        return frames
    rows = frames[:, 1:] + frames[:, :-1]
    return np.asarray((rows[:, :, 1:] + rows[:, :, :-1]) / 4, np.float32)


def _unexplained(
    frames: npt.NDArray[np.float32], references: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """What a gain and an offset on its reference do not explain of each frame; all ``[k, p]``."""
    frame = frames - frames.mean(axis=1, keepdims=True)
    reference = references - references.mean(axis=1, keepdims=True)
    energy = (reference * reference).sum(axis=1, keepdims=True)
    gain = (frame * reference).sum(axis=1, keepdims=True) / np.maximum(energy, 1e-3)
    # A gain far from 1 means another picture, not a dimmed one; then none is applied.
    gain = np.where((gain > 0.4) & (gain < 2.5), gain, 1.0)
    return np.asarray(frame - gain * reference, np.float32)


def _deviations(values: Scores, floor: float) -> Scores:
    """How many standard deviations each value is above the median around it, at least 0.

    The standard deviation is taken from the 90 % quantile (1.28 deviations above the median of
    normal noise), as flicker and steady motion widen the upper side alone. It is at least
    ``floor``.
    """
    middle, upper = baseline(values, _AROUND, (0.5, 0.9))
    return np.asarray(
        np.maximum(0.0, (values - middle) / np.maximum((upper - middle) / 1.28, floor))
    )
