"""Eviction policies on traces, next to the optimum."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.tools.bench.cache_policies import (
    BAR,
    CASES,
    KNOWING,
    OURS,
    Case,
    shares_of_optimum,
)
from vllm_mm_ext.tools.bench.simulate import POLICIES, cost_saved, optimum
from vllm_mm_ext.tools.bench.traces import FAMILIES, Request, Trace


def belady(trace: Trace, capacity: int) -> int:
    """Hits of Belady's rule for items of one size: evict what is used again last."""
    cached: set[int] = set()
    hits = 0
    for step, request in enumerate(trace):
        hits += request.key in cached
        cached.add(request.key)
        if len(cached) > capacity:
            later = [use.key for use in trace[step + 1 :]]
            cached.remove(
                max(cached, key=lambda key: later.index(key) if key in later else len(trace))
            )
    return hits


def best_of_all(trace: Trace, capacity: float) -> float:
    """The most that can be saved, by trying everything."""
    states: dict[frozenset[Request], float] = {frozenset(): 0.0}
    for request in trace:
        after: dict[frozenset[Request], float] = {}
        for held, saved in states.items():
            gain = request.cost if request in held else 0.0
            items = held | {request}
            for kept in _subsets(items, capacity):
                after[kept] = max(after.get(kept, 0.0), saved + gain)
        states = after
    return max(states.values())


def _subsets(items: frozenset[Request], capacity: float) -> list[frozenset[Request]]:
    found: list[frozenset[Request]] = [frozenset()]
    for item in items:
        found += [kept | {item} for kept in found]
    return [kept for kept in found if sum(item.size for item in kept) <= capacity]


EQUAL = st.lists(st.integers(0, 6), min_size=1, max_size=25).map(
    lambda keys: [Request(key, 1.0, 1.0) for key in keys]
)
UNEQUAL = st.lists(st.integers(0, 4), min_size=1, max_size=12).map(
    lambda keys: [Request(key, 1.0 + key % 3, 1.0 + (key * 2) % 5) for key in keys]
)


@given(EQUAL, st.integers(1, 4))
@settings(max_examples=40)
def test_the_optimum_of_equal_items_is_beladys(trace: Trace, capacity: int) -> None:
    assert optimum(trace, capacity) == pytest.approx(belady(trace, capacity), abs=1e-6)


@given(UNEQUAL, st.integers(1, 6))
@settings(max_examples=40)
def test_the_optimum_bounds_what_can_be_saved(trace: Trace, capacity: int) -> None:
    best = best_of_all(trace, capacity)
    assert optimum(trace, capacity) >= best - 1e-6
    for make in POLICIES.values():
        assert cost_saved(make(), trace, capacity) <= best + 1e-6


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_room_for_everything_saves_all_that_can_be_saved(family: str, name: str) -> None:
    trace = FAMILIES[family](0, length=600)
    capacity = sum({request.key: request.size for request in trace}.values())
    saved = cost_saved(POLICIES[name](), trace, capacity)
    assert saved == pytest.approx(optimum(trace, capacity))


# What learning may cost in 3,000 requests, next to knowing the distributions and when scans begin:
# little on Zipf and sessions, up to 0.05 of the optimum on scans, as nothing announces them.
LEARNING = 0.06


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_eviction_is_never_clearly_below_lru_and_close_to_what_can_be_known(case: Case) -> None:
    for seed in (11, 12):
        shares = shares_of_optimum(case, seed, length=3000)
        assert shares[OURS] >= 0.98 * shares["LRU"]
        assert shares[OURS] >= shares[KNOWING] - LEARNING
        if shares[KNOWING] >= BAR + LEARNING:
            assert shares[OURS] >= BAR
