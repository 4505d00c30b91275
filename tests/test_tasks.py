"""Concurrent work ends together, and what failed keeps nothing alive."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from vllm_mm_ext.tasks import all_or_none


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


async def waits(ended: list[float], payload: Payload, seconds: float) -> None:
    """Work that only ends by cancellation, and takes some time to do so."""
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(seconds)
        ended.append(seconds)
        del payload


async def fails(payload: Payload) -> str:
    """Work that fails after a moment."""
    await asyncio.sleep(0.001)
    raise FailedError(str(payload))


async def fail_beside_others(ended: list[float], payload: Payload) -> None:
    """The caller is given the error when all others have ended."""
    work = [waits(ended, payload, 0.01), fails(payload), waits(ended, payload, 0.05)]
    with pytest.raises(FailedError):
        await all_or_none(work)


async def be_cancelled(ended: list[float], payload: Payload) -> None:
    """The caller is cancelled, and goes on when all work has ended."""
    task = asyncio.create_task(
        all_or_none([waits(ended, payload, 0.01), waits(ended, payload, 0.05)])
    )
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def be_cancelled_after_a_failure(ended: list[float], payload: Payload) -> None:
    """The caller is cancelled while it waits for the others to end."""
    work = [waits(ended, payload, 0.01), fails(payload), waits(ended, payload, 0.05)]
    task = asyncio.create_task(all_or_none(work))
    await asyncio.sleep(0.02)
    assert ended == [0.01]
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
    case: Callable[[list[float], Payload], Coroutine[Any, Any, None]],
) -> None:
    async def ask() -> None:
        payload = Payload()
        gone = weakref.ref(payload)
        ended: list[float] = []
        await asyncio.create_task(case(ended, payload))
        assert ended == [0.01, 0.05]
        del payload
        await asyncio.sleep(0)
        assert gone() is None

    asyncio.run(ask())
