"""A private event loop in a daemon thread."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

from vllm_mm_ext.errors import BusyError

T = TypeVar("T")


# Lookups of host names that wait for name servers at the same time.
_LOOKUPS = 64
# Seconds that a lookup waits for a thread, far longer than where name servers answer.
_LOOKUP_WAIT_S = 2.0


class _Loop(asyncio.SelectorEventLoop):
    """Looks host names up in threads of its own: dead name servers hold up no other blocking call.

    Attributes:
        lookups: Those threads.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.lookups = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix=f"{name}-dns")
        self._free = asyncio.Semaphore(_LOOKUPS)

    async def getaddrinfo(self, host: Any, port: Any, **hints: int) -> list[Any]:
        """See ``AbstractEventLoop.getaddrinfo``.

        Raises:
            BusyError: Name servers that do not answer have taken all threads.
        """
        try:
            async with asyncio.timeout(_LOOKUP_WAIT_S):
                await self._free.acquire()
        except TimeoutError:
            raise BusyError(
                "The server waits for the name servers of too many other hosts. Try again later."
            ) from None
        lookup = self.lookups.submit(partial(socket.getaddrinfo, host, port, **hints))
        # A lookup keeps its thread when nobody waits for it any more.
        lookup.add_done_callback(self._looked_up)
        return await asyncio.wrap_future(lookup)

    def _looked_up(self, _: Future[Any]) -> None:
        with suppress(RuntimeError):  # The loop is closed.
            self.call_soon_threadsafe(self._free.release)


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
        self.loop = _Loop(name)
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

    @property
    def pools(self) -> tuple[ThreadPoolExecutor, ...]:
        """The threads for blocking calls and for lookups of host names."""
        return self._executor, self.loop.lookups

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
            self._executor.shutdown(wait=False)
            self.loop.lookups.shutdown(wait=False)
            self.loop.stop()
