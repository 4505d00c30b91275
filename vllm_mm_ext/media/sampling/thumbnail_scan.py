"""Stage 2 of ``adaptive``: decode thumbnails where that is cheap, and score what they show.

To show one frame a decoder must decode everything from the frame's keyframe on. So stage 2 pays for
a *prefix* of a GOP, and takes thumbnails all along the prefix.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.sampling.container_profile import Scores
from vllm_mm_ext.media.sampling.timeline import (
    Indices,
    decode_cost,
    decode_weight,
    gop_starts,
    is_leaf,
)
from vllm_mm_ext.media.types import PacketTable

# Seconds between thumbnails. An event of 0.2 s holds at least one thumbnail, even where a cheaper
# frame up to _EARLIER_S before the intended one is taken.
STRIDE_S = 0.13
_EARLIER_S = 0.07
# Most thumbnails of one window; each costs scaling and a copy besides its decoding.
MAX_THUMBNAILS = 960
# Frames that stage 2 may decode, as a share of the clip: what the final selection leaves of one
# full sequential decode, but at least the smaller share.
_FULL_DECODE = 1.0
_LEAST_DECODE = 0.12
# A thumbnail is compared with thumbnails this many seconds before and after it, beyond the ends of
# the events looked for (under a second).
_REACH_S = 0.9
# Comparisons needed to know what is usual in a clip, and in a window of a clip.
FEWEST = 48
FEWEST_IN_WINDOW = 32
# Changes below this many grey levels (of 255) are noise of sensor and coding: of a few pixels, and
# of a whole frame's mean.
_LOCAL_FLOOR = 2.0
_GLOBAL_FLOOR = 1.0


def decode_allowance(packets: PacketTable, chosen: Indices) -> float:
    """How many frames stage 2 may decode.

    Stage 2 gets what the final frames leave of one sequential decode of the clip, so that both
    together cost about one such decode, and at least ``_LEAST_DECODE`` of the clip.

    Args:
        packets: The clip's packet table.
        chosen: int64 ``[k]`` sorted indices of frames that cost about as much as the final ones.
    """
    count = len(packets)
    left = _FULL_DECODE * count - decode_cost(packets, chosen)
    return max(_LEAST_DECODE * count, left)


def plan(packets: PacketTable, score: Scores, allowance: float, lead_in: float = 0.0) -> Indices:
    """Which frames to look at: the GOP prefixes that promise most per decoded frame.

    Args:
        packets: The clip's packet table, ``n`` rows.
        score: float64 ``[n]`` stage-1 score of each frame.
        allowance: Decoded frames that may be spent in all, as ``decode_cost`` counts them.
        lead_in: Decoded frames that it takes to get to the first row, where that is no keyframe;
            with infinity no frame of the first GOP is looked at.

    Returns:
        int64 ``[k]`` sorted frame indices, ``k <= MAX_THUMBNAILS``, whose ``decode_cost`` is at
        most ``allowance``. Where stage 1 sees nothing they spread over the clip.
    """
    duration = float(packets.time[-1] - packets.time[0])
    steps = max(1, round(duration / STRIDE_S))
    moments = packets.time[0] + np.arange(steps + 1) * (duration / steps)
    shown = np.searchsorted(packets.time, moments + 1e-6, side="right") - 1
    grid = np.unique(_cheaper(packets, shown))
    weight = decode_weight(packets)
    total = np.concatenate([[0.0], np.cumsum(weight)])
    # Decoded frames spent when a prefix ends with each frame of the grid, counted from the start of
    # the clip.
    extra = np.cumsum(1.0 - weight[grid])
    spent = total[grid + 1] + extra
    starts = gop_starts(packets)
    gop = np.searchsorted(starts, grid, side="right") - 1
    opening = total[starts[gop]] + extra - (1.0 - weight[grid])
    opening[gop == 0] -= lead_in
    # The highest stage-1 score since the last frame of the grid, squared. The constant makes frames
    # count of which stage 1 says nothing.
    value = np.maximum.reduceat(score, grid) ** 2 + 1.0
    # A thumbnail can be scored only if the thumbnails _REACH_S after it are decoded too.
    delay = round(_REACH_S / STRIDE_S) + 1
    options: list[tuple[float, float, int, int]] = []
    edges = np.flatnonzero(np.diff(gop, prepend=-1, append=len(starts)))
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        price = spent[first:last] - opening[first]
        last = first + int(np.searchsorted(price, allowance, side="right"))
        if last == first:
            continue
        price = price[: last - first]
        gain = np.cumsum(value[first:last])
        gain[:-1] = np.concatenate([np.zeros(delay), gain])[: last - first - 1]
        gain /= price
        # Among GOPs of equal gain, multiples of the golden ratio give an order that visits all
        # parts of the clip evenly.
        order = (int(gop[first]) * 0.6180339887) % 1.0
        options.append((-float(gain.max()), order, first, first + int(gain.argmax()) + 1))
        if int(gain.argmax()) + 1 < last - first:
            options.append((-float(gain[-1]), order, first, last))
    options.sort()
    taken: dict[int, int] = {}
    left, capacity = allowance, MAX_THUMBNAILS
    for _, _, first, end in options:
        before = taken.get(first, first)
        cost = float(spent[end - 1] - (spent[before - 1] if before > first else opening[first]))
        if end > before and cost <= left and end - before <= capacity:
            left, capacity = left - cost, capacity - (end - before)
            taken[first] = end
    chosen = [grid[first:end] for first, end in sorted(taken.items())]
    return np.concatenate(chosen).astype(np.int64) if chosen else np.zeros(0, np.int64)


def _cheaper(packets: PacketTable, indices: Indices) -> Indices:
    """``indices``, but for a leaf the frame before it if that is no leaf and hardly earlier."""
    leaf, time = is_leaf(packets), packets.time
    before = np.maximum(indices - 1, 0)
    better = leaf[indices] & ~leaf[before] & (time[indices] - time[before] <= _EARLIER_S)
    return np.where(better, before, indices)


def motion_score(
    thumbnails: npt.NDArray[np.uint8], time: npt.NDArray[np.float64], fewest: int = FEWEST
) -> tuple[Scores, Scores]:
    """Score thumbnails by how much each shows that is there neither before nor after it.

    Args:
        thumbnails: uint8 gray ``[k, h, w]``.
        time: float64 ``[k]`` times of the thumbnails in seconds, increasing.
        fewest: With fewer thumbnails that have others before and after them, no ``transient`` is
            known.

    Returns:
        ``(motion, transient)``, float64 ``[k]`` each. ``motion`` is the mean absolute pixel
        difference from the thumbnail before, divided by 255, after a fit of gain and offset that
        takes out fades and flicker. ``transient`` counts the robust deviations of a thumbnail from
        those before and after it (about 0 to 3 is usual); NaN where it is not known.
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
    if len(rows) < fewest:
        return motion, transient
    local, brightness = np.zeros(len(rows)), np.zeros(len(rows))
    for at in range(0, len(rows), 256):
        part = rows[at : at + 256]
        here, back, ahead = flat[part], flat[before[part]], flat[after[part]]
        new = np.minimum(np.abs(_unexplained(here, back)), np.abs(_unexplained(here, ahead)))
        local[at : at + 256] = np.partition(new, -4, axis=1)[:, -4:].mean(axis=1)
        rise, fall = (here - back).mean(axis=1), (here - ahead).mean(axis=1)
        agree = rise * fall > 0
        brightness[at : at + 256] = np.where(agree, np.minimum(np.abs(rise), np.abs(fall)), 0.0)
    transient[rows] = np.maximum(
        _deviations(local, _LOCAL_FLOOR), _deviations(brightness, _GLOBAL_FLOOR)
    )
    return motion, transient


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
    """How many standard deviations each value is above the median, at least 0.

    The standard deviation is taken from the 90 % quantile (1.28 deviations above the median of
    normal noise), as flicker and steady motion widen the upper side alone. It is at least
    ``floor``.
    """
    middle, upper = np.quantile(values, (0.5, 0.9))
    return np.asarray(np.maximum(0.0, (values - middle) / max((upper - middle) / 1.28, floor)))
