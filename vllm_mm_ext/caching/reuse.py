"""How soon cached items are used again, learnt from what happens to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Ages fall into half octaves; the last bucket begins at 2**17.5 uses.
_PER_OCTAVE = 2
_BUCKETS = 36
_EDGES = [0.0, *(2 ** (bucket / _PER_OCTAVE) for bucket in range(1, _BUCKETS + 1))]
_WIDTHS = [_EDGES[bucket + 1] - _EDGES[bucket] for bucket in range(_BUCKETS)]
# Before anything is known: the longer ago an item was used, the longer until it is used again.
_UNKNOWN = [0.5 / (edge + 1) for edge in _EDGES[:_BUCKETS]]
# Items used 1, 2, 3 times, then octaves.
_CLASSES = 9
# Weight of what was learnt before, each time the densities are made anew.
_MEMORY = 0.5

Counts = list[float]


def use_class(uses: int) -> int:
    """The class of items that were used as often as this (at least once)."""
    return uses if uses < 4 else min(uses.bit_length() + 1, _CLASSES - 1)


def age_bucket(age: int) -> int:
    """The bucket of an age: uses of any item since the item's own last one."""
    return min(int(_PER_OCTAVE * math.log2(age)), _BUCKETS - 1) if age > 1 else 0


class ReuseModel:
    """Expected reuses per time that an item is kept, by how often and how long ago it was used.

    From ends (an item was used again at some age, or given up at it) follow the rates of reuse in
    each bucket of ages, for each class of uses; classes with few ends lean on all of them
    together. The density of an item is the largest ratio, over all times to keep it at most that
    long, of its chance to be used to the time it is held for: the Gittins index of keeping it
    (Gittins, J. R. Stat. Soc. B 41(2), 1979), which refines the hit density of Beckmann et al.
    ("LHD: Improving Cache Hit Rate by Maximizing Hit Density", NSDI 2018). Old ends count less
    and less, so it follows changing traffic.
    """

    def __init__(self) -> None:
        self._reused = _zeros()
        self._ended = _zeros()
        self._densities = [_densities(_UNKNOWN)] * _CLASSES

    def density(self, uses: int, age: int) -> float:
        """Expected reuses per use of any item, of one used so often and so long ago."""
        return self._densities[use_class(uses)][age_bucket(age)]

    def end(self, uses: int, age: int, *, reused: bool) -> None:
        """An item was used again at this age, or nobody looks any longer whether it is."""
        kind, bucket = use_class(uses), age_bucket(age)
        self._ended[kind][bucket] += 1
        self._reused[kind][bucket] += reused

    def learn(self, waiting: Sequence[tuple[int, int]]) -> None:
        """Make the densities anew.

        Args:
            waiting: Uses and age of all items that may still be used again.
        """
        alive = _zeros()
        for uses, age in waiting:
            alive[use_class(uses)][age_bucket(age)] += 1
        known = _rates(_total(self._reused), _total(self._ended), _total(alive), _UNKNOWN)
        self._densities = [
            _densities(_rates(*counts, known))
            for counts in zip(self._reused, self._ended, alive, strict=True)
        ]
        for counts in (*self._reused, *self._ended):
            counts[:] = [_MEMORY * count for count in counts]


def _zeros() -> list[Counts]:
    return [[0.0] * _BUCKETS for _ in range(_CLASSES)]


def _total(classes: list[Counts]) -> Counts:
    return [sum(counts) for counts in zip(*classes, strict=True)]


def _rates(reused: Counts, ended: Counts, alive: Counts, prior: Counts) -> Counts:
    """Reuses per time at each age; the prior counts as one item that lived through all ages."""
    rates = [0.0] * _BUCKETS
    older = 0.0
    for bucket in reversed(range(_BUCKETS)):
        here = ended[bucket] + alive[bucket]
        width = _WIDTHS[bucket]
        # Items that ended in this bucket were there for half of it on average.
        lived = (older + here / 2) * width
        rates[bucket] = (reused[bucket] + prior[bucket] * width) / (lived + width)
        older += here
    return rates


def _densities(rates: Counts) -> Counts:
    stays = [math.exp(-rate * width) for rate, width in zip(rates, _WIDTHS, strict=True)]
    # Time spent in a bucket by what enters it, if it is kept until its end.
    times = [(1 - stay) / rate for stay, rate in zip(stays, rates, strict=True)]
    found = []
    for begin in range(_BUCKETS):
        there, held, best = 1.0, 0.0, 0.0
        for bucket in range(begin, _BUCKETS):
            held += there * times[bucket]
            there *= stays[bucket]
            best = max(best, (1 - there) / held)
        found.append(best)
    return found
