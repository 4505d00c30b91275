"""Ten minutes of adversarial traffic on vLLM's real scheduler class with a simulated clock."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from scheduler_harness import Costs, Play, make_scheduler, request
from vllm.v1.request import Request, RequestStatus

from vllm_mm_ext.adapters.scheduler.prompts import Arrival
from vllm_mm_ext.policies.scheduler.step_plan import AGED_AFTER

MINUTES = 10
AGING_S = 30.0
# A large model on a small device, so that ten minutes are few steps.
COSTS = Costs(step_s=0.040, prefill_s=80e-6, encoder_s=400e-6)
# Takes 5 s of the model alone.
LONG = [512] * 20


def flood(seed: int = 0) -> Iterator[tuple[float, Request]]:
    """Now and then a long video, and without pause whatever goes before it.

    In turn: clips, a little shorter each time; prompts and answers of all lengths; clips and text
    of higher priority; and what the engine does in many seconds, all at once.
    """
    rng = random.Random(seed)
    number, now = 0, 0.0
    while now < 60 * MINUTES:
        number += 1
        phase = int(now / 60) % 4
        if number % 10 == 1:
            yield now, request(f"long{number}", items=LONG, answer=8, priority=9)
        if phase == 0:
            items = [256] * (8 - number % 8)
            yield now, request(f"clip{number}", items=items, answer=6)
            now += rng.expovariate(1 / 1.25)
        elif phase == 1:
            text = 6_000 if number % 9 == 0 else rng.randint(8, 600)
            yield now, request(f"text{number}", text=text, answer=rng.randint(1, 40))
            now += rng.expovariate(1 / 0.8)
        elif phase == 2:
            items = [256] * rng.randint(0, 5)
            yield now, request(f"urgent{number}", items=items, answer=6, priority=-number % 5)
            now += rng.expovariate(1 / 1.1)
        else:
            for part in range(12):
                items = [512] * rng.randint(0, 6)
                yield now, request(f"burst{number}-{part}", items=items, answer=10)
            now += 16.0


class Watch:
    """Looks in each step who is let in past a request that no later one may pass."""

    def __init__(self, play: Play, aged_after_s: float) -> None:
        self.play = play
        self.aged_after_s = aged_after_s
        self.passed: list[tuple[str, str]] = []
        # The scheduler forgets who ended, perhaps in the step that let it in.
        self._came: dict[str, Arrival] = {}

    def add(self, one: Request, came: float) -> None:
        self.play.add(one, came=came)
        self._came[one.request_id] = self.play.scheduler._prompts.arrivals[one.request_id]

    def step(self) -> None:
        scheduler, now = self.play.scheduler, self.play.now
        kept = [one for one in scheduler.waiting if self._is_kept(one, now)]
        output = self.play.step()
        for new in output.scheduled_new_reqs:
            number = self._came[new.req_id].order
            self.passed += [
                (new.req_id, one.request_id)
                for one in kept
                # A request that waits for nothing but the encoder loses nothing to text.
                if (not one.mm_features or new.mm_features)
                and self._came[one.request_id].order < number
                and one in scheduler.waiting
            ]

    def _is_kept(self, one: Request, now: float) -> bool:
        waited = now - self._came[one.request_id].since
        return one.status == RequestStatus.PREEMPTED or waited >= self.aged_after_s


def run(
    coming: Iterable[tuple[float, Request]], aging_s: float, policy: str, *, blocks: int = 8192
) -> tuple[Play, Watch]:
    scheduler: Any = make_scheduler(
        slots=8,
        blocks=blocks,
        policy=policy,
        settings={"aging_s": aging_s, "target_itl_ms": 250.0},
    )
    play = Play(scheduler, COSTS)
    watch = Watch(play, AGED_AFTER * aging_s)
    left = deque(sorted(coming, key=lambda pair: pair[0]))
    while left or play.busy:
        while left and left[0][0] <= play.now:
            came, one = left.popleft()
            watch.add(one, came)
        if play.busy:
            watch.step()
        else:
            play.now = left[0][0]
    assert all(timing.ended is not None for timing in play.timings.values())
    return play, watch


def longest(play: Play) -> float:
    return max(timing.wait for timing in play.timings.values())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_nobody_waits_longer_than_the_aging_bound(policy: str, seed: int) -> None:
    play, watch = run(flood(seed), AGING_S, policy)
    assert play.now >= 60 * MINUTES - 20
    assert longest(play) <= AGING_S
    assert not watch.passed


@pytest.mark.parametrize("blocks", [750, pytest.param(900, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_nobody_waits_longer_where_blocks_are_so_few_that_requests_are_preempted(
    policy: str, seed: int, blocks: int
) -> None:
    """Of the largest requests one fits at a time; those that were preempted are not passed."""
    play, watch = run(flood(seed), AGING_S, policy, blocks=blocks)
    assert sum(len(output.preempted_req_ids or ()) for output in play.steps) > 5
    assert longest(play) <= AGING_S
    assert not watch.passed


def test_an_aged_video_that_lacked_blocks_is_encoded_before_later_videos() -> None:
    """Its blocks become free while later ones are half-encoded, and more of those wait."""
    coming = [
        (0.0, request("book", text=24_000, answer=76)),
        (2.5, request("video", items=[512] * 20)),
    ]
    coming += [(2.7, request(f"clip{number}", items=[512] * 7, answer=1)) for number in range(20)]
    play, watch = run(coming, AGING_S, "fcfs", blocks=2100)
    assert play.timings["video"].came + AGING_S / 2 < ended(play, "book")
    assert play.timings["video"].wait <= AGING_S
    assert not watch.passed


def test_blocks_are_kept_for_all_aged_requests_that_lack_them() -> None:
    """A text does not fit beside the video before it; what comes later leaves it none."""
    coming = [
        (0.0, request("book", text=12_000, answer=390)),
        (0.5, request("video", items=[512] * 20)),
        (0.6, request("text", text=10_500)),
    ]
    notes = [request(f"note{number}", text=950, answer=1000) for number in range(6)]
    coming += [(18.0 + number / 5, note) for number, note in enumerate(notes)]
    play, watch = run(coming, AGING_S, "fcfs", blocks=1024)
    assert play.timings["text"].came + AGING_S / 2 < ended(play, "book") < 18
    assert play.timings["text"].wait <= AGING_S
    assert not watch.passed


def ended(play: Play, name: str) -> float:
    found = play.timings[name].ended
    assert found is not None
    return found


def test_without_the_bound_somebody_would_wait_longer() -> None:
    """Otherwise the trace would prove nothing."""
    bounded, unbounded = (
        longest(run(flood(), aging_s, "priority")[0]) for aging_s in (AGING_S, 86_400.0)
    )
    assert unbounded > 1.1 * bounded
