"""The scheduler, the KV block pool and both tiers of the encoder cache, all at once."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from encoder_cache_harness import BLOCK, Engine, Item, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_mm_ext.policies.kv.control import KVControl
from vllm_mm_ext.scheduler import MMExtScheduler

TALKS = 7
# More than the device tier's budget in the long runs.
LARGE = 300
KV: dict[str, dict[str, Any]] = {
    "default": {},
    "little may be kept": {"max_visual_cache_share": 0.2, "min_items": 1},
    "pressure": {"max_visual_cache_share": 0.6, "pressure_limit": 0.7, "min_items": 0},
}


class Traffic:
    """Conversations about media that go on at random in an engine, and whatever else may happen.

    Args:
        engine: The engine, with the plugin's block pool.
        seed: Of the random numbers.
    """

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.wanted: dict[str, int] = {}
        self._rng = random.Random(seed)
        self._control = KVControl(engine.pool)
        self._talks: list[list[Item]] = [[] for _ in range(TALKS)]
        self._added = 0

    def run(self, operations: int) -> None:
        """So many random operations, then to the end; nothing is left and all is answered."""
        for _ in range(operations):
            self._operate(self._rng.random())
            self.engine.check_blocks()
        self.engine.run()
        answers = self.engine.answers
        assert {name: answers[name] for name in self.wanted} == self.wanted
        self._nothing_is_left()

    def _operate(self, roll: float) -> None:
        engine, rng = self.engine, self._rng
        scheduler = engine.scheduler
        if roll < 0.25 and len(scheduler.requests) < 8:
            self._ask()
        elif roll < 0.28 and scheduler.requests:
            name = rng.choice(sorted(scheduler.requests))
            engine.abort(name)
            del self.wanted[name]
        elif roll < 0.29:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        elif roll < 0.295:
            # What runs has to begin again with the new weights.
            engine.drain()
            scheduler.reset_prefix_cache(reset_running_requests=True)
            engine.reset()
        elif roll < 0.31:
            blocks = engine.pool.blocks
            ids = rng.sample(range(1, len(blocks)), 3)
            scheduler.kv_cache_manager.evict_blocks({i for i in ids if not blocks[i].ref_cnt})
        elif roll < 0.33:
            action = getattr(self._control, rng.choice(("pin", "unpin", "unpin", "release")))
            action(f"talk {rng.randrange(TALKS)}")
        elif engine.busy:
            engine.step()

    def _ask(self) -> None:
        """A conversation goes on, most often about more media, or a text comes."""
        rng, name = self._rng, f"r{self._added}"
        number = rng.randrange(TALKS)
        items = self._talks[number]
        if rng.random() < 0.6:
            items += _media(rng.randrange(24))
        if sum(item.tokens for item in items) > self._most():
            items.clear()
        shown = [] if rng.random() < 0.2 else list(items)
        # Long answers outgrow the blocks there are.
        answer = rng.choice((1, 3, 3, 40, 90))
        one = request(
            name,
            shown,
            priority=rng.randrange(3),
            answer=answer,
            begins=f"talk {number}" if shown else None,
            text=rng.choice((8, 8, 40, 150)),
            # Some clients send none.
            session=f"talk {number}" if number % 3 else None,
        )
        self.engine.add(one)
        self.wanted[name] = answer
        self._added += 1

    def _most(self) -> int:
        """Tokens of media that leave room for text and answer."""
        return BLOCK * int(self.engine.pool.num_gpu_blocks - 1) - 300

    def _nothing_is_left(self) -> None:
        engine, scheduler, pool = self.engine, self.engine.scheduler, self.engine.pool
        assert not scheduler.requests
        assert not scheduler._prompts.arrivals
        assert not engine.manager._inputs
        # All of the pool can be had, whatever is kept.
        taken = pool.get_new_blocks(pool.num_gpu_blocks - 1)
        pool.free_blocks(taken)
        assert not len(pool.tree)
        pool.check_integrity()

    def seen(self) -> Counter[str]:
        """How often what the run is about has happened."""
        engine = self.engine
        return Counter(
            preempted=engine.preempted,
            found=engine.found,
            given_up=engine.given_up,
            evicted=engine.evicted,
            loaded=len(engine.loaded),
            encoded=len(engine.encoded),
        )


def _media(number: int) -> list[Item]:
    name = f"item {number}"
    made = [Item(name, LARGE if number % 9 == 8 else 30 + 37 * (number % 6))]
    if number % 5 == 4:
        made.append(Item(f"{name}, sound", 24, joins=True))
    return made


def _run(seed: int, operations: int, **options: Any) -> Counter[str]:
    depth = options["depth"]
    engine = Engine(scheduler=MMExtScheduler, slots=4, **options)
    assert isinstance(engine.scheduler, AsyncScheduler) == (depth > 1)
    traffic = Traffic(engine, seed)
    traffic.run(operations)
    return traffic.seen()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_scheduler_blocks_tiers_and_worker_agree_after_every_step_of_a_long_run(
    policy: str, depth: int
) -> None:
    """Admit, extend, end, abort, preempt, reset, evict; the harness plays and checks the worker."""
    seen = _run(
        len(policy),
        1500,
        device=256,
        host=1024,
        blocks=110,
        policy=policy,
        depth=depth,
        kv=KV["default"],
        settings={"target_itl_ms": 50.0, "aging_s": 4.0},
    )
    # Otherwise it would prove little.
    assert seen["preempted"] > 20
    assert seen["found"] > 20 * BLOCK
    assert seen["given_up"] > 20
    assert seen["evicted"] > 20
    assert seen["loaded"] > 20


def test_they_agree_whatever_their_sizes_and_settings_are() -> None:
    seen: Counter[str] = Counter()

    @given(
        seed=st.integers(0, 1 << 30),
        blocks=st.integers(64, 200),
        device=st.integers(40, 700),
        host=st.integers(100, 2000),
        name=st.sampled_from(list(KV)),
        policy=st.sampled_from(["fcfs", "priority"]),
        depth=st.sampled_from([1, 2]),
        aging_s=st.sampled_from([0.5, 4.0, 60.0]),
        target_ms=st.sampled_from([1.0, 50.0, 1000.0]),
        read_ahead=st.sampled_from([0, 0, 1, 3]),
    )
    @settings(
        max_examples=25,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    def each(
        seed: int,
        blocks: int,
        device: int,
        host: int,
        name: str,
        policy: str,
        depth: int,
        aging_s: float,
        target_ms: float,
        read_ahead: int,
    ) -> None:
        seen.update(
            _run(
                seed,
                120,
                device=device,
                host=host,
                blocks=blocks,
                policy=policy,
                depth=depth,
                kv=KV[name],
                settings={"target_itl_ms": target_ms, "aging_s": aging_s},
                read_ahead=read_ahead,
            )
        )

    each()
    assert all(seen[what] > 20 for what in ("preempted", "found", "given_up", "evicted", "loaded"))


def test_what_is_found_behind_a_cut_takes_no_room_from_what_is_lacking_before_it() -> None:
    """An item larger than the device's budget, on the device, behind a picture and its sound."""
    options: dict[str, Any] = {"policy": "fcfs", "depth": 1, "kv": KV["default"]}
    settings = {"aging_s": 60.0, "target_itl_ms": 1.0}
    seen = _run(646225679, 300, blocks=157, device=195, host=1349, settings=settings, **options)
    assert seen["loaded"] > 0


def test_a_picture_and_its_sound_do_not_wait_for_each_other_whichever_is_there() -> None:
    """A video is found in KV up to its sound's last embeddings; the device has one of the two."""
    options: dict[str, Any] = {"policy": "fcfs", "depth": 1, "kv": KV["default"]}
    settings = {"aging_s": 60.0, "target_itl_ms": 1.0}
    _run(238, 150, blocks=159, device=86, host=1, settings=settings, **options)


def test_an_aged_request_without_room_leaves_tokens_to_those_that_hold_the_room() -> None:
    options: dict[str, Any] = {"policy": "priority", "depth": 2, "kv": KV["little may be kept"]}
    settings = {"aging_s": 0.5, "target_itl_ms": 50.0}
    _run(80, 150, blocks=133, device=241, host=1209, settings=settings, read_ahead=5, **options)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("device", [512, 1024, 2048])
def test_a_picture_and_its_sound_that_no_step_has_the_budget_for_are_served_and_stop_nobody(
    device: int, depth: int
) -> None:
    """vLLM bounds each item by itself; both together are more than a step may encode."""
    settings = {"aging_s": 0.5, "target_itl_ms": 50.0}
    engine = Engine(
        scheduler=MMExtScheduler, device=device, encoder_tokens=1024, depth=depth, settings=settings
    )
    engine.add(request("before", [Item("first", 200)], answer=40))
    engine.add(request("large", [Item("picture", 800), Item("sound", 400, joins=True)]))
    for number in range(60):
        if number % 4 == 0:
            engine.add(request(f"small {number}", [Item(f"item {number}", 100)]))
        engine.step()
    assert engine.answers["large"] == 3
    engine.run()
    assert all(engine.answers[f"small {number}"] == 3 for number in range(0, 60, 4))
