"""Tasks share a bound on bytes; none waits for ever, and none that holds room waits at all."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.media.fetch.byte_gate import ByteGate, NoRoomError, Room

BOUND = 100


@dataclass(frozen=True)
class Job:
    """One task: what it asks first, what it asks for more at each tick, and if it gives up."""

    size: int
    growth: tuple[int, ...]
    gives_up: bool


JOBS = st.lists(
    st.builds(
        Job,
        size=st.integers(1, 150),
        growth=st.lists(st.integers(0, 60), max_size=5).map(tuple),
        gives_up=st.booleans(),
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=150, deadline=None)
@given(jobs=JOBS)
def test_the_bound_holds_and_all_get_through_whoever_grows_or_gives_up(jobs: list[Job]) -> None:
    gate = ByteGate(BOUND)
    inside: list[Room] = []
    done: list[int] = []
    refused: list[int] = []

    def check() -> None:
        # The gate counts those it let in, which run a little later.
        assert gate.used >= sum(room.num_bytes for room in inside)
        assert sum(room.num_bytes for room in inside[1:]) <= BOUND

    async def work(number: int, job: Job) -> None:
        async with gate.room(job.size) as room:
            inside.append(room)
            try:
                check()
                for more in job.growth:
                    fits = gate.used + more <= BOUND
                    grown = room.grow(more)
                    assert grown == (fits or room is inside[0])
                    check()
                    if not grown:
                        refused.append(number)
                        return
                    await asyncio.sleep(0)
            finally:
                inside.remove(room)
        done.append(number)

    async def main() -> None:
        tasks = [asyncio.create_task(work(number, job)) for number, job in enumerate(jobs)]
        await asyncio.sleep(0)
        for task, job in zip(tasks, jobs, strict=True):
            if job.gives_up:
                task.cancel()
                await asyncio.sleep(0)
        for task, job in zip(tasks, jobs, strict=True):
            if not job.gives_up:
                await task
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert gate.used == 0
    assert {n for n, job in enumerate(jobs) if not job.gives_up} <= {*done, *refused}


async def test_waiting_ends_with_the_patience_and_leaves_nothing_behind() -> None:
    gate = ByteGate(BOUND)
    async with gate.room(BOUND):
        for _ in range(2):
            with pytest.raises(NoRoomError):
                async with gate.room(1, patience_s=0.01):
                    raise AssertionError("there was no room")
        assert gate.used == BOUND
    async with gate.room(BOUND, patience_s=60):
        assert gate.used == BOUND
    assert gate.used == 0


async def test_a_timeout_inside_is_not_taken_for_a_lack_of_room() -> None:
    gate = ByteGate(BOUND)
    with pytest.raises(TimeoutError):
        async with gate.room(1, patience_s=60):
            raise TimeoutError
    assert gate.used == 0
