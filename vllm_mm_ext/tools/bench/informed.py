"""What eviction could save with knowledge of the traffic: references to judge a policy by.

They know the distributions that a trace is drawn from, not the draws: neither which request comes
next nor, unless they are told, which item has which popularity.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np

from vllm_mm_ext.tools.bench.simulate import Policy
from vllm_mm_ext.tools.bench.traces import (
    BETWEEN_SCANS,
    SCAN,
    THINK_SPREAD,
    TURNS,
    WORKING_SET,
    popularity,
)


class _Known:
    """Evicts what is least likely to be asked for next, per byte and cost."""

    def __init__(self) -> None:
        self._cost_density: dict[int, float] = {}
        self._clock = 0

    def admit(self, key: int, size: float, cost: float) -> None:
        self._cost_density[key] = cost / size
        self._used(key)

    def hit(self, key: int) -> None:
        self._used(key)

    def victim(self) -> int | None:
        return min(
            self._cost_density,
            key=lambda key: self._cost_density[key] * self._rate(key),
            default=None,
        )

    def evict(self, key: int) -> None:
        del self._cost_density[key]

    def _used(self, key: int) -> None:
        raise NotImplementedError

    def _rate(self, key: int) -> float:
        raise NotImplementedError


class Popular(_Known):
    """Knows the popularity of each item, by its key: what ``zipf`` and ``scans`` start from.

    Args:
        family: ``zipf`` or ``scans``.
    """

    def __init__(self, family: str) -> None:
        super().__init__()
        self._shares = popularity(family)

    def _used(self, key: int) -> None:
        """Nothing to learn."""

    def _rate(self, key: int) -> float:
        return self._shares[key] if key < len(self._shares) else 0.0


class Counting(_Known):
    """Knows the popularities, not which item has which: that is learnt from counts (Bayes).

    It also knows when scans begin and end, and that their items do not come back.

    Args:
        family: ``zipf`` or ``scans``.
    """

    _REFRESH = 16  # Draws after which what is expected is computed anew.

    def __init__(self, family: str) -> None:
        super().__init__()
        self._between = BETWEEN_SCANS if family == "scans" else None
        self._shares = np.array(popularity(family))
        self._logs = np.log(self._shares)
        # Of all items ever seen; none of those in scans.
        self._uses: defaultdict[int, int] = defaultdict(int)
        self._draws = 0
        self._expected = cache(self._posterior_mean)

    def _used(self, key: int) -> None:
        phase = 0 if self._between is None else self._clock % (self._between + SCAN)
        self._clock += 1
        if self._between is None or phase < self._between:
            self._uses[key] += 1
            self._draws += 1
            if self._draws % self._REFRESH == 0:
                self._expected.cache_clear()

    def _rate(self, key: int) -> float:
        return self._expected(self._uses[key]) if self._uses[key] else 0.0

    def _posterior_mean(self, uses: int) -> float:
        """Of the popularity of an item used so often in all draws so far (Poisson counts)."""
        logs = uses * self._logs - self._draws * self._shares
        chances = np.exp(logs - logs.max())
        return float(chances @ self._shares / chances.sum())


class ThinkTime(_Known):
    """Knows how long users think and how many turns they take: what ``sessions`` is drawn from.

    An item's rate is its Gittins index (see ``reuse.ReuseModel``) at the time since its last use.
    That time is taken from the number of requests since then.
    """

    _STEP, _STEPS = 0.02, 400  # In median think times; nearly all are below 8.

    def __init__(self) -> None:
        super().__init__()
        # Requests in a median think time: each conversation makes one in a mean think time.
        self._pace = WORKING_SET["sessions"] / math.exp(THINK_SPREAD**2 / 2)
        self._last: dict[int, int] = {}
        self._indices = _think_indices(self._STEP, self._STEPS)

    def _used(self, key: int) -> None:
        self._clock += 1
        self._last[key] = self._clock

    def _rate(self, key: int) -> float:
        step = int((self._clock - self._last[key]) / self._pace / self._STEP)
        return self._indices[min(step, self._STEPS - 1)]


@cache
def _think_indices(step: float, steps: int) -> list[float]:
    going_on = 1 - 1 / TURNS
    # Chance that the item was used again, and expected time held, by the time since its last use.
    used = [going_on * _thought(number * step) for number in range(steps + 1)]
    held = [0.0]
    for before, after in pairwise(used):
        held.append(held[-1] + step * (1 - (before + after) / 2))
    return [
        max(
            (used[end] - used[begin]) / (held[end] - held[begin])
            for end in range(begin + 1, steps + 1)
        )
        for begin in range(steps)
    ]


def _thought(time: float) -> float:
    """Chance that a user's think time is over by then."""
    return 0.5 * math.erfc(-math.log(time) / THINK_SPREAD / math.sqrt(2)) if time > 0 else 0.0


INFORMED: dict[str, Callable[[], Policy]] = {
    "zipf": lambda: Counting("zipf"),
    "sessions": ThinkTime,
    "scans": lambda: Counting("scans"),
}
