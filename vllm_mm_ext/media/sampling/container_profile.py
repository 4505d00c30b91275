"""Stage 1 of ``adaptive``: how much is new in each frame, from packet sizes alone.

A predictive codec spends bits where prediction fails: when something appears, and again when it
leaves. So three detectors compare the size of a packet with the sizes around it: one packet against
its neighbours, windows of 0.1 s and 0.3 s against the windows before them, and the size against a
linear prediction. Neither the pattern of P and B frames nor a slow change of activity passes for an
event. A fourth detector looks for keyframes that the encoder placed before a GOP was full. A
frame's score is the highest of the four.

The first three return ``4 * log1p(excess)``, so that their scores are comparable. 1.48 is the
factor from a median absolute deviation to the standard deviation of normal noise. The other
constants were tuned on generated clips with known events, other clips than those of
``vllm-mm bench sampling``.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.sampling.timeline import gop_starts, is_reordered
from vllm_mm_ext.media.types import PacketTable

Scores = npt.NDArray[np.float64]

# Seconds on each side of a frame from which its baseline is taken: long against the events looked
# for (under a second), short against changes of scene activity.
BASELINE_S = 3.0
# Differences of fewer bytes between packets are header noise.
_HEADER_BYTES = 16.0
# Relative change of size below which a change is noise of the encoder's rate control.
_RELATIVE_FLOOR = 0.003
# Seconds from the start of a clip in which the encoder's rate control settles: sizes say nothing
# there.
_SETTLING_S = 0.5
# Seconds of the windows whose means are compared.
_WINDOWS_S = (0.1, 0.3)
# Score of a keyframe that the encoder placed by itself before the GOP was full.
_SCENE_CUT = 12.0
# Order of the linear prediction, in frames.
_ORDER = 32
# GOPs that must reach a place in the GOP before it is known what frames score there.
_FEWEST_GOPS = 5
# Seconds in which a keyframe still shows in the sizes after it.
_AFTERMATH_S = 0.3
# Score that frames keep whatever frames at the same place in other GOPs score.
_USUAL = 2.0


def innovation(packets: PacketTable) -> Scores:
    """Stage-1 score (innovation) of each frame, in robust deviations from the local baseline.

    Args:
        packets: The clip's packet table, ``n`` rows.

    Returns:
        float64 ``[n]``, at least 0. About 0 to 3 is usual variation; the first frame of an event
        and the first frame after the event score higher.
    """
    count = len(packets)
    if count < 8:
        return np.zeros(count)
    rate = (count - 1) / max(1e-6, float(packets.time[-1] - packets.time[0]))
    half = max(4, round(BASELINE_S * rate))
    size = _without_keyframes(packets)
    score, normal = np.zeros(count), np.zeros(count)
    late = is_reordered(packets)
    for rows in (np.flatnonzero(late), np.flatnonzero(~late)):
        if len(rows) >= 8:
            part = max(4, half * len(rows) // count)
            score[rows] = _single(size[rows], part)
            normal[rows] = _normal(size[rows], part)
    for seconds in _WINDOWS_S:
        score = np.maximum(score, _windowed(normal, max(2, round(seconds * rate)), half))
    score = np.maximum(score, _unpredicted(normal, half))
    score = np.maximum(_without_phase(score, packets), _scene_cuts(packets, rate))
    score[: max(1, round(_SETTLING_S * rate))] = 0.0
    return np.asarray(score)


def _without_keyframes(packets: PacketTable) -> Scores:
    """Packet sizes; a keyframe, always large, gets the smaller size of its neighbours."""
    size = packets.size.astype(np.float64)
    keys = np.flatnonzero(packets.is_key)
    inter = np.flatnonzero(~packets.is_key)
    if len(inter) >= 2:
        left = inter[np.clip(np.searchsorted(inter, keys) - 1, 0, len(inter) - 1)]
        right = inter[np.clip(np.searchsorted(inter, keys), 0, len(inter) - 1)]
        size[keys] = np.minimum(size[left], size[right])
    return size


def baseline(values: Scores, half: int, quantiles: tuple[float, ...]) -> list[Scores]:
    """Quantiles of ``values`` in a window of ``2 * half`` frames around each frame.

    They are computed at every eighth of ``half`` and interpolated between.
    """
    count = len(values)
    window = min(count, 2 * half)
    step = max(1, half // 8)
    starts = np.arange(0, count - window + 1, step)
    views = np.lib.stride_tricks.sliding_window_view(values, window)[starts]
    found = np.quantile(views, quantiles, axis=1)
    centres = starts + window / 2
    return [np.interp(np.arange(count), centres, row) for row in found]


def _without_phase(score: Scores, packets: PacketTable) -> Scores:
    """Scores, less what frames at the same place in other GOPs usually score.

    The frames after a keyframe score high in every GOP, without any event.
    """
    starts = gop_starts(packets)
    place = np.arange(len(score)) - np.repeat(starts, np.diff(starts, append=len(score)))
    if len(starts) < _FEWEST_GOPS:
        # There are too few GOPs to compare: the first frames of each GOP count half.
        seconds = packets.time - packets.time[starts].repeat(np.diff(starts, append=len(score)))
        return np.where(seconds < _AFTERMATH_S, 0.5 * score, score)
    order = np.argsort(place, kind="stable")
    bounds = np.searchsorted(place[order], np.arange(int(place.max()) + 2))
    out = score.copy()
    for low, high in itertools.pairwise(bounds.tolist()):
        if high - low < _FEWEST_GOPS:
            break
        rows = order[low:high]
        middle = (high - low) * 6 // 10
        usual = float(np.partition(score[rows], middle)[middle])
        out[rows] = np.maximum(0.0, score[rows] - max(0.0, usual - _USUAL))
    return out


def _single(size: Scores, half: int) -> Scores:
    """One packet against the larger packets around it: finds spikes over a P/B pattern.

    The excess is over the 90 % quantile, in units of that quantile's distance from the median.
    """
    middle, upper = baseline(size, half, (0.5, 0.9))
    scale = np.maximum(upper - middle, np.maximum(_HEADER_BYTES, 0.5 * _RELATIVE_FLOOR * upper))
    return np.asarray(np.log1p(np.maximum(0.0, (size - upper) / scale)) * 4.0)


def _normal(size: Scores, half: int) -> Scores:
    """Logarithms of sizes, in robust deviations from the median around them, clipped to 6."""
    level = np.log(size + _HEADER_BYTES)
    (middle,) = baseline(level, half, (0.5,))
    (spread,) = baseline(np.abs(level - middle), half, (0.5,))
    floor = np.maximum(_RELATIVE_FLOOR, 0.5 * _HEADER_BYTES / (size + _HEADER_BYTES))
    return np.asarray(np.clip((level - middle) / np.maximum(1.48 * spread, floor), -6.0, 6.0))


def _windowed(normal: Scores, width: int, half: int) -> Scores:
    """A window's mean against that of the window before it: finds steps up and down."""
    total = np.concatenate([[0.0], np.cumsum(normal)])
    edge = np.arange(len(normal))
    after = (total[np.minimum(edge + width, len(normal))] - total[edge]) / width
    before = (total[edge] - total[np.maximum(edge - width, 0)]) / width
    step = np.abs(after - before)
    step[:width] = step[len(normal) - width + 1 :] = 0.0
    (spread,) = baseline(step, half, (0.5,))
    return np.asarray(np.log1p(step / np.maximum(1.48 * spread, 0.3) / 3.0) * 4.0)


def _scene_cuts(packets: PacketTable, rate: float) -> Scores:
    """Keyframes before the GOP was full: the encoder itself saw a new scene."""
    score = np.zeros(len(packets))
    starts = gop_starts(packets)
    gaps = np.diff(starts)
    if len(gaps) < 2:
        return score
    regular = np.median(gaps)
    if regular > 1 and (np.abs(gaps - regular) <= 1).mean() > 0.5:
        score[starts[1:][np.abs(gaps - regular) > 1]] = _SCENE_CUT
    elif gaps.max() > 0.5 * rate:
        score[starts[1:][gaps < gaps.max()]] = _SCENE_CUT
    return score


def _unpredicted(normal: Scores, half: int) -> Scores:
    """Scores by what a linear prediction from the frames before does not explain.

    An autoregressive fit (Yule-Walker on clipped log sizes) learns the periodic part of the
    sizes: P/B patterns, flicker, a pan that moves in whole pixels.
    """
    order = min(_ORDER, len(normal) // 8)
    padded = np.fft.rfft(normal, 2 * len(normal))
    covariance = np.fft.irfft(padded * padded.conj())[: order + 1]
    if covariance[0] <= 0:
        return np.zeros(len(normal))
    lags = np.abs(np.subtract.outer(np.arange(order), np.arange(order)))
    matrix = covariance[lags] + np.eye(order) * 1e-3 * covariance[0]
    weights = np.linalg.solve(matrix, covariance[1:])
    expected = np.convolve(normal, np.concatenate([[0.0], weights]))[: len(normal)]
    error = np.abs(normal - expected)
    (usual,) = baseline(error, half, (0.5,))
    # The log sizes are clipped, which bounds the error: the other detectors judge how large a spike
    # is.
    return np.asarray(np.log1p(error / np.maximum(1.48 * usual, 0.15) / 3.0) * 4.0)
