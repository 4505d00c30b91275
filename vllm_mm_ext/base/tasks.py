"""Work that ends with whoever waits for it: tasks that end together, and work in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


async def all_or_none(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently, each in a task and a context of its own.

    The first error cancels all other tasks, as does the cancellation of the caller. Either is
    raised, unchanged, once all tasks have ended.

    Args:
        work: The coroutines.

    Returns:
        Their results, in the order of ``work``.
    """
    tasks: list[asyncio.Task[T]] = []
    try:
        for one in work:
            tasks.append(asyncio.create_task(one))
        return await asyncio.gather(*tasks)
    finally:
        # The error's traceback refers to this frame, and through it to everything the tasks held.
        # The tasks refer to the error. If this frame kept the tasks, that would be a reference
        # cycle, which only the garbage collector frees. ``asyncio.TaskGroup`` leaves such cycles.
        try:
            await _end(tasks)
        finally:
            tasks.clear()


async def _end(tasks: list[asyncio.Task[T]]) -> None:
    """Cancel the tasks that still run and wait until all have ended.

    A cancellation of the caller meanwhile is raised after that.
    """
    cancelled = False
    for task in tasks:
        if not task.cancelling():
            task.cancel()
    while left := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


async def to_its_end(work: Future[T]) -> T:
    """Result of work in a thread; who is cancelled waits until nothing is done any more.

    Args:
        work: As an executor's ``submit`` returns it.
    """
    done = asyncio.wrap_future(work)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        if not work.cancel():
            while not done.done():
                await asyncio.wait([done])
            done.exception()  # Else asyncio complains that nobody looked.
        raise
