"""From scores to spots: frames worth showing, best first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_mm_ext.media.sampling.container_profile import Scores
from vllm_mm_ext.media.sampling.timeline import Indices, Times

# An event that starts and ends with a peak is between these many seconds long.
_SHORTEST_S, _LONGEST_S = 0.12, 0.95
# A lone peak is the start or the end of something: look this far to both of its sides.
_ASIDE_S = 0.08
# Peaks nearer than this are one peak.
_PEAK_GAP_S = 0.12
# Deviations that chance reaches now and then, and the fewest that make a spot.
_CHANCE = 1.5
_SEEN_LIMIT = 2.0
# Excess of a peak at which it counts half.
_HALF = 4.0
# Weight of a peak without a partner: a cut, or an event whose other end is hidden.
_LONE = 0.55
# Weaker spots are worth no more than an evenly placed frame.
_LEAST = 0.05
# Share of its weight a spot keeps for each better spot within half an event's length.
_CROWDING = 0.7
# Weight left to a stage-1 peak where the pixels show no event.
_UNSEEN = 0.35


@dataclass(frozen=True, order=True)
class Spot:
    """A frame to take, if the budget allows. Sorts best first, then by position."""

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
        innovation: float64 ``[n]`` stage-1 score.
        looked_at: int64 ``[k]`` frames that stage 2 looked at.
        transient: float64 ``[k]`` their stage-2 score.
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
    # The weakest of many peaks is the level that chance reaches.
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
    """Drop spots that show the moment of a better one; the more spots near, the less each."""
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
    """Whether stage 2 saw the frame's surroundings."""
    if len(looked_at) < 3:
        return False
    place = int(np.searchsorted(looked_at, index))
    if place == 0 or place >= len(looked_at):
        return False
    return float(time[looked_at[place]] - time[looked_at[place - 1]]) < 0.35
