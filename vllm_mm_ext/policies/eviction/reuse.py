"""Learns from the uses of cached items how soon items are used again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

# Ages fall into half octaves; the last bucket begins at 2**17.5 uses.
_PER_OCTAVE = 2
_BUCKETS = 36
_EDGES = [0.0, *(2 ** (bucket / _PER_OCTAVE) for bucket in range(1, _BUCKETS + 1))]
_WIDTHS = np.diff(_EDGES)
# Items used 1, 2, 3, 6, 12 ... times; those in between belong to two classes in part.
_CLASSES = 13
_USES = [1.0, 2.0, *(3.0 * 2**octave for octave in range(_CLASSES - 2))]
# Before anything is known: the chance of a reuse in an octave of age is the same in all, so that
# what was used longer ago is used again later.
_PRIOR = 0.3 / _WIDTHS
# Reuses that all items must have at an age to weigh as much as what is known beforehand; and a kind
# of items, as much as what is known of all.
_ALL, _KIND = 0.5, 1.0
# Reuses that are expected of a class before it weighs as much as the class below it.
_FACTOR = 2.0
# Factors and rates by age are fitted in turns, and go on where the last lesson left them.
_ROUNDS = 2
# Uses after which a use weighs 1 / e.
_MEMORY = 1000.0

Table = npt.NDArray[np.float64]


def _position(uses: int) -> tuple[int, float]:
    """The lower of the two classes of items used so often, and their share in the upper one."""
    place = uses - 1.0 if uses <= 3 else 2 + math.log2(uses / 3)
    lower = min(int(place), _CLASSES - 2)
    return lower, min(place - lower, 1.0)


def _place(age: int) -> tuple[int, float]:
    """The bucket whose middle is before an age, and how far the age is on the way to the next."""
    place = max(_PER_OCTAVE * math.log2(age) - 0.5, 0.0) if age > 1 else 0.0
    bucket = min(int(place), _BUCKETS - 2)
    return bucket, min(place - bucket, 1.0)


_POSITIONS = [_position(max(uses, 1)) for uses in range(int(_USES[-1]) + 1)]
_PLACES = [_place(age) for age in range(4096)]


def use_class(uses: int) -> tuple[int, float]:
    """The lower of the two classes of items used so often, and their share in the upper one.

    Args:
        uses: At least 1.
    """
    return _POSITIONS[min(uses, len(_POSITIONS) - 1)]


def age_bucket(age: int) -> int:
    """The bucket of an age: time since an item's last use."""
    return min(int(_PER_OCTAVE * math.log2(age)), _BUCKETS - 1) if age > 1 else 0


class ReuseModel:
    """Expected reuses per time that an item is kept, by its kind, its uses and its age.

    An item's time at an age ends when the item is used again or given up. From these ends the model
    learns rates of reuse: a rate by age times a factor by kind and uses (proportional hazards; Cox,
    J. R. Stat. Soc. B 34(2), 1972). From these depart the rates by age of a kind, as far as they
    have been seen (gamma-Poisson shrinkage). So the number of uses tells items of fixed popularity
    apart, and the time since the last use tells conversations with think time apart.

    The density of an item is the largest ratio, over all times to keep it at most that long, of
    its chance to be used to the time it is held for: the Gittins index of keeping it (Gittins, J.
    R. Stat. Soc. B 41(2), 1979), which refines the hit density of Beckmann et al. ("LHD: Improving
    Cache Hit Rate by Maximizing Hit Density", NSDI 2018). Old ends count less and less, so the
    model follows changing traffic.

    Args:
        levels: By kind of items, how often such items are used again as far as is known beforehand,
            in any one unit.
    """

    def __init__(self, levels: Sequence[float] = (1.0,)) -> None:
        shape = len(levels), _CLASSES, _BUCKETS
        self._levels = levels
        self._reused: Table = np.zeros(shape)
        self._ended: Table = np.zeros(shape)
        self._factors: Table = np.repeat(np.array(levels)[:, None], _CLASSES, axis=1)
        self._rates: Table = self._factors[..., None] * _PRIOR
        self._ends = 0
        # By kind and class, computed when they are asked for.
        self._densities: dict[tuple[int, int], list[float]] = {}

    def density(self, kind: int, uses: int, age: int) -> float:
        """Expected reuses per time of an item.

        Args:
            kind: Its kind.
            uses: How often it was used.
            age: Time since its last use.
        """
        lower, share = use_class(uses)
        # Between the middles of buckets, so that no edge decides.
        bucket, part = _PLACES[age] if age < len(_PLACES) else _place(age)
        densities = self._of(kind, lower)
        found = densities[bucket] + part * (densities[bucket + 1] - densities[bucket])
        if share:
            densities = self._of(kind, lower + 1)
            above = densities[bucket] + part * (densities[bucket + 1] - densities[bucket])
            found += share * (above - found)
        return found

    def end(self, kind: int, uses: int, age: int, *, reused: bool) -> None:
        """Note that an item was used again at some age, or that the cache no longer knows of it."""
        (lower, share), bucket = use_class(uses), age_bucket(age)
        for by_uses, part in ((lower, 1 - share), (lower + 1, share)):
            self._ended[kind, by_uses, bucket] += part
            self._reused[kind, by_uses, bucket] += part * reused
        self._ends += 1

    def learn(self, waiting: Iterable[tuple[int, int, int]], each: int = 1) -> None:
        """Compute the rates anew from all that was noted.

        Args:
            waiting: Kind, uses and age of items that may still be used again.
            each: How many such items each of them stands for.
        """
        alive = np.zeros_like(self._ended)
        for kind, uses, age in waiting:
            (lower, share), bucket = use_class(uses), age_bucket(age)
            alive[kind, lower, bucket] += 1 - share
            alive[kind, lower + 1, bucket] += share
        ends = self._ended + each * alive
        # Items that ended in a bucket were there for half of it on average.
        older = np.cumsum(ends[..., ::-1], axis=-1)[..., ::-1] - ends
        lived = (older + ends / 2) * _WIDTHS
        self._fit(lived)
        self._densities = {}
        memory = math.exp(-self._ends / _MEMORY)
        self._reused *= memory
        self._ended *= memory
        self._ends = 0

    def _fit(self, lived: Table) -> None:
        """Fit rates by age, of all and of each kind, and factors by kind and uses."""
        reused, factors = self._reused, self._factors
        by_class = reused.sum(axis=-1)
        for _ in range(_ROUNDS):
            times = factors[..., None] * lived
            base = (reused.sum(axis=(0, 1)) + _ALL) / (times.sum(axis=(0, 1)) + _ALL / _PRIOR)
            of_kind = (reused.sum(axis=1) + _KIND) / (times.sum(axis=1) + _KIND / base)
            expected = (lived * of_kind[:, None]).sum(axis=-1)
            below = np.array(self._levels)
            for by_uses in range(_CLASSES):
                seen = by_class[:, by_uses] + _FACTOR * below
                below = seen / (expected[:, by_uses] + _FACTOR)
                factors[:, by_uses] = below
            # Rates have the level, factors tell apart: where nothing comes back, that is learnt of
            # the ages that were seen.
            factors *= (expected.sum() + 1e-9) / ((factors * expected).sum() + 1e-9)
        self._rates = factors[..., None] * of_kind[:, None]

    def _of(self, kind: int, by_uses: int) -> list[float]:
        found = self._densities.get((kind, by_uses))
        if found is None:
            found = _densities(self._rates[kind, by_uses].tolist())
            self._densities[kind, by_uses] = found
        return found


def _densities(rates: list[float]) -> list[float]:
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
        found[bucket] = float(chance / held)
    return found
