"""Both tiers of the encoder cache under vLLM's real scheduler."""

from __future__ import annotations

import random
from typing import Any

import pytest
from encoder_cache_harness import BLOCK, WIDTH, Engine, Item, request
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_mm_ext.scheduler import MMExtScheduler

EMBEDDING = 4 * WIDTH
# And steps in flight.
SCHEDULERS = [(Scheduler, 1), (MMExtScheduler, 1), (AsyncScheduler, 2), (MMExtScheduler, 2)]


def items_of(number: int) -> list[Item]:
    name = f"item {number}"
    made = [Item(name, 40 + 37 * (number % 7))]
    if number % 9 == 8:
        made = [Item(name, 600)]  # More than the device tier's budget.
    if number % 5 == 4:
        made.append(Item(f"{name}, sound", 24, joins=True))
    return made


@pytest.mark.parametrize(
    ("scheduler", "depth"),
    SCHEDULERS,
)
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_long_random_runs_keep_scheduler_and_worker_together(
    policy: str, scheduler: Any, depth: int
) -> None:
    """Extend, preempt, abort, reset, evict; the harness checks every step."""
    rng = random.Random(policy)
    engine = Engine(
        device=256, host=512, blocks=160, policy=policy, scheduler=scheduler, depth=depth
    )
    added = 0
    for _ in range(500):
        roll = rng.random()
        if roll < 0.25 and len(engine.scheduler.requests) < 8:
            items = [
                one
                for number in rng.sample(range(24), rng.randint(0, 3))
                for one in items_of(number)
            ]
            if items and rng.random() < 0.2:
                items.append(items[0])  # An item twice in a conversation.
            engine.add(request(f"r{added}", items, priority=rng.randrange(3)))
            added += 1
        elif roll < 0.29 and engine.scheduler.requests:
            engine.abort(rng.choice(sorted(engine.scheduler.requests)))
        elif roll < 0.30:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        elif roll < 0.305 and not engine.busy:
            engine.reset()
        elif engine.busy:
            engine.step()
    engine.run()
    assert added > 50
    assert engine.loaded
    # The budget, one item that passes through it, and sounds that could not wait.
    assert engine.most_device <= (256 + 600 + 4 * 24) * EMBEDDING


def test_an_item_larger_than_the_budget_is_served() -> None:
    engine = Engine(device=256, host=2048)
    engine.add(request("a", [Item("huge", 700)]), request("b", [Item("also huge", 800)]))
    engine.run()
    assert sorted(engine.encoded) == ["also huge", "huge"]
    assert engine.most_device <= 800 * EMBEDDING
    engine.step()
    assert not engine.device


def test_two_videos_with_sound_larger_than_the_budget_do_not_wait_for_each_other() -> None:
    engine = Engine(device=256, host=256, slots=8)
    for name in "abcd":
        engine.add(request(name, [Item(f"{name}1", 250), Item(f"{name}2", 40, joins=True)]))
    engine.run(most=60)
    assert len(engine.encoded) == 8


@pytest.mark.parametrize(
    ("scheduler", "depth"),
    SCHEDULERS,
)
@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("sizes", [[[100, 100, 120]], [[100, 90], [110, 70, 130], [40, 150, 20]]])
def test_a_drafter_that_reads_ahead_gets_an_item_beside_the_one_before_it(
    sizes: list[list[int]], ahead: int, scheduler: Any, depth: int
) -> None:
    """However many requests hold an item each, and whatever room the next ones need."""
    engine = Engine(device=150, host=1, slots=8, scheduler=scheduler, depth=depth, read_ahead=ahead)
    # None passes through.
    engine.manager._largest_item = 150
    for number, segments in enumerate(sizes):
        items = [Item(f"{number}/{place}", size) for place, size in enumerate(segments)]
        engine.add(request(str(number), items))
    engine.run(most=100)
    assert len(engine.encoded) == sum(map(len, sizes))
    # One request at a time has what it uses, and the item after that, beyond the budget.
    assert engine.most_device <= (150 + 130 + 110) * EMBEDDING


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_step_goes_to_others_while_an_item_waits_for_room_that_is_about_to_be_freed(
    ahead: int,
) -> None:
    """Without a drafter the first item is freed once the step that has computed it has ended."""
    engine = Engine(device=150, host=1, scheduler=MMExtScheduler, depth=2, read_ahead=ahead)
    engine.manager._largest_item = 150
    engine.add(request("video", [Item("one", 100), Item("two", 100)]))
    engine.step()
    # It has more to do than the video, which therefore goes first.
    engine.add(request("text", [], text=600))
    engine.step()
    assert engine.scheduler.requests["video"].num_computed_tokens == (108 if not ahead else 216)
    assert engine.scheduler.requests["text"].num_computed_tokens == (256 if not ahead else 147)
    engine.run(most=20)
    assert engine.encoded == ["one", "two"]
    assert engine.answers == {"video": 3, "text": 3}


@pytest.mark.parametrize("scheduler", [Scheduler, MMExtScheduler])
def test_so_does_one_whose_kv_is_found_until_the_drafter_reads_the_next_item(
    scheduler: Any,
) -> None:
    engine = Engine(device=150, host=1, scheduler=scheduler, read_ahead=1)
    engine.manager._largest_item = 150
    # The first item ends with the first token of a block.
    items = [Item("one", 6 * BLOCK + 1 - 8), Item("two", 120)]
    engine.add(request("first", items, begins="same"))
    engine.run()
    again = request("again", items, begins="same")
    blocks, *_ = engine.scheduler.kv_cache_manager.get_computed_blocks(again)
    engine.scheduler.kv_cache_manager.evict_blocks({blocks.get_block_ids()[0][6]})
    engine.add(again)
    engine.run(most=50)
    assert engine.found == 6 * BLOCK


@pytest.mark.parametrize("scheduler", [Scheduler, MMExtScheduler])
@pytest.mark.parametrize("host", [1, 2048])
def test_a_request_does_not_wait_for_room_that_its_own_later_items_take(
    scheduler: Any, host: int
) -> None:
    """The middle one is there when the step begins, and makes way for the first."""
    engine = Engine(device=367, host=host, scheduler=scheduler)
    engine.add(request("before", [Item("middle", 300)]))
    engine.run()
    engine.add(request("all", [Item("first", 178), Item("middle", 300), Item("last", 165)]))
    engine.run(most=60)
    assert engine.answers["all"] == 3


def test_what_the_device_lost_is_loaded_and_not_encoded_again() -> None:
    engine = Engine(device=256, host=2048)
    for turn in range(3):
        for number in range(6):
            engine.add(request(f"{turn}/{number}", [Item(f"video {number}", 200)]))
            engine.run()
        engine.scheduler.reset_prefix_cache()
    assert len(engine.encoded) == 6
    assert len(engine.loaded) >= 10


def test_host_hits_spend_no_encoder_budget() -> None:
    engine = Engine(device=512, host=2048, encoder_tokens=200, chunk=1024)
    for number in range(4):
        engine.add(request(f"before {number}", [Item(f"video {number}", 200)]))
        engine.run()
    engine.scheduler.reset_prefix_cache()
    # All four, and one that has to be encoded, in one step.
    for key in list(engine.device):
        engine.manager._cache.drop(key)
        del engine.manager._embeds[key], engine.device[key]
    engine.encoded.clear()
    items = [Item(f"video {number}", 200) for number in (0, 1)]
    engine.add(request("again", [*items, Item("new", 40)]))
    engine.step()
    assert sorted(engine.loaded) == ["video 0", "video 1"]
    assert engine.encoded == ["new"]
    engine.run()


def test_a_request_preempted_in_its_own_pass_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With priorities vLLM may take back what it has just scheduled: it is never encoded."""
    taken_back = 0
    for blocks in range(20, 30):
        engine = Engine(device=256, blocks=blocks, policy="priority", chunk=128, slots=8)
        engine.scheduler.scheduler_config.long_prefill_token_threshold = 64
        manager = engine.manager
        free = manager.free

        def watched(one: Request, manager: Any = manager, free: Any = free) -> None:
            nonlocal taken_back
            taken_back += one.request_id in manager._fresh.values()
            free(one)

        monkeypatch.setattr(manager, "free", watched)
        items = [Item(f"video {number}", 30) for number in range(9)]
        engine.add(request("low", items, priority=5, answer=2))
        engine.step()
        engine.add(*(request(f"high {number}", [], answer=30) for number in range(4)))
        engine.run()
    assert taken_back


def test_an_item_is_encoded_though_all_that_a_pass_scheduled_it_for_were_preempted() -> None:
    engine = Engine(policy="priority", blocks=30, slots=8)
    asked = [Item("video", 20)]
    # They begin, but what two of them ask about is encoded in no step yet.
    engine.scheduler.max_num_encoder_input_tokens = 0
    for one in (
        request("first", asked, priority=6),
        request("second", asked, priority=5),
        request("urgent", [], text=424),
    ):
        engine.add(one)
        engine.step()
    engine.scheduler.max_num_encoder_input_tokens = 1024
    assert len(engine.scheduler.running) == 3
    engine.step()
    # Both had been scheduled when the third one took their blocks.
    assert engine.preempted == 2
    assert not engine.encoded
    engine.run()
    assert set(engine.encoded) == {"video"}


@pytest.mark.parametrize("scheduler", [Scheduler, MMExtScheduler])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_requests_that_begin_in_one_step_share_what_it_encodes(policy: str, scheduler: Any) -> None:
    sizes = {"device": 8192, "host": 8192, "blocks": 4000, "chunk": 4096, "encoder_tokens": 8192}
    engine = Engine(policy=policy, slots=8, scheduler=scheduler, **sizes)
    items = [Item(f"item {number}", 100) for number in range(6)]
    engine.add(*(request(str(number), items) for number in range(6)))
    engine.step()
    assert len(engine.scheduler.running) > 1
    engine.run()
    assert len(engine.encoded) == len(items)


def test_what_a_pass_without_tokens_did_not_encode_is_saved_when_it_is() -> None:
    engine = Engine(policy="priority")
    manager, connector = engine.manager, engine.connector
    first = request("a", [Item("video", 100)])
    assert manager.can_allocate(first, 0, 1000, 0)
    manager.allocate(first, 0)
    connector.update_state_after_alloc(first, 0)
    manager.free(first)
    # Nothing else to do: a pass that takes back all it scheduled.
    engine.step()
    engine.add(request("b", [Item("video", 100)]))
    engine.run()
    assert connector.has_cache_item("video")


def test_new_weights_make_everything_be_encoded_again() -> None:
    engine = Engine(device=256, host=2048)
    engine.add(request("a", [Item("video", 100)]))
    engine.run()
    engine.reset()
    engine.scheduler.reset_prefix_cache()
    engine.add(request("b", [Item("video", 100)]))
    engine.run()
    assert engine.encoded == ["video", "video"]


def test_an_evicted_item_that_is_cached_again_in_the_same_pass_is_not_reported() -> None:
    engine = Engine(device=256)
    manager = engine.manager
    first, second = request("a", [Item("x", 200)]), request("b", [Item("y", 200)])
    assert manager.can_allocate(first, 0, 1000, 0)
    manager.allocate(first, 0)
    manager.get_freed_mm_hashes()
    manager.free(first)
    assert manager.can_allocate(second, 0, 1000, 0)
    manager.allocate(second, 0)
    manager.free(second)
    assert manager.can_allocate(first, 0, 1000, 0)
    manager.allocate(first, 0)
    assert manager.get_freed_mm_hashes() == ["y"]
    manager.check_integrity()


def test_a_load_that_another_request_relies_on_outlives_a_preemption() -> None:
    engine = Engine(policy="priority")
    manager, connector = engine.manager, engine.connector
    connector._tier.allocated("x", 100, 1.0, "earlier", 0)
    connector._tier.plan({"earlier": [0]})
    first, second = request("a", [Item("x", 20)]), request("b", [Item("x", 20)])
    for one in (first, second):
        one.status = RequestStatus.RUNNING
        # The second cannot rely on what is about to be done for the first.
        assert not manager.check_and_update_cache(one, 0)
        assert manager.can_allocate(one, 0, 1000, 0)
        manager.allocate(one, 0)
        connector.update_state_after_alloc(one, 0)
    manager.free(first)
    assert manager.check_and_update_cache(second, 0)
    assert connector._tier.plan({}).loads == ("x",)
    manager.check_integrity()


@pytest.mark.parametrize("scheduler", [Scheduler, MMExtScheduler])
def test_a_name_reused_for_an_item_of_another_size_ends_that_request_alone(scheduler: Any) -> None:
    engine = Engine(device=100, host=2048, scheduler=scheduler)
    engine.add(request("first", [Item("name", 60)]))
    engine.run()
    # The device has no room for both.
    engine.add(request("second", [Item("other", 90)]))
    engine.run()
    engine.add(request("third", [Item("name", 50)]), request("fourth", [Item("name", 60)]))
    engine.run()
    assert engine.encoded == ["name", "other"]
    assert engine.answers["third"] == 0
    assert engine.answers["fourth"] == 3
