"""Concurrent work that ends together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def all_or_none(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in the order of ``work``, which runs at once, each in a task and context of its own.

    The first error, or the caller's cancellation, ends what still runs, and is raised as it is once
    all work has ended.
    """
    tasks: list[asyncio.Task[T]] = []
    try:
        for one in work:
            tasks.append(asyncio.create_task(one))
        return await asyncio.gather(*tasks)
    finally:
        # The error's traceback leads to this frame and on to all that the work had in hand. If
        # this frame still held the tasks, which hold the error, only the garbage collector would
        # free all that. ``asyncio.TaskGroup`` leaves such cycles in its own frames.
        try:
            await _end(tasks)
        finally:
            tasks.clear()


async def _end(tasks: list[asyncio.Task[T]]) -> None:
    """Cancel what still runs and wait until all has ended, also when the caller is cancelled."""
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
