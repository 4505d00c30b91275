"""Ten minutes of adversarial traffic on vLLM's real scheduler class with a simulated clock."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from scheduler_harness import Costs, Play, make_scheduler, request
from vllm.v1.request import Request

from vllm_mm_ext.scheduler.order import promotion_s

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
    """Looks in each step who is let in past a promoted request."""

    def __init__(self, play: Play, promotion_s: float) -> None:
        self.play = play
        self.promotion_s = promotion_s
        self.passed = 0

    def step(self) -> None:
        scheduler, now = self.play.scheduler, self.play.now
        waited = {one.request_id: one for one in scheduler.waiting}
        output = self.play.step()
        for new in output.scheduled_new_reqs:
            came = scheduler._reader.arrivals.get(new.req_id, (now, 0))[1]
            for name, one in waited.items():
                since, number = scheduler._reader.arrivals.get(name, (now, 10**9))
                still = one in scheduler.waiting
                promoted = now - since >= self.promotion_s
                # A request that waits for nothing but the encoder loses nothing to text.
                loses = not one.mm_features or bool(new.mm_features)
                if promoted and still and loses and number < came:
                    self.passed += 1


def run(aging_s: float, policy: str) -> tuple[Play, int]:
    scheduler: Any = make_scheduler(
        slots=8, policy=policy, settings={"aging_s": aging_s, "target_itl_ms": 250.0}
    )
    play = Play(scheduler, COSTS)
    watch = Watch(play, promotion_s(aging_s))
    coming = sorted(flood(), key=lambda pair: pair[0])
    place = 0
    while place < len(coming) or play.busy:
        while place < len(coming) and coming[place][0] <= play.now:
            came, one = coming[place]
            play.add(one, came=came)
            place += 1
        if play.busy:
            watch.step()
        else:
            play.now = coming[place][0]
    assert all(timing.ended is not None for timing in play.timings.values())
    return play, watch.passed


def longest(play: Play) -> float:
    return max(timing.wait for timing in play.timings.values())


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_nobody_waits_longer_than_the_aging_bound(policy: str) -> None:
    play, passed = run(AGING_S, policy)
    assert play.now >= 60 * MINUTES - 20
    assert longest(play) <= AGING_S
    assert passed == 0


def test_without_the_bound_somebody_would_wait_longer() -> None:
    """Otherwise the trace would prove nothing."""
    assert longest(run(86_400.0, "priority")[0]) > AGING_S
