"""Stage 2 of ``adaptive``: look at cheap spots at thumbnail size and score what is really there.

To see one frame a decoder must decode everything from its keyframe on, so what is bought is a
*prefix* of a GOP, and thumbnails are taken all along it.
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

# Seconds between thumbnails: an event of 0.2 s holds at least one, also where the frame taken
# is up to _EARLIER_S before the one meant, to be cheaper.
STRIDE_S = 0.13
_EARLIER_S = 0.07
# Ceiling on thumbnails in one clip; each costs a scale and a copy besides its decoding.
MAX_THUMBNAILS = 960
# Frames that stage 2 may decode, as a share of the clip: whatever the final selection leaves
# unspent of one full sequential decode, but at least the smaller share.
_FULL_DECODE = 1.0
_LEAST_DECODE = 0.12
# A frame is compared with frames this many seconds before and after it: beyond the longest
# sub-second event.
_REACH_S = 0.9
# Comparisons needed to know what is usual in a clip, and in a window of one.
FEWEST = 48
FEWEST_IN_WINDOW = 32
# Changes below this many 8-bit steps are sensor and coding noise: block mean, frame mean.
_LOCAL_FLOOR = 2.0
_GLOBAL_FLOOR = 1.0


def decode_allowance(packets: PacketTable, chosen: Indices) -> float:
    """Decoded frames that stage 2 may spend, when the final ones will cost like ``chosen``.

    It gets what ``chosen`` leaves of a single sequential decode, so that both together stay
    near the price of one, and at least a small share of the clip.
    """
    count = len(packets)
    left = _FULL_DECODE * count - decode_cost(packets, chosen)
    return max(_LEAST_DECODE * count, left)


def plan(packets: PacketTable, score: Scores, allowance: float, lead_in: float = 0.0) -> Indices:
    """Which frames to look at: the most promising GOP prefixes per decoded frame.

    Args:
        packets: The clip's packets.
        score: float64 ``[n]`` stage-1 innovation.
        allowance: What may be spent in all, as ``decode_cost`` counts.
        lead_in: What decoding must spend before the first packet, where that is no keyframe;
            infinity keeps away from the first GOP.

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
    # Spent when a prefix ends with each grid frame, counted from the start of the clip.
    extra = np.cumsum(1.0 - weight[grid])
    spent = total[grid + 1] + extra
    starts = gop_starts(packets)
    gop = np.searchsorted(starts, grid, side="right") - 1
    opening = total[starts[gop]] + extra - (1.0 - weight[grid])
    opening[gop == 0] -= lead_in
    # The most that stage 1 says of the frames since the last look; a constant for the unseen.
    value = np.maximum.reduceat(score, grid) ** 2 + 1.0
    # A look pays off once the surroundings after it are seen too.
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
        # Ties go by the golden ratio, which visits the clip evenly.
        order = (int(gop[first]) * 0.6180339887) % 1.0
        options.append((-float(gain.max()), order, first, first + int(gain.argmax()) + 1))
        if int(gain.argmax()) + 1 < last - first:
            options.append((-float(gain[-1]), order, first, last))
    options.sort()
    taken: dict[int, int] = {}
    left, room = allowance, MAX_THUMBNAILS
    for _, _, first, end in options:
        before = taken.get(first, first)
        cost = float(spent[end - 1] - (spent[before - 1] if before > first else opening[first]))
        if end > before and cost <= left and end - before <= room:
            left, room = left - cost, room - (end - before)
            taken[first] = end
    chosen = [grid[first:end] for first, end in sorted(taken.items())]
    return np.concatenate(chosen).astype(np.int64) if chosen else np.zeros(0, np.int64)


def _cheaper(packets: PacketTable, indices: Indices) -> Indices:
    """Instead of a leaf, the frame before it, if that is no leaf and hardly earlier."""
    leaf, time = is_leaf(packets), packets.time
    before = np.maximum(indices - 1, 0)
    better = leaf[indices] & ~leaf[before] & (time[indices] - time[before] <= _EARLIER_S)
    return np.where(better, before, indices)


def motion_score(
    thumbnails: npt.NDArray[np.uint8], time: npt.NDArray[np.float64], fewest: int = FEWEST
) -> tuple[Scores, Scores]:
    """Score thumbnails: how much each shows that is there neither before nor after.

    Args:
        thumbnails: uint8 gray ``[k, h, w]``.
        time: float64 ``[k]`` their times in seconds, increasing.
        fewest: Comparisons needed to know what is usual.

    Returns:
        ``(motion, transient)``, float64 ``[k]`` each. ``motion`` is the mean absolute pixel
        difference to the thumbnail before, divided by 255, after a gain-and-offset fit that
        takes out fades and flicker. ``transient`` counts robust deviations of a frame from
        both its surroundings (0 where those were not looked at): about 0..3 is usual.
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
    """2x2 box filter: halves what is left of sensor noise after the reduction in size."""
    if frames.shape[1] < 2 or frames.shape[2] < 2:
        return frames
    rows = frames[:, 1:] + frames[:, :-1]
    return np.asarray((rows[:, :, 1:] + rows[:, :, :-1]) / 4, np.float32)


def _unexplained(
    frames: npt.NDArray[np.float32], references: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """What of each frame a gain and an offset on its reference do not explain (both [k, p])."""
    frame = frames - frames.mean(axis=1, keepdims=True)
    reference = references - references.mean(axis=1, keepdims=True)
    energy = (reference * reference).sum(axis=1, keepdims=True)
    gain = (frame * reference).sum(axis=1, keepdims=True) / np.maximum(energy, 1e-3)
    # A different picture is not a dimmed one: far-off gains are left alone.
    gain = np.where((gain > 0.4) & (gain < 2.5), gain, 1.0)
    return np.asarray(frame - gain * reference, np.float32)


def _deviations(values: Scores, floor: float) -> Scores:
    """Robust z-score above the median.

    The spread is taken from the upper side: flicker and steady motion make it lopsided.
    """
    middle, upper = np.quantile(values, (0.5, 0.9))
    return np.asarray(np.maximum(0.0, (values - middle) / max((upper - middle) / 1.28, floor)))
