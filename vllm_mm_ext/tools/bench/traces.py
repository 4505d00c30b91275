"""Traces of requests for cached items, of the three kinds eviction is judged by."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One use of an item.

    Attributes:
        key: Names the item; the same key always has the same size and cost.
        size: Bytes (or blocks) it takes when cached.
        cost: What computing it takes, in any one unit.
    """

    key: int
    size: float
    cost: float


Trace = Sequence[Request]
WORKING_SET = {"zipf": 400, "sessions": 60, "scans": 100}
"""Of each family, the number of items that are asked for again and again at any time."""
_EXPONENTS = {"zipf": 1.0, "scans": 0.7}
TURNS = 5.0
"""Mean number of turns of a conversation."""
THINK_SPREAD = 0.6
"""Standard deviation of the logarithm of think times, whose median is 1."""
BETWEEN_SCANS, SCAN = 225, 150
"""Requests for the working set between two scans, and items of one scan."""


class _Items:
    """Items with sizes and costs drawn once, in the order they are first asked for."""

    def __init__(self, rng: random.Random, equal: bool) -> None:
        self._rng = rng
        self._equal = equal
        self._made: list[Request] = []

    def new(self) -> Request:
        # Sizes spread like those of clips of different lengths. A byte of encoder output costs
        # more to make where tokens were merged, or frames are large.
        size = 1.0 if self._equal else min(max(self._rng.lognormvariate(0.0, 0.8), 0.1), 10.0)
        density = 1.0 if self._equal else self._rng.choice((1.0, 1.0, 2.0, 4.0))
        item = Request(len(self._made), size, size * density)
        self._made.append(item)
        return item


def zipf(seed: int, *, length: int = 4000, equal: bool = False) -> Trace:
    """Independent requests whose popularity falls with rank (Zipf's law, exponent 1).

    Args:
        seed: Of the random numbers.
        length: Number of requests.
        equal: All sizes and costs are 1.
    """
    rng = random.Random(seed)
    made = _Items(rng, equal)
    weights = popularity("zipf")
    population = [made.new() for _ in weights]
    return rng.choices(population, weights, k=length)


def sessions(seed: int, *, length: int = 4000, equal: bool = False) -> Trace:
    """Conversations, each about its own video, with think time between their turns.

    One that ends, after a geometric number of turns, is followed by a new one.

    Args:
        seed: Of the random numbers.
        length: Number of requests.
        equal: All sizes and costs are 1.
    """
    rng = random.Random(seed)
    made = _Items(rng, equal)
    due = [(rng.expovariate(1.0), number, made.new()) for number in range(WORKING_SET["sessions"])]
    heapq.heapify(due)
    trace = []
    for _ in range(length):
        now, number, item = heapq.heappop(due)
        trace.append(item)
        if rng.random() < 1.0 / TURNS:
            item = made.new()
        # Think time: rarely short, now and then very long.
        heapq.heappush(due, (now + rng.lognormvariate(0.0, THINK_SPREAD), number, item))
    return trace


def scans(seed: int, *, length: int = 4000, equal: bool = False) -> Trace:
    """A working set, interrupted by runs over items that never come back (batch jobs).

    Args:
        seed: Of the random numbers.
        length: Number of requests.
        equal: All sizes and costs are 1.
    """
    rng = random.Random(seed)
    made = _Items(rng, equal)
    weights = popularity("scans")
    population = [made.new() for _ in weights]
    trace: list[Request] = []
    while len(trace) < length:
        trace += rng.choices(population, weights, k=BETWEEN_SCANS)
        trace += [made.new() for _ in range(SCAN)]
    return trace[:length]


def popularity(family: str) -> list[float]:
    """Shares of the requests for ``zipf``'s items, or for the working set of ``scans``.

    An item's place is its key.
    """
    weights = [rank ** -_EXPONENTS[family] for rank in range(1, WORKING_SET[family] + 1)]
    return [weight / sum(weights) for weight in weights]


FAMILIES: dict[str, Callable[..., Trace]] = {"zipf": zipf, "sessions": sessions, "scans": scans}
