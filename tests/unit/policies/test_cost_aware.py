"""The cost-aware eviction policy by itself."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.policies.eviction import reuse_history
from vllm_mm_ext.policies.eviction.cost_aware import CostAware
from vllm_mm_ext.policies.eviction.reuse import ReuseModel, age_bucket, use_class
from vllm_mm_ext.policies.eviction.reuse_history import ReuseHistory

OPS = st.lists(
    st.tuples(st.sampled_from(["admit", "hit", "evict", "forget", "clear"]), st.integers(0, 120)),
    max_size=400,
)


def run(ops: list[tuple[str, int]]) -> CostAware[int]:
    policy: CostAware[int] = CostAware(ghosts=8)
    cached: set[int] = set()
    for op, key in ops:
        if op == "admit":
            policy.admit(key, 1 + key % 7, key % 5)
            cached.add(key)
        elif op == "hit" and key in cached:
            policy.hit(key)
        elif op == "evict" and cached:
            victim = policy.victim()
            assert victim in cached
            policy.evict(victim)
            cached.discard(victim)
        elif op == "forget":
            policy.forget(key)
            cached.discard(key)
        elif op == "clear" and key == 0:
            policy.clear()
            cached.clear()
        policy.check_integrity()
        assert len(policy) == len(cached)
        assert all(key in policy for key in cached)
    return policy


@given(OPS)
@settings(max_examples=60)
def test_it_holds_what_was_admitted_and_ranks_all_of_it(ops: list[tuple[str, int]]) -> None:
    policy = run(ops)
    scores = [policy.score(key) for key in policy.order()]
    assert len(scores) == len(policy)
    assert scores == sorted(scores)


@given(OPS)
@settings(max_examples=20)
def test_the_same_events_give_the_same_order(ops: list[tuple[str, int]]) -> None:
    first, second = run(ops), run(ops)
    assert list(first.order()) == list(second.order())
    assert first.victim() == second.victim()


@given(st.sets(st.integers(0, 300), min_size=1), st.sets(st.integers(0, 300)))
@settings(max_examples=60)
def test_a_victim_is_allowed_to_go(keys: set[int], kept: set[int]) -> None:
    policy: CostAware[int] = CostAware()
    for key in keys:
        policy.admit(key, 1.0, 1.0)
    victim = policy.victim(lambda key: key not in kept)
    assert (victim is None) == (keys <= kept)
    assert victim is None or victim in keys - kept


def test_few_items_are_ranked_exactly() -> None:
    policy: CostAware[int] = CostAware()
    for key in range(60):
        policy.admit(key, 1.0, 1.0 + (key * 7) % 60)
    assert policy.victim() == next(policy.order())


def test_what_costs_more_per_byte_stays() -> None:
    policy: CostAware[str] = CostAware()
    policy.admit("cheap", 10, 10)
    policy.admit("dear", 10, 40)
    policy.admit("small", 2, 10)
    assert list(policy.order()) == ["cheap", "dear", "small"]


def test_before_anything_is_known_what_was_not_used_for_long_goes_first() -> None:
    policy: CostAware[int] = CostAware()
    for key in range(7):
        policy.admit(key, 1, 1)
    assert list(policy.order())[:4] == [0, 1, 2, 3]


def test_it_learns_that_some_items_never_come_back() -> None:
    """Items asked for in pairs, next to items asked for once, all equally often and recently."""
    policy: CostAware[int] = CostAware()
    for turn in range(2000):
        policy.admit(turn, 1, 1)
        if turn % 2 == 0:
            policy.hit(turn)
        if len(policy) > 50:
            policy.evict(policy.victim() or 0)
    policy.admit(10**6, 1, 1)
    policy.hit(10**6)
    policy.admit(10**6 + 1, 1, 1)
    # The pair is complete; nothing used twice has ever been used a third time.
    assert policy.score(10**6) < policy.score(10**6 + 1)


def test_an_item_that_comes_back_after_eviction_is_not_new() -> None:
    policy: CostAware[str] = CostAware()
    rng = random.Random(0)
    for _ in range(300):  # Popular items are used again soon, others never.
        name = f"popular {rng.randrange(4)}"
        policy.admit(name, 1, 1)
        policy.admit(f"once {rng.random()}", 1, 1)
    policy.evict("popular 0")
    policy.admit("popular 0", 1, 1)
    policy.admit("new", 1, 1)
    assert policy.score("popular 0") > policy.score("new")


@pytest.mark.parametrize(("size", "cost"), [(0, 1), (-1, 1), (1, -1), (float("nan"), 1)])
def test_sizes_and_costs_out_of_range_are_refused(size: float, cost: float) -> None:
    policy: CostAware[str] = CostAware()
    with pytest.raises(ValueError, match="size must be above 0"):
        policy.admit("item", size, cost)


def test_nothing_known_means_recency() -> None:
    model = ReuseModel()
    densities = [model.density(0, 1, age) for age in range(3, 2000)]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > 100 * densities[-1]


def test_where_nothing_came_back_so_far_what_has_waited_longest_is_expected_first() -> None:
    """Conversations that take turns: keeping those of which more is known already is no use."""
    history: ReuseHistory[int] = ReuseHistory()
    for key in range(64):
        history.add(key)
        history.tick()
    assert history.rate(2) > history.rate(60)


def test_kinds_are_told_apart_by_what_comes_back_of_each() -> None:
    history: ReuseHistory[str] = ReuseHistory(levels=(1.0, 1.0))
    for turn in range(400):
        history.add(f"once {turn}", 0)
        if turn < 4:
            history.add(f"again {turn}", 1)
        else:
            history.use(f"again {turn % 4}")
        history.tick()
    history.add("new", 0)
    history.add("other", 1)
    assert history.rate("other") > 5 * history.rate("new")


def test_what_all_requests_share_stays_and_teaches_nothing_of_other_items() -> None:
    def traffic(*, shared: bool) -> ReuseHistory[int]:
        """Every second item comes back, once and after 20 requests."""
        history: ReuseHistory[int] = ReuseHistory()
        if shared:
            history.add(-1)
        for number in range(100):
            if shared and number:
                history.use(-1)
            history.add(number)
            if number >= 20 and number % 2:
                history.use(number - 20)
            history.tick()
        return history

    with_it, without = traffic(shared=True), traffic(shared=False)
    assert with_it.rate(-1) > max(with_it.rate(number) for number in range(100))
    assert with_it.rate(99) == pytest.approx(without.rate(99), rel=0.1)


def test_what_continues_an_item_counts_as_used_as_often() -> None:
    history: ReuseHistory[str] = ReuseHistory()
    history.add("talk")
    for _ in range(3):
        history.use("talk")
    history.add("next", like="talk")
    history.divide("talk", "rest of talk")
    assert history.rate("next") == history.rate("talk") == history.rate("rest of talk")
    history.check_integrity()


@given(st.integers(1, 10**6))
def test_classes_and_buckets_ascend(number: int) -> None:
    assert sum(use_class(number)) <= sum(use_class(number + 1))
    assert age_bucket(number) <= age_bucket(number + 1)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 10**6), st.booleans()), max_size=200),
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 10**6)), max_size=50),
)
@settings(max_examples=50)
def test_densities_are_positive_and_finite(
    ends: list[tuple[int, int, bool]], waiting: list[tuple[int, int]]
) -> None:
    model = ReuseModel()
    for uses, age, reused in ends:
        model.end(0, uses, age, reused=reused)
    model.learn([(0, uses, age) for uses, age in waiting])
    assert all(
        0 < model.density(0, uses, age) < float("inf")
        for uses in (1, 2, 3, 9, 99)
        for age in (0, 1, 17, 4000, 10**7)
    )


def test_a_lesson_that_looks_at_every_few_items_teaches_nearly_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = []
    for looked_at in (256, 1 << 20):
        monkeypatch.setattr(reuse_history, "_LOOKED_AT", looked_at)
        history: ReuseHistory[int] = ReuseHistory(ghosts=500)
        for number in range(4000):
            history.tick()
            history.add(number)
            if number % 3 == 0 and number >= 300:
                history.use(number - 300)
            if number >= 600:
                history.evict(number - 600)
        rates.append([history.rate(number) for number in range(3400, 4000, 50)])
    assert rates[0] == pytest.approx(rates[1], rel=0.3)
