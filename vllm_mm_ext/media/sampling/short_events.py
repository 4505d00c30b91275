"""Stage 2 of ``adaptive``: what thumbnails show for a short time only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.sampling.container_profile import Scores, baseline
from vllm_mm_ext.media.sampling.coverage import Event
from vllm_mm_ext.media.sampling.thumbnail_planes import Planes
from vllm_mm_ext.media.sampling.thumbnail_scan import REACH_S
from vllm_mm_ext.media.sampling.timeline import Indices, Times

# Pixels by which something moves from one thumbnail to the next, at most, to count as moving: a
# picture's width in two seconds. What is faster, or was not there, appears.
_STEP = 4
# At the ends of a clip, where nothing is known REACH_S away, a thumbnail is compared with the first
# or last one if that is at least so many seconds away.
_LEAST_REACH_S = 0.3
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


def motion_score(seen: Planes, time: Times, until: Times) -> tuple[Scores, Scores]:
    """Score thumbnails by how much each shows that is there neither before nor after it.

    Brightness and colours count alike: what appears may be as bright as what it hides.

    Args:
        seen: The ``planes`` of ``k`` thumbnails.
        time: float64 ``[k]`` times of the thumbnails in seconds, increasing.
        until: float64 ``[k]`` seconds until when each picture is on screen.

    Returns:
        ``(motion, transient)``, float64 ``[k]`` each. ``motion`` is the mean absolute pixel
        difference from the thumbnail before, divided by 255, after a fit of gain and offset that
        takes out fades and flicker. ``transient`` counts the robust deviations of a thumbnail from
        those before and after it (about 0 to 3 is usual), with what moves and without; NaN where it
        is not known: where there is none before or after it, or where fewer than ``FEWEST`` have
        both. A picture on screen for longer is before or after itself, and scores 0.
    """
    count = len(time)
    motion, transient = np.zeros(count), np.full(count, np.nan)
    if count < 3:
        return motion, transient
    before, after = _references(time, until)
    rows = np.flatnonzero((before >= 0) & (after < count))
    enough = len(rows) >= FEWEST
    changes = np.zeros((3, len(rows)))
    for plane in seen:
        centred = _Centred.of(plane)
        moved = centred.unexplained(np.arange(1, count), np.arange(count - 1))
        motion[1:] = np.maximum(motion[1:], np.abs(moved).mean(axis=1) / 255.0)
        if enough:
            scale = plane.shape[2] / seen[0].shape[2]
            found = _changes(plane, centred, time, (rows, before[rows], after[rows]), scale)
            changes = np.maximum(changes, found)
    if enough:
        # What is close to others like it may count as moving: the first of these shows it all the
        # same.
        floors = (_LOCAL_FLOOR, _LOCAL_FLOOR, _GLOBAL_FLOOR)
        scores = [_deviations(*pair) for pair in zip(changes, floors, strict=True)]
        transient[rows] = np.maximum.reduce(scores)
    return motion, transient


def _references(time: Times, until: Times) -> tuple[Indices, Indices]:
    """The thumbnails ``REACH_S`` before and after each one, -1 and ``k`` where there are none."""
    count = len(time)
    before = np.searchsorted(time, time - REACH_S + 1e-6, side="right") - 1
    at_start = (before < 0) & (time - time[0] >= _LEAST_REACH_S)
    before = np.where(at_start, 0, before)
    before[time - until[np.maximum(before, 0)] >= 2 * REACH_S] = -1
    after = np.searchsorted(time, time + REACH_S - 1e-6)
    # Where the next one is too late, the picture on screen then may be one that was looked at.
    late = (after == count) | (time[np.minimum(after, count - 1)] - time >= 2 * REACH_S)
    shown = until[after - 1] >= time + REACH_S - 1e-6
    at_end = (after == count) & (time[-1] - time >= _LEAST_REACH_S)
    after[late] = np.where(shown | at_end, after - 1, count)[late]
    return before, after


@dataclass(frozen=True, eq=False)
class _Centred:
    """One plane of ``k`` thumbnails of ``p`` pixels.

    Attributes:
        mean: float32 ``[k]`` levels.
        less: float32 ``[k, p]`` the pixels less that.
        energy: float32 ``[k]`` the sum of their squares.
    """

    mean: npt.NDArray[np.float32]
    less: npt.NDArray[np.float32]
    energy: npt.NDArray[np.float32]

    @classmethod
    def of(cls, plane: npt.NDArray[np.float32]) -> _Centred:
        flat = plane.reshape(len(plane), -1)
        mean = flat.mean(axis=1)
        less = flat - mean[:, None]
        return cls(mean, less, np.einsum("kp,kp->k", less, less))

    def unexplained(self, rows: Indices, references: Indices) -> npt.NDArray[np.float32]:
        """What a gain and an offset on its reference do not explain of each thumbnail."""
        frame, reference = self.less[rows], self.less[references]
        product = np.einsum("kp,kp->k", frame, reference)
        gain = product / np.maximum(self.energy[references], 1e-3)
        # A gain far from 1 means another picture, not a dimmed one; then none is applied.
        gain = np.where((gain > 0.4) & (gain < 2.5), gain, np.float32(1))
        reference *= gain[:, None]
        return np.asarray(frame - reference, np.float32)


def _changes(
    plane: npt.NDArray[np.float32],
    centred: _Centred,
    time: npt.NDArray[np.float64],
    compared: tuple[Indices, Indices, Indices],
    scale: float,
) -> npt.NDArray[np.float64]:
    """How much thumbnails differ from before and from after, in one plane.

    Args:
        plane, centred: float32 ``[k, h, w]`` levels.
        time: float64 ``[k]`` seconds.
        compared: Which ``n`` of them, and which ones to compare each with.
        scale: Pixels of the plane for each pixel of luma along a side.

    Returns:
        float64 ``[3, n]`` levels: at a few pixels; the same without what was close by before or
        after; and of the mean.
    """
    few = max(1, round(_FEW_PIXELS * scale**2))
    came_and_went = _came_and_went(plane, time, max(1, round(_STEP * scale)))
    came_and_went = came_and_went.reshape(len(plane), -1)
    found = np.zeros((3, len(compared[0])))
    # Equal parts: of a few thumbnails at the end, nothing would be usual.
    for at in np.array_split(np.arange(found.shape[1]), math.ceil(found.shape[1] / 256)):
        here, back, ahead = (rows[at] for rows in compared)
        new = np.abs(centred.unexplained(here, back))
        np.minimum(new, np.abs(centred.unexplained(here, ahead)), out=new)
        rise, fall = (centred.mean[here] - centred.mean[other] for other in (back, ahead))
        level = np.where(rise * fall > 0, np.minimum(np.abs(rise), np.abs(fall)), 0.0)
        found[:, at] = (
            _strongest(new, few),
            _strongest(np.minimum(new, came_and_went[here]), few),
            level,
        )
    return found


def _strongest(new: npt.NDArray[np.float32], few: int) -> Scores:
    """What the pixels that changed most have changed by; changes ``[k, p]`` in levels."""
    # Where something moves all the time, a change says less than where nothing does.
    weighed = new / (1.0 + np.minimum(new, _MOST_USUAL).mean(axis=0) / _LOCAL_FLOOR)
    rows, most = np.arange(len(new)), min(few, new.shape[1])
    total = np.zeros(len(new))
    for _ in range(most):  # A partition takes several times as long where many are equal.
        largest = weighed.argmax(axis=1)
        total += weighed[rows, largest]
        weighed[rows, largest] = -1.0
    return np.asarray(total / most, np.float64)


def _came_and_went(
    frames: npt.NDArray[np.float32], time: npt.NDArray[np.float64], step: int
) -> npt.NDArray[np.uint8]:
    """How much appeared at each place shortly before, and disappears there shortly after.

    What moves passes a place as quickly as an event does. But it was close by in the thumbnail
    before, and is close by in the next one.

    Args:
        frames: float32 ``[k, h, w]`` levels.
        time: float64 ``[k]`` seconds.
        step: How many pixels are close by.

    Returns:
        uint8 ``[k, h, w]`` levels.
    """
    # Time last: the shifts below are of long rows then.
    levels = np.ascontiguousarray(np.rint(frames).astype(np.uint8).transpose(1, 2, 0))
    low, high = levels, levels
    for axis in (0, 1):
        padding = [(step, step) if axis == number else (0, 0) for number in range(3)]
        low = _picked(np.pad(low, padding, mode="edge"), 2 * step + 1, axis, np.minimum)
        high = _picked(np.pad(high, padding, mode="edge"), 2 * step + 1, axis, np.maximum)
    near = max(1, math.ceil(REACH_S / max(1e-3, float(np.median(np.diff(time))))) - 1)
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
