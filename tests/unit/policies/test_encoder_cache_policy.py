"""The byte budget of the encoder cache's tiers, without vLLM."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from vllm_mm_ext.policies.encoder_cache.byte_cache import ByteCache
from vllm_mm_ext.policies.encoder_cache.host_tier import HostPlan, HostTier
from vllm_mm_ext.policies.encoder_cache.items import OutputBytes, deepstack_levels, encode_cost


@dataclass
class Model:
    """A cache of the same budget that only knows what is in it, who uses it and what must stay."""

    capacity: int
    sizes: dict[str, int] = field(default_factory=dict)
    users: dict[str, set[str]] = field(default_factory=dict)

    def remove(self, keys: list[str]) -> None:
        for key in keys:
            assert not self.users.pop(key), f"{key} was in use"
            del self.sizes[key]

    @property
    def held(self) -> int:
        return sum(size for size in self.sizes.values() if size <= self.capacity)

    @property
    def busy(self) -> int:
        return sum(
            size for key, size in self.sizes.items() if size <= self.capacity and self.users[key]
        )


@pytest.mark.parametrize("seed", range(4))
def test_long_random_runs_agree_with_a_simple_model(seed: int) -> None:
    rng = random.Random(seed)
    cache, model = ByteCache(100), Model(100)
    keys = {f"item {number}": rng.choice((5, 10, 20, 40, 150)) for number in range(40)}
    for _ in range(4000):
        key, user = rng.choice(list(keys)), f"user {rng.randrange(4)}"
        size, roll = keys[key], rng.random()
        if roll < 0.5 and key not in cache:
            room = cache.passing is None if size > 100 else cache.fits(size)
            assert room == (
                model.busy + size <= 100
                if size <= 100
                else all(s <= 100 for s in model.sizes.values())
            )
            if room:
                before = model.held
                gone = cache.evict_to_fit(size) if size <= 100 else []
                last = model.sizes[gone[-1]] if gone else 0
                model.remove(gone)
                # No more went than had to.
                assert not gone or before - sum(keys[one] for one in gone) + last + size > 100
                cache.add(key, size, rng.random(), user)
                model.sizes[key], model.users[key] = size, {user}
        elif roll < 0.6 and key in cache:
            cache.use(key, user)
            model.users[key].add(user)
        elif roll < 0.95 and key in cache:
            model.users[key].discard(user)
            model.remove(cache.release(key, user))
        elif roll < 0.96 and key in cache:
            cache.drop(key)
            del model.sizes[key], model.users[key]
        elif roll > 0.9995:
            cache.clear()
            model = Model(100)
        cache.check_integrity()
        assert {one for one in keys if one in cache} == model.sizes.keys()
        assert all(cache.users(one) == found for one, found in model.users.items())
        assert (cache.held, cache.busy) == (model.held, model.busy)
        assert cache.held <= 100


def test_an_item_larger_than_the_budget_disturbs_nothing_and_leaves_with_its_last_user() -> None:
    cache = ByteCache(100)
    cache.add("small", 60, 1.0, "a")
    cache.release("small", "a")
    cache.add("huge", 500, 1.0, "a")
    cache.use("huge", "b")
    assert "small" in cache
    assert cache.held == 60
    with pytest.raises(ValueError, match="wait"):
        cache.add("other huge", 400, 1.0, "c")
    assert cache.release("huge", "a") == []
    assert cache.release("huge", "b") == ["huge"]
    assert cache.passing is None
    assert "small" in cache
    cache.check_integrity()


def test_what_was_overdrawn_is_evicted_when_it_is_free() -> None:
    cache = ByteCache(100)
    cache.add("video", 80, 1.0, "a")
    cache.add("sound", 40, 1.0, "a", overdraw=True)
    assert cache.held == 120
    gone = [*cache.release("video", "a"), *cache.release("sound", "a")]
    assert len(gone) == 1
    assert cache.held <= 100
    cache.check_integrity()


def test_what_is_in_use_stays_and_what_is_too_much_is_refused() -> None:
    cache = ByteCache(100)
    cache.add("a", 60, 1.0, "user")
    assert not cache.fits(50)
    assert cache.evict_to_fit(50) == []
    with pytest.raises(ValueError, match="no room"):
        cache.add("b", 50, 1.0, "user")
    with pytest.raises(ValueError, match="already"):
        cache.add("a", 1, 1.0, "user")


def test_a_request_that_is_checked_step_by_step_uses_an_item_once() -> None:
    cache = ByteCache(100)
    cache.add("a", 10, 1.0, "first")
    cache.release("a", "first")
    assert cache.use("a", "second")
    cache.release("a", "second")
    assert not cache.use("a", "second")


class Worker:
    """A worker's side of the host tier: executes plans and holds keys."""

    def __init__(self) -> None:
        self.kept: set[str] = set()

    def execute(self, plan: HostPlan, encoded: set[str]) -> None:
        if plan.clear:
            self.kept.clear()
        self.kept -= plan.drops
        assert set(plan.loads) <= self.kept, "a load of what is not there"
        assert plan.saves <= encoded, "a save of what is not encoded"
        self.kept |= plan.saves


@pytest.mark.parametrize("seed", range(4))
def test_workers_that_follow_the_plans_hold_what_the_tier_believes(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {f"item {number}": rng.choice((5, 10, 30, 120)) for number in range(30)}
    tier, worker = HostTier(100), Worker()
    for step in range(2000):
        scheduled: dict[str, list[int]] = {}
        encoded: set[str] = set()
        seen: set[str] = set()
        for request in range(rng.randrange(4)):
            name = f"{step}/{request}"
            for index, key in enumerate(rng.sample(sorted(sizes), rng.randrange(4))):
                if key in seen:
                    continue  # The device tier has it.
                seen.add(key)
                loads = key in tier
                tier.allocated(key, sizes[key], 1.0, name, index)
                if rng.random() < 0.1:
                    tier.cancel(key)  # Preempted in the pass that scheduled it.
                elif not loads:
                    scheduled.setdefault(name, []).append(index)
                    encoded.add(key)
                tier.check_integrity()
        if rng.random() < 0.2:
            tier.used(rng.choice(sorted(sizes)))
        if not encoded and rng.random() < 0.5:
            tier.skip()
            tier.check_integrity()
            continue
        worker.execute(tier.plan(scheduled), encoded)
        tier.check_integrity()
        assert {key for key in sizes if key in tier} == worker.kept
        assert sum(sizes[key] for key in worker.kept) == tier.held <= 100
        if rng.random() < 0.01:
            tier.reset()
            assert not len(tier)


def test_an_output_is_loaded_from_the_pass_after_the_one_that_saves_it() -> None:
    tier = HostTier(100)
    tier.allocated("a", 10, 1.0, "r", 0)
    assert "a" not in tier
    assert tier.plan({"r": [0]}).saves == {"a"}
    assert "a" in tier
    tier.allocated("a", 10, 1.0, "s", 0)
    assert tier.plan({}).loads == ("a",)


def test_an_item_is_saved_for_a_later_request_if_it_was_not_encoded_for_an_earlier_one() -> None:
    tier = HostTier(100)
    tier.allocated("a", 10, 1.0, "preempted", 3)
    tier.allocated("a", 10, 1.0, "in the same pass", 0)
    assert tier.plan({"in the same pass": [0]}).saves == {"a"}
    tier.allocated("b", 10, 1.0, "preempted", 3)
    tier.skip()
    tier.allocated("b", 10, 1.0, "in the next pass", 0)
    assert tier.plan({"in the next pass": [0]}).saves == {"b"}
    tier.check_integrity()


def test_what_is_to_be_loaded_or_forgotten_outlasts_a_pass_that_does_nothing() -> None:
    tier = HostTier(100)
    tier.allocated("a", 10, 1.0, "r", 0)
    tier.plan({"r": [0]})
    tier.allocated("a", 10, 1.0, "s", 0)
    tier.skip()
    assert tier.plan({}).loads == ("a",)
    tier.reset()
    tier.skip()
    assert tier.plan({}).clear


def test_a_reset_forgets_all_and_tells_the_worker() -> None:
    tier = HostTier(100)
    tier.allocated("a", 10, 1.0, "r", 0)
    tier.plan({"r": [0]})
    tier.reset()
    assert "a" not in tier
    assert tier.plan({}).clear


def test_merged_tokens_cost_as_much_and_are_worth_more_per_byte() -> None:
    whole = encode_cost("video", 64, [64 * 4704])
    merged = encode_cost("video", 16, [64 * 4704])
    assert whole == merged == encode_cost("video", 64, None)
    assert encode_cost("audio", 25, [12800]) > encode_cost("image", 25, [12800])


def test_the_widest_modality_stands_for_what_is_not_told_apart() -> None:
    sizes = OutputBytes(100, {"video": 400, "audio": 100})
    assert (sizes.of("video"), sizes.of("other"), sizes.largest) == (400, 100, 400)
    assert OutputBytes(100, {}).largest == 100


@pytest.mark.parametrize("nested", [False, True])
def test_deepstack_layers_are_counted(nested: bool) -> None:
    make: Callable[..., SimpleNamespace] = SimpleNamespace
    config = make(vision_config=make(deepstack_visual_indexes=[8, 16, 24]))
    assert deepstack_levels(make(thinker_config=config) if nested else config) == 3
    assert deepstack_levels(make()) == 0
