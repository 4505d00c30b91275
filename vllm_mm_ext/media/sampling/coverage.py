"""Which of the frames looked at to take, so that the frames not taken differ least from them.

Every frame of a clip is represented by the taken frame that is nearest in time. The error of a
choice is the sum over all frames of how much their thumbnails differ from those that represent
them. Between two neighbours in the choice the error depends on these two alone, so a dynamic
programme finds the best choice (k-medoids along a line).

A short event adds little to such a sum, so a choice that shows nothing of an event pays for it: as
much as one taken frame accounts for on average, times the strength of the event.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.sampling.timeline import Indices, Times, distinct, second_of

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# Difference in grey levels, over the mean time between taken frames, that is assumed where pixels
# differ less. It spreads the frames of a still picture evenly.
_UNSEEN = 0.1
# Weaker events than these are left aside, step by step, until events use up no more than half of
# what the best choice gains over an even one.
_LEAST_STRENGTHS = (0.0, 2.0, 4.0)
# The lowest price tried of the strongest event, in frames less, and how finely prices are tried.
_LEAST_PRICE, _FINENESS = 0.1, 1.2
# Rounds in which seconds that get too many frames are found; two are usual.
_MOST_ROUNDS = 8
# Most additions of one dynamic programme, about a second of work.
_MOST_WORK = 3e8
# Most pairs of frames looked at whose thumbnails are compared: all pairs of a thousand.
_MOST_PAIRS = 1e6


@dataclass(frozen=True)
class Event:
    """A span of looked-at frames of which at least one should be taken.

    Attributes:
        first, last: Positions among the frames looked at, inclusive.
        strength: 1 where missing the event is as bad as taking one frame less.
    """

    first: int
    last: int
    strength: float


@dataclass(frozen=True, eq=False)
class Looked:
    """The frames looked at, ``m`` of them in a row.

    Attributes:
        time: float64 ``[m]`` seconds, non-decreasing.
        weight: float64 ``[m]`` how many frames of the clip each one stands for.
        pixels: float32 ``[m, p]`` thumbnails in grey levels; ``p`` may be 0 where nothing is known.
        events: What should not be missed.
        eligible: bool ``[m]`` which ones can be taken; None for all.
    """

    time: Times
    weight: Floats
    pixels: npt.NDArray[np.float32]
    events: Sequence[Event] = ()
    eligible: Mask | None = None


def choose(
    looked: Looked,
    count: int,
    *,
    widest: float,
    ends: tuple[float, float],
    ceiling: int,
    taken: Mapping[int, int],
    least: int = 0,
    multiple_of: int = 1,
) -> Indices:
    """Take the frames with the least error.

    Args:
        looked: The frames to take from.
        count: How many to take, at most.
        widest: Most seconds between two neighbours in the choice, as far as ``count`` goes and
            there are frames.
        ends: Most seconds from the first of the frames looked at to the choice, and from the choice
            to the last.
        ceiling: Most frames in any whole second of the clip.
        taken: Frames taken elsewhere in each whole second; they count for ``ceiling``.
        least: How many to take at least: the ceiling is raised where it leaves fewer.
        multiple_of: The number of frames is cut to a multiple of this, if there are that many.

    Returns:
        int64 ``[k]`` positions, strictly increasing, ``k <= count``. ``k`` is ``count`` cut to a
        multiple, unless seconds are full.
    """
    second = second_of(looked.time)
    seconds, where = np.unique(second, return_inverse=True)
    room = ceiling - np.array([taken.get(int(s), 0) for s in seconds])
    eligible = np.ones(len(where), np.bool_) if looked.eligible is None else looked.eligible
    there = np.bincount(where[eligible], minlength=len(room))
    while np.clip(room, 0, there).sum() < min(least, there.sum()):
        room += 1
    room = np.maximum(room, 0)
    count = min(count, int(np.minimum(room, there).sum()))
    count = count - count % multiple_of or count
    if not count:
        return np.zeros(0, np.int64)
    # Where seconds are full or hold no frames, no choice may be within `widest`.
    for bridged in (None, second):
        gaps = _Gaps(looked, count, widest, ends, bridged)
        allowed = eligible & (room[where] > 0)
        for _ in range(_MOST_ROUNDS):
            chosen = gaps.best(count, allowed)
            if chosen is None:
                break
            over = np.flatnonzero(np.bincount(where[chosen], minlength=len(room)) > room)
            if not len(over):
                return chosen
            for number in over.tolist():
                # The second keeps as many of the chosen frames as fit, those with events first.
                inside = chosen[where[chosen] == number]
                allowed[where == number] = False
                allowed[_thinned(inside, int(room[number]), looked.events)] = True
    return _evenly(allowed, where, room, count)


class _Gaps:
    """The error between any two frames that may be neighbours in a choice.

    Row ``j``, column ``c`` of ``_between`` is for the neighbours ``j - L + c`` and ``j``, with
    ``L`` columns.
    """

    def __init__(
        self,
        looked: Looked,
        count: int,
        widest: float,
        ends: tuple[float, float],
        bridged: Indices | None,
    ) -> None:
        time, size = looked.time, len(looked.time)
        low = np.searchsorted(time, time - widest - 1e-9)
        if bridged is not None:
            # From any frame the next of these seconds can be reached, whatever `widest` says.
            low[1:] = np.minimum(low[1:], np.searchsorted(bridged, bridged[:-1]))
        most = max(4, int(min(_MOST_WORK / (count * size), _MOST_PAIRS / size)))
        self._lags = lags = max(1, min(most, int((np.arange(size) - low).max())))
        right = np.arange(size)[:, None]
        left = right - lags + np.arange(lags)
        possible = left >= np.maximum(low[:, None], 0)
        left = np.where(possible, left, right)
        middle = np.searchsorted(time, (time[left] + time[right]) / 2, side="right")
        middle = np.clip(middle, np.minimum(left + 1, right), right)
        first, last = (min(end, widest / 2) for end in ends)
        opens = min(int(np.searchsorted(time, time[0] + first + 1e-9, side="right")), lags + 1)
        closes = max(int(np.searchsorted(time, time[-1] - last - 1e-9)), size - 1 - lags)
        after, before = np.maximum(middle - 1 - left, 0), right - middle
        longest = max(int(after.max()), int(before.max()), opens - 1, size - 1 - closes)
        slope = _UNSEEN * count / max(1e-6, float(time[-1] - time[0]))
        ahead, behind = _running(looked, longest, slope)
        self._between = np.where(possible, ahead[after, left] + behind[before, right], np.inf)
        position = np.arange(size)
        self._first = np.where(
            position < opens, behind[np.minimum(position, longest), position], np.inf
        )
        rest = size - 1 - position
        self._last = np.where(
            position >= closes, ahead[np.minimum(rest, longest), position], np.inf
        )
        self._looked, self._slope = looked, slope
        self._left, self._right = left, right
        # The price of the strongest events, over that of one frame less. It does not rise again
        # where fewer frames are allowed: each price tried costs a solution.
        self._factor = 1.0

    def best(self, count: int, allowed: Mask) -> Indices | None:
        """The positions of the best choice; None if there is none within the limits."""
        plain, fewer = self._solve(count, allowed), self._solve(max(1, count - 1), allowed)
        events = self._looked.events
        if plain is None or fewer is None or not events:
            return None if plain is None else plain[0]
        even, price = max(self._even_error(count), plain[1]), fewer[1] - plain[1]

        def showing(least: float, price: float) -> Indices:
            found = self._solve(count, allowed, self._missed(least, price))
            return plain[0] if found is None else found[0]

        for least in _LEAST_STRENGTHS:
            found = showing(least, price)
            if self._error(found) <= (even + plain[1]) / 2:
                return found
        # Of the strongest events, those that are shown at the highest price at which all together
        # cost no more than the gain, or than one frame. As prices fall, dear events go first.
        most, strongest = max(even, fewer[1]), max(event.strength for event in events)
        low, high = _LEAST_PRICE / strongest, self._factor
        if high < 1.0:
            found = showing(least, high * price)
        if self._error(found) <= most:
            return found
        found = plain[0]
        while high > _FINENESS * low:
            factor = math.sqrt(low * high)
            trial = showing(least, factor * price)
            if self._error(trial) <= most:
                found, low = trial, factor
            else:
                high = factor
        self._factor = low
        return found

    def _missed(self, least: float, price: float) -> tuple[Floats, Floats, Floats]:
        """The price of events of at least a strength: before a choice, in each gap, after it."""
        ended, begun = np.zeros(len(self._first)), np.zeros(len(self._first))
        for event in self._looked.events:
            if event.strength >= least:
                ended[event.last + 1 :] += price * event.strength
                begun[event.first :] += price * event.strength
        # Events do not overlap: at most one begins before a gap and ends after it, and then none is
        # inside.
        inside = np.maximum(ended[self._right] - begun[self._left], 0.0)
        return ended, inside, begun[-1] - begun

    def _error(self, chosen: Indices) -> float:
        """The error of a choice, without events; infinite where a gap is too wide."""
        left, right = chosen[:-1], chosen[1:]
        column = left - right + self._lags
        between = np.where(column >= 0, self._between[right, np.maximum(column, 0)], np.inf)
        return float(self._first[chosen[0]] + between.sum() + self._last[chosen[-1]])

    def _even_error(self, count: int) -> float:
        """The error of frames at even moments, from the first to the last, whatever the gaps."""
        time = self._looked.time
        moments = np.linspace(time[0], time[-1], count)
        chosen = distinct(np.searchsorted((time[1:] + time[:-1]) / 2, moments), len(time))
        nearest = chosen[np.searchsorted((time[chosen[1:]] + time[chosen[:-1]]) / 2, time)]
        differs = _differences(self._looked, nearest, np.arange(len(time)), self._slope)
        return float(self._looked.weight @ differs)

    def _solve(
        self, count: int, allowed: Mask, missed: tuple[Floats, Floats, Floats] | None = None
    ) -> tuple[Indices, float] | None:
        """The best choice, and its error with the price of the events that it misses."""
        blocked = np.where(allowed, 0.0, np.inf)
        position = np.arange(len(blocked))
        first, between, last = self._first, self._between, self._last
        if missed is not None:
            first, between, last = first + missed[0], between + missed[1], last + missed[2]
        best = first + blocked
        steps: list[Indices] = []
        padding = np.full(self._lags, np.inf)
        for _ in range(count - 1):
            earlier = np.lib.stride_tricks.sliding_window_view(
                np.concatenate([padding, best[:-1]]), self._lags
            )
            total = earlier + between
            column = total.argmin(axis=1)
            best = total[position, column] + blocked
            steps.append(position - self._lags + column)
        total = best + last
        at = int(total.argmin())
        if not np.isfinite(total[at]):
            return None
        chosen = [at]
        for step in reversed(steps):
            chosen.append(int(step[chosen[-1]]))
        return np.array(chosen[::-1], np.int64), float(total[at])


def _differences(
    looked: Looked, some: Indices | slice, others: Indices | slice, slope: float
) -> Floats:
    """How much frames differ from others, float64 ``[n]``."""
    differs = slope * np.abs(looked.time[others] - looked.time[some])
    if looked.pixels.shape[1]:
        differs = differs + np.abs(looked.pixels[others] - looked.pixels[some]).mean(axis=1)
    return np.asarray(differs, np.float64)


def _running(looked: Looked, longest: int, slope: float) -> tuple[Floats, Floats]:
    """Error of the ``l`` frames after and before each frame, if that frame represents them.

    Returns:
        Two float64 ``[longest + 1, m]``; the first index is ``l``. Beyond the ends of the clip
        there are no frames, and nothing is added.
    """
    size = len(looked.time)
    ahead, behind = np.zeros((longest + 1, size)), np.zeros((longest + 1, size))
    for lag in range(1, longest + 1):
        differs = _differences(looked, slice(-lag), slice(lag, None), slope)
        ahead[lag], behind[lag] = ahead[lag - 1], behind[lag - 1]
        ahead[lag, :-lag] += looked.weight[lag:] * differs
        behind[lag, lag:] += looked.weight[:-lag] * differs
    return ahead, behind


def _thinned(chosen: Indices, count: int, events: Sequence[Event]) -> Indices:
    """``count`` of the ``chosen``: those that show the strongest events, then an even choice."""
    kept: list[int] = []
    for event in sorted(events, key=lambda event: -event.strength):
        shows = chosen[(chosen >= event.first) & (chosen <= event.last)]
        if len(shows) and not np.isin(shows, kept).any():
            kept.append(int(shows[0]))
    kept = kept[:count]
    others = chosen[~np.isin(chosen, kept)]
    places = np.linspace(0, len(others) - 1, count - len(kept), dtype=np.int64)
    return np.concatenate([np.array(kept, np.int64), others[places]])


def _evenly(allowed: Mask, where: Indices, room: Indices, count: int) -> Indices:
    """An even choice that no second is too full for, whatever the gaps."""
    fits: list[Indices] = []
    for number in range(len(room)):
        inside = np.flatnonzero(allowed & (where == number))
        fits.append(_thinned(inside, min(len(inside), int(room[number])), ()))
    positions = np.concatenate(fits)
    return positions[np.linspace(0, len(positions) - 1, count, dtype=np.int64)]
