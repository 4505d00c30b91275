"""A private event loop in a daemon thread."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

from vllm_mm_ext.media.bounded_threads import BoundedThreads

T = TypeVar("T")


# Lookups of host names that wait for name servers at the same time.
_LOOKUPS = 64
# Seconds that a lookup waits for a thread, far longer than where name servers answer.
_LOOKUP_WAIT_S = 2.0


class _Loop(asyncio.SelectorEventLoop):
    """Looks host names up in threads of its own: dead name servers hold up no other blocking call.

    Args:
        lookups: Those threads.
    """

    def __init__(self, lookups: BoundedThreads) -> None:
        super().__init__()
        self._lookups = lookups

    async def getaddrinfo(self, host: Any, port: Any, **hints: int) -> list[Any]:
        """See ``AbstractEventLoop.getaddrinfo``.

        Raises:
            BusyError: Name servers that do not answer have taken all threads.
        """
        look_up = partial(socket.getaddrinfo, host, port, **hints)
        return await self._lookups.run(look_up, _LOOKUP_WAIT_S)


class LoopThread:
    """Runs coroutines on one long-lived event loop, whichever loop or thread asks.

    Downloads then share connections between callers on different loops, and hashing a body does
    not hold up the caller's loop.

    Coroutines run in an empty context (``contextvars``): callers share work, and the context of
    the first caller is no business of the others.

    Args:
        name: Of the thread and of those for blocking calls.
        workers: Threads for blocking calls (``asyncio.to_thread``).

    Attributes:
        loop: The event loop.
    """

    def __init__(self, name: str, workers: int = 16) -> None:
        self._name = name
        self._bounded: list[BoundedThreads] = []
        self.loop = _Loop(self.threads(_LOOKUPS, "dns", "the name servers of too many other hosts"))
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self.loop.set_default_executor(self._executor)
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start ``coroutine`` from any thread; cancelling the future cancels it."""
        return Context().run(asyncio.run_coroutine_threadsafe, coroutine, self.loop)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Result of ``coroutine``, which is cancelled when the caller is."""
        if asyncio.get_running_loop() is self.loop:
            return await coroutine
        return await asyncio.wrap_future(self.submit(coroutine))

    def threads(self, most: int, name: str, cause: str) -> BoundedThreads:
        """Make threads for blocking calls of one kind, which end with the loop.

        Args:
            most, cause: See ``BoundedThreads``.
            name: Of the kind.
        """
        threads = BoundedThreads(most, f"{self._name}-{name}", cause)
        self._bounded.append(threads)
        return threads

    @property
    def pools(self) -> tuple[ThreadPoolExecutor, ...]:
        """All threads for blocking calls."""
        return self._executor, *(threads.pool for threads in self._bounded)

    def stop(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel what runs, run ``last``, end the thread and wait for its end."""
        self.submit(self._wind_down(last))
        # A garbage collection may call this on the thread itself, which cannot wait for itself.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _serve(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    async def _wind_down(self, last: Coroutine[Any, Any, None]) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await last
        finally:
            for pool in self.pools:
                pool.shutdown(wait=False)
            self.loop.stop()
