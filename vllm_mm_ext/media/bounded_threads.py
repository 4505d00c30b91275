"""Threads for blocking calls that may never return."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from vllm_mm_ext.errors import BusyError, no_room

T = TypeVar("T")


class BoundedThreads:
    """Threads of their own for calls of one kind: one that hangs holds up no call of another kind.

    For one event loop.

    Args:
        most: Calls at a time.
        name: Of the threads.
        cause: What the server waits for when all threads are taken, for the error.

    Attributes:
        pool: The threads.
    """

    def __init__(self, most: int, name: str, cause: str) -> None:
        self.pool = ThreadPoolExecutor(most, thread_name_prefix=name)
        self._free = asyncio.Semaphore(most)
        self._cause = cause

    async def run(self, call: Callable[[], T], max_wait_s: float) -> T:
        """The result of a call. If the caller is cancelled, the call goes on and keeps its thread.

        Args:
            call: What a thread does.
            max_wait_s: Seconds to wait for a thread.

        Raises:
            BusyError: Calls that do not return have taken all threads, or no thread can start.
        """
        try:
            async with asyncio.timeout(max_wait_s):
                await self._free.acquire()
        except TimeoutError:
            raise BusyError(f"The server waits for {self._cause}. Try again later.") from None
        try:
            running = self.pool.submit(call)
        except RuntimeError:
            self._free.release()
            raise no_room("no thread can start") from None
        running.add_done_callback(partial(self._done, asyncio.get_running_loop()))
        return await asyncio.wrap_future(running)

    def _done(self, loop: AbstractEventLoop, _: Future[Any]) -> None:
        with suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(self._free.release)
