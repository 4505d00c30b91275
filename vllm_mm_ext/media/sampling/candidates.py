"""From the scores of both stages to spots: frames that a selection should show, best first.

Scores count robust deviations from the usual (see ``container_profile`` and ``thumbnail_scan``).
The constants were tuned on generated clips with known events, other clips than those of
``vllm-mm bench sampling``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_mm_ext.media.sampling.container_profile import Scores
from vllm_mm_ext.media.sampling.timeline import Indices, Times

# Least and most seconds between two stage-1 peaks that are the start and the end of one event.
_SHORTEST_S, _LONGEST_S = 0.12, 0.95
# A peak without a partner is the start or the end of something: its two spots lie this many
# seconds before and after it.
_ASIDE_S = 0.08
# Peaks nearer to each other than this many seconds are one peak.
_PEAK_GAP_S = 0.12
# Stage-2 score that chance reaches now and then, and the least stage-2 score that makes a spot.
_CHANCE = 1.5
_SEEN_LIMIT = 2.0
# A peak that exceeds chance by this score has half of the greatest weight, 1.
_HALF = 4.0
# Share of its weight that a peak without a partner keeps: it is a cut, or an event whose other end
# is hidden.
_LONE = 0.55
# A spot of less weight is no better than an evenly placed frame, and is dropped.
_LEAST = 0.05
# Share of its weight that a spot keeps for each better spot within half an event's length.
_CROWDING = 0.7
# Share of its weight that a stage-1 spot keeps where stage 2 looked and saw no event.
_UNSEEN = 0.35


@dataclass(frozen=True, order=True)
class Spot:
    """A frame to take, if the budget allows.

    Attributes:
        rank: Minus the weight of the spot (0 to 1), so that spots sort best first.
        index: Frame index.
    """

    rank: float
    index: int


def find(
    time: Times,
    innovation: Scores,
    looked_at: Indices,
    transient: Scores,
    limit: int,
) -> list[Spot]:
    """The most promising frames, best first.

    Args:
        time: float64 ``[n]`` frame times in seconds.
        innovation: float64 ``[n]`` stage-1 score of each frame.
        looked_at: int64 ``[k]`` sorted indices of the frames that stage 2 looked at.
        transient: float64 ``[k]`` stage-2 score of each of them; NaN where it is not known.
        limit: How many peaks of each stage to consider.
    """
    spots: list[Spot] = []
    seen: list[int] = []
    known = np.isfinite(transient)
    looked_at, transient = looked_at[known], transient[known]
    for position in peaks(time[looked_at], transient, limit, _LONGEST_S / 2):
        seen_as = float(transient[position])
        if seen_as < _SEEN_LIMIT:
            break
        index = int(looked_at[position])
        seen.append(index)
        spots.append(Spot(-(seen_as - _CHANCE) / (seen_as - _CHANCE + _HALF), index))
    found = peaks(time, innovation, limit, _PEAK_GAP_S)
    # Where there are as many peaks as were looked for, the weakest shows the level that chance
    # reaches.
    chance = float(innovation[found[-1]]) if len(found) == limit else 0.0
    excess = {peak: max(0.0, float(innovation[peak]) - chance) for peak in found}
    strength = {peak: value / (value + _HALF) for peak, value in excess.items()}
    for peak in found:
        if any(abs(time[peak] - time[index]) <= _LONGEST_S for index in seen):
            continue
        for side in (1.0, -1.0):
            partner = _partner(peak, side, strength, time)
            if partner is not None and strength[partner] > _LONE * strength[peak]:
                middle = (time[peak] + time[partner]) / 2
                weight = float(np.sqrt(strength[peak] * strength[partner]))
            else:
                middle = time[peak] + side * _ASIDE_S
                weight = _LONE * strength[peak]
            index = _at(time, middle)
            if _looked(time, index, looked_at):
                weight *= _UNSEEN
            if weight >= _LEAST:
                spots.append(Spot(-weight, index))
    return _apart(sorted(spots), time)


def _apart(spots: list[Spot], time: Times) -> list[Spot]:
    """Drop spots that show the same moment as a better spot, and weaken spots near better ones."""
    kept: list[Spot] = []
    for spot in spots:
        apart = [abs(float(time[spot.index] - time[other.index])) for other in kept]
        if min(apart, default=_LONGEST_S) >= _SHORTEST_S:
            near = sum(seconds < _LONGEST_S / 2 for seconds in apart)
            kept.append(Spot(spot.rank * _CROWDING**near, spot.index))
    return sorted(kept)


def peaks(time: Times, score: Scores, limit: int, apart: float) -> list[int]:
    """Positions of the highest scores, best first, at least ``apart`` seconds from each other."""
    order = np.lexsort((np.arange(len(score)), -score))
    chosen: list[int] = []
    blocked = np.zeros(len(score), np.bool_)
    for position in order.tolist():
        if len(chosen) >= limit or score[position] <= 0:
            break
        if blocked[position]:
            continue
        chosen.append(position)
        low = np.searchsorted(time, time[position] - apart)
        high = np.searchsorted(time, time[position] + apart, side="right")
        blocked[low:high] = True
    return chosen


def _partner(peak: int, side: float, strength: dict[int, float], time: Times) -> int | None:
    """The strongest peak after (``side`` 1) or before (-1) that could end the same event."""
    best: int | None = None
    for other, value in strength.items():
        apart = side * float(time[other] - time[peak])
        if _SHORTEST_S <= apart <= _LONGEST_S and (best is None or value > strength[best]):
            best = other
    return best


def _at(time: Times, moment: float) -> int:
    """The frame on screen at a moment."""
    found = int(np.searchsorted(time, moment + 1e-6, side="right")) - 1
    return min(max(found, 0), len(time) - 1)


def _looked(time: Times, index: int, looked_at: Indices) -> bool:
    """Whether stage 2 saw thumbnails close before and after the frame (0.35 s apart at most)."""
    if len(looked_at) < 3:
        return False
    place = int(np.searchsorted(looked_at, index))
    if place == 0 or place >= len(looked_at):
        return False
    return float(time[looked_at[place]] - time[looked_at[place - 1]]) < 0.35
