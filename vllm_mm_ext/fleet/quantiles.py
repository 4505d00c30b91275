"""Quantiles of any number of values in constant memory, each within 1 %."""

from __future__ import annotations

import math

# Each bucket is 2 % wide, so its middle is within 1 % of all its values.
_WIDTH = math.log(1.02)
_LEAST = 1e-6
_BUCKETS = round(math.log(1e13) / _WIDTH)


class Quantiles:
    """Counts values in buckets of equal ratio.

    Attributes:
        count: Values so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._buckets = [0] * (_BUCKETS + 1)
        self._least, self._most = math.inf, -math.inf

    def add(self, value: float) -> None:
        """Take a value in; what is below a millionth counts as that."""
        self.count += 1
        place = int(math.log(value / _LEAST) / _WIDTH) if value > _LEAST else 0
        self._buckets[min(place, _BUCKETS)] += 1
        self._least, self._most = min(self._least, value), max(self._most, value)

    def at(self, share: float) -> float:
        """The value that so large a share of all is not above; nan without values.

        Args:
            share: From 0 to 1.
        """
        if not self.count:
            return math.nan
        wanted, seen = share * (self.count - 1), 0
        for place, count in enumerate(self._buckets):
            seen += count
            if seen > wanted:
                middle = _LEAST * math.exp((place + 0.5) * _WIDTH)
                return min(max(middle, self._least), self._most)
        return self._most

    def with_those_of(self, other: Quantiles) -> Quantiles:
        """The values of both."""
        both = Quantiles()
        both.count = self.count + other.count
        pairs = zip(self._buckets, other._buckets, strict=True)
        both._buckets = [one + more for one, more in pairs]
        both._least = min(self._least, other._least)
        both._most = max(self._most, other._most)
        return both
