"""Threads for blocking calls that may never return."""

from __future__ import annotations

import asyncio
import time
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
        self._moved = 0.0

    def note_progress(self) -> None:
        """A call gets on, so those that wait for its thread do not wait in vain. Thread-safe."""
        self._moved = time.monotonic()

    async def run(self, call: Callable[[], T], max_wait_s: float) -> T:
        """The result of a call. If the caller is cancelled, the call goes on and keeps its thread.

        Args:
            call: What a thread does.
            max_wait_s: Seconds to wait for a thread, from when a call last made progress.

        Raises:
            BusyError: Calls that do not return have taken all threads, or no thread can start.
        """
        if self._free.locked():
            await self._wait(max_wait_s)
        else:
            await self._free.acquire()
        try:
            running = self.pool.submit(call)
        except RuntimeError:
            self._free.release()
            raise no_room("no thread can start") from None
        running.add_done_callback(partial(self._done, asyncio.get_running_loop()))
        return await asyncio.wrap_future(running)

    async def _wait(self, max_wait_s: float) -> None:
        """Wait for a thread, in the order of calls."""
        began, waiting = time.monotonic(), asyncio.ensure_future(self._free.acquire())
        try:
            while not waiting.done():
                left = max(began, self._moved) + max_wait_s - time.monotonic()
                if left <= 0:
                    raise BusyError(f"The server waits for {self._cause}. Try again later.")
                await asyncio.wait([waiting], timeout=left)
        except BaseException:
            if not waiting.cancel():
                self._free.release()
            raise

    def _done(self, loop: AbstractEventLoop, _: Future[Any]) -> None:
        with suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(self._free.release)
