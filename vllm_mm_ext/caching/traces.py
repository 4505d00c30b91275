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
ZIPF, SCANNED = 1.0, 0.7
"""Exponents of the popularity in ``zipf``, and in the working set of ``scans``."""


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


def zipf(seed: int, *, length: int = 4000, items: int = 400, equal: bool = False) -> Trace:
    """Independent requests whose popularity falls with rank (Zipf's law, exponent 1).

    Args:
        seed: Of the random numbers.
        length: Number of requests.
        items: Number of items.
        equal: All sizes and costs are 1.
    """
    rng = random.Random(seed)
    made = _Items(rng, equal)
    population = [made.new() for _ in range(items)]
    return rng.choices(population, _zipf_weights(items, ZIPF), k=length)


def sessions(
    seed: int,
    *,
    length: int = 4000,
    active: int = 60,
    turns: float = 5.0,
    equal: bool = False,
) -> Trace:
    """Conversations, each about its own video, with think time between their turns.

    Args:
        seed: Of the random numbers.
        length: Number of requests.
        active: Conversations going on at any time; one that ends is followed by a new one.
        turns: Mean number of turns (geometric), at least 1.
        equal: All sizes and costs are 1.
    """
    rng = random.Random(seed)
    made = _Items(rng, equal)
    due = [(rng.expovariate(1.0), number, made.new()) for number in range(active)]
    heapq.heapify(due)
    trace = []
    for _ in range(length):
        now, number, item = heapq.heappop(due)
        trace.append(item)
        if rng.random() < 1.0 / turns:
            item = made.new()
        # Think time: rarely short, now and then very long.
        heapq.heappush(due, (now + rng.lognormvariate(0.0, 0.6), number, item))
    return trace


def scans(
    seed: int,
    *,
    length: int = 4000,
    items: int = 100,
    scan: int = 150,
    share: float = 0.4,
    equal: bool = False,
) -> Trace:
    """A working set, interrupted by runs over items that never come back (batch jobs).

    Args:
        seed: Of the random numbers.
        length: Number of requests.
        items: Items of the working set, with Zipf popularity.
        scan: Items of one run.
        share: Share of all requests that belong to runs.
        equal: All sizes and costs are 1.
    """
    rng = random.Random(seed)
    made = _Items(rng, equal)
    population = [made.new() for _ in range(items)]
    weights = _zipf_weights(items, SCANNED)
    trace: list[Request] = []
    while len(trace) < length:
        trace += rng.choices(population, weights, k=round(scan * (1 - share) / share))
        trace += [made.new() for _ in range(scan)]
    return trace[:length]


def popularity(family: str) -> dict[int, float]:
    """How often each item is asked for, relative to others; empty where that changes with time.

    Args:
        family: Of ``FAMILIES``, with the numbers of items its trace has by default.
    """
    if family == "zipf":
        return dict(enumerate(_zipf_weights(400, ZIPF)))
    return dict(enumerate(_zipf_weights(100, SCANNED))) if family == "scans" else {}


def _zipf_weights(items: int, exponent: float) -> list[float]:
    return [rank**-exponent for rank in range(1, items + 1)]


FAMILIES: dict[str, Callable[..., Trace]] = {"zipf": zipf, "sessions": sessions, "scans": scans}
