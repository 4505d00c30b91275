"""The waiting queue: what a step looks at, and that nobody is lost however many wait."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_harness import Play, make_scheduler, request
from vllm.v1.request import Request, RequestStatus

from vllm_mm_ext.adapters.names.scheduler_names import QUEUE_METHODS
from vllm_mm_ext.adapters.scheduler.queue import LOOKED_AT, ArrangedQueue, Ranking
from vllm_mm_ext.policies.scheduler.step_plan import Rank
from vllm_mm_ext.tools.bench.scheduler_step import measure

MOST_LOOKED_AT = 3 * LOOKED_AT


# No deadline: the machine may be busy.
@given(st.lists(st.tuples(st.integers(0, 20), st.one_of(st.none(), st.integers(0, 9)))))
def test_a_ranking_is_sorted_whatever_changes(changes: list[tuple[int, int | None]]) -> None:
    ranking = Ranking()
    known: dict[int, tuple[int, int]] = {}
    for key, value in changes:
        if value is not None:
            known[key] = (value, key)
            ranking.place(key, known[key])
        elif key in known:
            del known[key]
            ranking.drop(key)
        expected = sorted(known, key=known.__getitem__)
        assert list(ranking) == expected
        assert all((one in ranking) == (one in known) for one in range(21))
        assert len(ranking) == len(known)


class Numbered(int):
    """Stands for a request; every third has media."""

    @property
    def mm_features(self) -> list[int]:
        """Its media."""
        return [0] * (self % 3 == 0)


def numbered(ranks: dict[int, int] | None = None) -> ArrangedQueue:
    """A queue of numbers, in the order of coming; ranks are as given, or the number."""
    return ArrangedQueue(
        lambda one: (0.0, one), lambda one: rank_of(one, (ranks or {}).get(one, one))
    )


def rank_of(number: int, work: int) -> Rank:
    return (1, 0, work, (0.0, number))


def waits_for_a_grammar(name: str) -> Request:
    """A text whose answer is bound by a grammar that is not compiled yet."""
    one = request(name, answer=2)
    one.structured_output_request = SimpleNamespace(grammar=None)
    one.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    return one


def compiled(*requests: Request) -> None:
    for one in requests:
        one.structured_output_request = None
        one.status = RequestStatus.WAITING


def looked_at(queue: ArrangedQueue) -> list[Any]:
    """What a step looks at."""
    return queue.to_look_at()[0]


@pytest.mark.parametrize("seed", range(40))
def test_nobody_is_lost_or_twice_in_the_queue(seed: int) -> None:
    rng = random.Random(seed)
    queue, inside, coming = numbered(), set[int](), itertools.count()
    outside: list[int] = []
    for _ in range(30):
        action = rng.choice(["add", "back", "remove", "step", "step"])
        if action == "add":
            new = [Numbered(next(coming)) for _ in range(rng.randint(1, 200))]
            for one in new:
                queue.add_request(one)
            inside.update(new)
        elif action == "back" and outside:
            queue.prepend_request(outside[-1])
            inside.add(outside.pop())
        elif action == "remove":
            gone = set(itertools.islice(inside, rng.randint(0, 40)))
            queue.remove_requests(gone | {Numbered(-1)})
            inside -= gone
        elif action == "step":
            step(queue, inside, outside, rng)
        assert set(queue) == inside
        assert len(list(queue)) == len(queue) == len(inside)
        assert bool(queue) == bool(inside)


def step(queue: ArrangedQueue, inside: set[int], outside: list[int], rng: random.Random) -> None:
    """What vLLM does in a step: skip some, take some, put some back, and the skipped ones."""
    looked = looked_at(queue)
    assert len(looked) == len(set(looked)) <= MOST_LOOKED_AT
    for one in looked:
        queue.looked_at(one, rank_of(one, rng.randint(0, 3)))
    shown = looked[:: rng.randint(1, 3)]
    with queue.showing(shown):
        assert list(queue) == shown
        assert len(queue) == len(inside)
        if outside and rng.random() < 0.5:
            queue.prepend_request(outside[-1])
            inside.add(outside.pop())
        skipped = []
        while queue and rng.random() < 0.95:
            one = queue.peek_request()
            assert queue.pop_request() == one
            if rng.random() < 0.5:
                inside.discard(one)
                outside.append(one)
            else:
                skipped.append(one)
        queue.prepend_requests(reversed(skipped))
        assert len(queue) == len(inside)


def test_of_a_long_queue_the_best_and_the_first_to_come_of_each_kind_are_looked_at() -> None:
    many = 2000
    # The later, the better.
    queue = numbered({one: many - one for one in range(many)})
    for one in range(many):
        queue.add_request(Numbered(one))
    looked = looked_at(queue)
    assert set(range(0, 3 * LOOKED_AT, 3)) <= set(looked)
    assert {n for n in range(LOOKED_AT) if n % 3} <= set(looked)
    assert set(range(many - LOOKED_AT, many)) <= set(looked)
    assert len(looked) <= MOST_LOOKED_AT


def test_who_turns_out_to_be_better_comes_to_the_front() -> None:
    queue = numbered()
    for one in range(1000):
        queue.add_request(Numbered(one))
    queue.looked_at(Numbered(700), rank_of(700, -1))
    assert looked_at(queue)[0] == 700
    assert queue.peek_request() == 700


def test_the_queue_has_what_vllm_asks_of_one() -> None:
    assert not ArrangedQueue.__abstractmethods__
    assert all(hasattr(ArrangedQueue, name) for name in QUEUE_METHODS)


def test_looking_at_a_request_reports_no_cache_hits() -> None:
    scheduler = make_scheduler(slots=1)
    manager = scheduler.kv_cache_manager
    manager.enable_kv_cache_events = manager.block_pool.enable_kv_cache_events = True
    play = Play(scheduler)
    play.add(request("first", items=[512] * 2, digest="same", prompt=5, answer=100))
    for _ in range(5):
        play.step()
    again = request("again", items=[512] * 2, digest="same", prompt=5)
    again.kv_cache_report_mode = "full"
    play.add(again)
    manager.take_events()
    for _ in range(60):
        play.step()
    assert scheduler._prompts.need(again, play.now).computed > 1000
    # No more than what "first" itself stores as it grows.
    assert sum(len(event.block_hashes) for event in manager.take_events()) < 10


def test_a_run_of_requests_that_cannot_get_on_hides_nobody() -> None:
    play = Play(make_scheduler(slots=16, settings={"aging_s": 0.02}))
    slow = [waits_for_a_grammar(f"slow{number}") for number in range(3 * LOOKED_AT)]
    quick = [waits_for_a_grammar(f"quick{number}") for number in range(LOOKED_AT)]
    play.add(*slow, *quick)
    for _ in range(20):
        play.step()
    compiled(*quick)
    play.add(request("text", answer=2))
    for _ in range(20):
        play.step()
    # Nothing but these would have run.
    assert all(play.timings[one.request_id].ended is not None for one in quick)
    assert play.timings["text"].ended is not None
    compiled(*slow)
    play.run(most=100)


def test_who_could_not_get_on_for_a_while_keeps_its_place() -> None:
    play = Play(make_scheduler(slots=2))
    play.add(request("decodes", answer=100))
    play.step()
    bound = [waits_for_a_grammar(f"bound{number}") for number in range(2 * LOOKED_AT)]
    play.add(*[request(f"long{n}", text=1500, answer=20) for n in range(2 * LOOKED_AT)])
    play.add(*bound)
    for _ in range(10):
        play.step()
    compiled(*bound)
    play.add(*[request(f"later{number}", answer=2) for number in range(2 * LOOKED_AT)])
    play.run(most=1000)
    began = {name: timing.tokens[0] for name, timing in play.timings.items()}
    later = min(began[name] for name in began if name.startswith("later"))
    assert max(began[one.request_id] for one in bound) < later


class Counting:
    """Counts what is looked at in a scheduler's steps."""

    def __init__(self, scheduler: Any) -> None:
        self.looked = self.walked = 0
        self._need = scheduler._prompts.need
        self._handle = scheduler._handle_blocked_waiting_request
        scheduler._prompts.need = self.need
        scheduler._handle_blocked_waiting_request = self.handle

    def need(self, *args: Any) -> Any:
        self.looked += 1
        return self._need(*args)

    def handle(self, *args: Any) -> Any:
        self.walked += 1
        return self._handle(*args)


def test_a_step_looks_at_as_many_however_many_wait() -> None:
    scheduler = make_scheduler(slots=256)
    play = Play(scheduler)
    play.add(request("decodes", answer=100_000))
    play.step()
    play.add(*[request(f"v{number}", items=[16] * 4) for number in range(1000)])
    counting = Counting(scheduler)
    for _ in range(10):
        counting.looked = counting.walked = 0
        play.step()
        assert 0 < counting.looked <= MOST_LOOKED_AT + len(scheduler.running)
        assert counting.walked <= MOST_LOOKED_AT
        needed = sum(
            one.tokens
            for waits in scheduler.requests.values()
            for one in scheduler._prompts.need(waits, play.now).items
        )
        assert scheduler._prompts.backlog == needed


@pytest.mark.parametrize("plugin", [False, True])
def test_the_benchmark_times_every_step(plugin: bool) -> None:
    spent = measure(3, plugin=plugin, steps=4)
    assert len(spent.schedule_us) == len(spent.update_us) == 4
    assert min(spent.schedule_us) > 0


def test_text_and_media_that_are_encoded_are_found_in_a_crowd() -> None:
    scheduler = make_scheduler(slots=64, blocks=65536)
    play = Play(scheduler)
    play.add(request("first", items=[512] * 3, digest="known", answer=200, prompt=9))
    for _ in range(20):
        play.step()
    crowd = [request(f"v{number}", items=[512] * 3, answer=4) for number in range(600)]
    play.add(*crowd[:300])
    play.add(*[request(f"t{number}", answer=2) for number in range(20)])
    play.add(request("again", items=[512] * 3, digest="known", answer=2, prompt=9))
    play.add(*crowd[300:])
    play.run(until=play.now + 3.0)
    for name in (*[f"t{number}" for number in range(20)], "again"):
        assert play.timings[name].tokens, name
    assert any(not play.timings[one.request_id].tokens for one in crowd)
