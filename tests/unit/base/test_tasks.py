"""Concurrent work ends together, and what failed keeps nothing alive."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from vllm_mm_ext.base.tasks import all_or_none


class Payload:
    """What some work has in hand."""


class FailedError(Exception):
    """The work's own."""


@pytest.fixture(autouse=True)
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def turns(count: int) -> None:
    """Let the event loop go round so many times: unlike time, that is the same on any machine."""
    for _ in range(count):
        await asyncio.sleep(0)


async def waits(ended: list[int], payload: Payload, count: int) -> None:
    """Work that only ends by cancellation, and takes some turns to do so."""
    try:
        await asyncio.Event().wait()
    finally:
        await turns(count)
        ended.append(count)
        del payload


async def fails(payload: Payload) -> str:
    """Work that fails after the others have begun."""
    await turns(5)
    raise FailedError(str(payload))


async def fail_beside_others(ended: list[int], payload: Payload) -> None:
    """The caller is given the error when all others have ended."""
    work = [waits(ended, payload, 10), fails(payload), waits(ended, payload, 50)]
    with pytest.raises(FailedError):
        await all_or_none(work)


async def be_cancelled(ended: list[int], payload: Payload) -> None:
    """The caller is cancelled, and goes on when all work has ended."""
    task = asyncio.create_task(all_or_none([waits(ended, payload, 10), waits(ended, payload, 50)]))
    await turns(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def be_cancelled_after_a_failure(ended: list[int], payload: Payload) -> None:
    """The caller is cancelled while it waits for the others to end."""
    work = [waits(ended, payload, 10), fails(payload), waits(ended, payload, 50)]
    task = asyncio.create_task(all_or_none(work))
    await turns(30)
    assert ended == [10]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_results_come_in_the_order_of_the_work() -> None:
    async def after(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    async def ask() -> tuple[list[float], list[float]]:
        return await all_or_none(map(after, (0.02, 0.0, 0.01))), await all_or_none([])

    assert asyncio.run(ask()) == ([0.02, 0.0, 0.01], [])


@pytest.mark.parametrize("case", [fail_beside_others, be_cancelled, be_cancelled_after_a_failure])
def test_work_that_does_not_succeed_ends_and_leaves_nothing(
    case: Callable[[list[int], Payload], Coroutine[Any, Any, None]],
) -> None:
    async def ask() -> None:
        payload = Payload()
        gone = weakref.ref(payload)
        ended: list[int] = []
        await asyncio.create_task(case(ended, payload))
        assert ended == [10, 50]
        del payload
        await asyncio.sleep(0)
        assert gone() is None

    asyncio.run(ask())
