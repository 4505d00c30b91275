"""Concurrent work that ends together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def all_or_none(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in the order of ``work``, which runs at once, each in a task and context of its own.

    The first error, or the caller's cancellation, ends what still runs, and is raised as it is.
    """
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        await _end(tasks)
        raise
    finally:
        # The error leads to this frame and on to all that the work had in hand. None of it may
        # wait for the garbage collector, so this frame must not lead back to the error, as tasks
        # do (and those that ``asyncio.TaskGroup`` leaves in its own frames).
        tasks.clear()


async def _end(tasks: list[asyncio.Task[T]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
