"""Learns from the uses of cached items how soon items are used again."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Ages fall into half octaves; the last bucket begins at 2**17.5 uses.
_PER_OCTAVE = 2
_BUCKETS = 36
_EDGES = [0.0, *(2 ** (bucket / _PER_OCTAVE) for bucket in range(1, _BUCKETS + 1))]
_WIDTHS = [_EDGES[bucket + 1] - _EDGES[bucket] for bucket in range(_BUCKETS)]
# Items used 1, 2, 3, 6, 12 ... times; those in between belong to two classes in part.
_CLASSES = 13
_USES = [1.0, 2.0, *(3.0 * 2**octave for octave in range(_CLASSES - 2))]
# Before anything is known: an item is used again the later, the longer ago it was used and the
# fewer times.
_UNKNOWN = [0.5 / (edge + 1) for edge in _EDGES[:_BUCKETS]]
# Reuses that a class must have at an age to weigh as much as what is known of class and age.
_OWN = 20.0
# Bounds of the reuses that an age must have to weigh as much as the ages before it.
_SMOOTH = 0.5, 100.0
# Factors and rates by age are fitted in turns, and go on where the last lesson left them.
_ROUNDS = 3
# Weight of what was learnt before, each time the densities are made anew.
_MEMORY = 0.7

Counts = list[float]


def _position(uses: int) -> tuple[int, float]:
    """The lower of the two classes of items used so often, and their share in the upper one."""
    place = uses - 1.0 if uses <= 3 else 2 + math.log2(uses / 3)
    lower = min(int(place), _CLASSES - 2)
    return lower, min(place - lower, 1.0)


_POSITIONS = [_position(max(uses, 1)) for uses in range(int(_USES[-1]) + 1)]


def use_class(uses: int) -> tuple[int, float]:
    """The lower of the two classes of items used so often, and their share in the upper one.

    Args:
        uses: At least 1.
    """
    return _POSITIONS[min(uses, len(_POSITIONS) - 1)]


def age_bucket(age: int) -> int:
    """The bucket of an age: uses of any item since the item's own last one."""
    return min(int(_PER_OCTAVE * math.log2(age)), _BUCKETS - 1) if age > 1 else 0


class ReuseModel:
    """Expected reuses per time that an item is kept, by how often and how long ago it was used.

    An item's time at an age ends when the item is used again or given up. From these ends the model
    learns rates of reuse: a rate by age times a factor by uses (proportional hazards; Cox, J. R.
    Stat. Soc. B 34(2), 1972), from which classes with many ends at an age depart. The model smooths
    the rates of neighbouring ages by as much as chance alone would part them. So the number of uses
    tells items of fixed popularity apart, and the time since the last use tells conversations with
    think time apart.

    The density of an item is the largest ratio, over all times to keep it at most that long, of
    its chance to be used to the time it is held for: the Gittins index of keeping it (Gittins, J.
    R. Stat. Soc. B 41(2), 1979), which refines the hit density of Beckmann et al. ("LHD: Improving
    Cache Hit Rate by Maximizing Hit Density", NSDI 2018). Old ends count less and less, so the
    model follows changing traffic.
    """

    def __init__(self) -> None:
        self._reused = _zeros()
        self._ended = _zeros()
        self._factors = list(_USES)
        self._densities = [_densities([uses * rate for rate in _UNKNOWN]) for uses in _USES]

    def density(self, uses: int, age: int) -> float:
        """Expected reuses per time of an item, by its number of uses and the time since the last.

        The unit of time is a use of any item.
        """
        (lower, share), bucket = use_class(uses), age_bucket(age)
        low = self._densities[lower][bucket]
        return low + share * (self._densities[lower + 1][bucket] - low)

    def end(self, uses: int, age: int, *, reused: bool) -> None:
        """Note that an item was used again at some age, or that the cache no longer knows of it."""
        (lower, share), bucket = use_class(uses), age_bucket(age)
        for kind, part in ((lower, 1 - share), (lower + 1, share)):
            self._ended[kind][bucket] += part
            self._reused[kind][bucket] += part * reused

    def learn(self, waiting: Sequence[tuple[int, int]]) -> None:
        """Compute the densities anew from all that was noted.

        Args:
            waiting: Uses and age of each item that may still be used again.
        """
        alive = _zeros()
        for uses, age in waiting:
            (lower, share), bucket = use_class(uses), age_bucket(age)
            alive[lower][bucket] += 1 - share
            alive[lower + 1][bucket] += share
        lived = [_lived(*counts) for counts in zip(self._ended, alive, strict=True)]
        rates = self._fit(lived)
        self._densities = [
            _densities(
                [
                    (count + _OWN) / (time + _OWN / (factor * rate))
                    for count, time, rate in zip(reused, times, rates, strict=True)
                ]
            )
            for factor, reused, times in zip(self._factors, self._reused, lived, strict=True)
        ]
        for counts in (*self._reused, *self._ended):
            counts[:] = [_MEMORY * count for count in counts]

    def _fit(self, lived: list[Counts]) -> Counts:
        """Fit the rates by age, and the factors by uses with them."""
        reused, by_class = _total(self._reused), [sum(counts) for counts in self._reused]
        rates = self._by_age(reused, lived)
        for _ in range(_ROUNDS):
            # A class with few ends is to the one before it as their numbers of uses.
            factor, uses = 1.0, 1.0
            for kind, (count, times) in enumerate(zip(by_class, lived, strict=True)):
                expected = sum(time * rate for time, rate in zip(times, rates, strict=True))
                prior = factor * _USES[kind] / uses
                factor, uses = (count + prior) / (expected + 1), _USES[kind]
                self._factors[kind] = factor
            # Only products of rates and factors matter; this keeps both in range.
            if total := sum(by_class):
                pairs = zip(by_class, self._factors, strict=True)
                mean = sum(count * factor for count, factor in pairs) / total
                self._factors = [factor / mean for factor in self._factors]
            rates = self._by_age(reused, lived)
        return rates

    def _by_age(self, reused: Counts, lived: list[Counts]) -> Counts:
        """Rates by age for the present factors."""
        times = [
            sum(factor * time for factor, time in zip(self._factors, column, strict=True))
            for column in zip(*lived, strict=True)
        ]
        rate = (sum(reused) + 0.1) / (sum(times) + 1)
        # How much the rates differ beyond chance (gamma-Poisson, by moments): variance of the
        # counts above Poisson's, next to the square of what is expected.
        expected = [time * rate for time in times]
        pairs = list(zip(reused, expected, strict=True))
        beyond = sum((count - mean) ** 2 - count for count, mean in pairs)
        square = sum(mean**2 for mean in expected)
        low, high = _SMOOTH
        smooth = min(max(square / beyond, low), high) if beyond > 0 else high
        rates = []
        for count, time in zip(reused, times, strict=True):
            rate = (count + smooth) / (time + smooth / rate)
            rates.append(rate)
        return rates


def _zeros() -> list[Counts]:
    return [[0.0] * _BUCKETS for _ in range(_CLASSES)]


def _total(classes: list[Counts]) -> Counts:
    return [sum(counts) for counts in zip(*classes, strict=True)]


def _lived(ended: Counts, alive: Counts) -> Counts:
    """Time that items spent at each age."""
    lived = [0.0] * _BUCKETS
    older = 0.0
    for bucket in reversed(range(_BUCKETS)):
        here = ended[bucket] + alive[bucket]
        # Items that ended in this bucket were there for half of it on average.
        lived[bucket] = (older + here / 2) * _WIDTHS[bucket]
        older += here
    return lived


def _densities(rates: Counts) -> Counts:
    """Largest ratio of the chance of a reuse to the time held, from each age on."""
    found = [0.0] * _BUCKETS
    # Chance of a reuse, time held and chance to get beyond, of runs of buckets that are worth
    # holding to their end once they are entered; the run of the lowest ages is last.
    runs: list[tuple[float, float, float]] = []
    for bucket in reversed(range(_BUCKETS)):
        chance = -math.expm1(-rates[bucket] * _WIDTHS[bucket])
        held, beyond = chance / rates[bucket], 1 - chance
        while runs and runs[-1][0] * held > chance * runs[-1][1]:
            later, longer, past = runs.pop()
            chance, held, beyond = (
                chance + beyond * later,
                held + beyond * longer,
                beyond * past,
            )
        runs.append((chance, held, beyond))
        found[bucket] = chance / held
    return found
