"""An LRU cache bounded in bytes, and concurrent calls that share one run (single-flight).

Both may be used from any thread and any event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from cachetools import Cache, LRUCache

from vllm_mm_ext.media.fetch.byte_gate import Claim, RequestTooLargeError
from vllm_mm_ext.media.fetch.byte_lease import Lease

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True)
class CacheStats:
    """Counters of a :class:`ByteBudgetCache` since it was made.

    Attributes:
        max_bytes: The budget.
        num_bytes: Bytes held now.
        entries: Entries held now.
        hits, misses: Calls of ``get`` that found a value, and that found none.
        evicted: Entries dropped to make room for others.
        uncacheable: Values refused because one alone is larger than the budget.
    """

    max_bytes: int
    num_bytes: int
    entries: int
    hits: int
    misses: int
    evicted: int
    uncacheable: int


class _CountingLRU(LRUCache[K, V]):
    """LRUCache that counts what it evicts and accounts for the bytes that it keeps.

    Args:
        maxsize, getsizeof: As of ``LRUCache``.
        lease_of: As of ``ByteBudgetCache``.
    """

    def __init__(
        self, maxsize: int, getsizeof: Callable[[V], int], lease_of: Callable[[V], Lease | None]
    ) -> None:
        super().__init__(maxsize, getsizeof)
        self.evicted = 0
        self._lease_of = lease_of

    def popitem(self) -> tuple[K, V]:
        item = super().popitem()
        self.evicted += 1
        return item

    def __setitem__(self, key: K, value: V) -> None:
        self.pop(key, None)  # Else the old value would leave without a call of __delitem__.
        super().__setitem__(key, value)
        if (lease := self._lease_of(value)) is not None:
            lease.count_in_cache(True)

    def __delitem__(self, key: K) -> None:
        value = Cache.__getitem__(self, key)
        super().__delitem__(key)
        if (lease := self._lease_of(value)) is not None:
            lease.count_in_cache(False)


class ByteBudgetCache(Generic[K, V]):
    """Least-recently-used cache bounded by the bytes of its values. Thread-safe.

    The bound is on what the cache keeps alive. A value that a request still uses when the cache
    evicts it lives on; its bytes then count in the media budget, if it has a lease.

    Args:
        max_bytes: The budget; 0 keeps nothing.
        size_of: Bytes of one value. It must not change while the value is cached.
        max_entries: Values kept at most; None for no limit. For values that hold something
            scarcer than memory (descriptors, mappings).
        lease_of: The lease of a value's bytes on the media budget, None for a value without one.
            Bytes count either there or here: here while the cache keeps the value.
    """

    def __init__(
        self,
        max_bytes: int,
        size_of: Callable[[V], int],
        *,
        max_entries: int | None = None,
        lease_of: Callable[[V], Lease | None] = lambda _: None,
    ) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        self.max_bytes = max_bytes
        self._size_of = size_of
        self._max_entries = max_entries
        self._entries: _CountingLRU[K, V] = _CountingLRU(max_bytes, size_of, lease_of)
        self._lock = threading.Lock()
        self._hits = 0
        self._misses = 0
        self._uncacheable = 0

    def get(self, key: K) -> V | None:
        """The value, now most recently used, or None. Counts a hit or a miss."""
        with self._lock:
            value = self._entries.get(key)
            if value is None:
                self._misses += 1
            else:
                self._hits += 1
            return value

    def put(self, key: K, value: V) -> bool:
        """Keep ``value``, evicting the least recently used. False if it exceeds the budget."""
        size = self._size_of(value)
        with self._lock:
            if size > self.max_bytes:
                self._uncacheable += 1
                self._entries.pop(key, None)
                return False
            self._entries[key] = value
            while self._max_entries is not None and len(self._entries) > self._max_entries:
                self._entries.popitem()
            return True

    def discard(self, key: K) -> None:
        """Forget ``key`` if it is there; not counted as an eviction."""
        with self._lock:
            self._entries.pop(key, None)

    def discard_where(self, unwanted: Callable[[K, V], bool]) -> int:
        """Forget the entries for which ``unwanted(key, value)`` holds; returns their number."""
        with self._lock:
            # Not ``items()``, which would make each entry the most recently used.
            found = [
                key for key in self._entries if unwanted(key, Cache.__getitem__(self._entries, key))
            ]
            for key in found:
                del self._entries[key]
        return len(found)

    def clear(self) -> None:
        """Forget everything; counters stay."""
        with self._lock:
            for key in list(self._entries):
                del self._entries[key]

    def __contains__(self, key: K) -> bool:
        """Membership without touching recency or counters."""
        with self._lock:
            return key in self._entries

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def stats(self) -> CacheStats:
        """A consistent snapshot of the counters."""
        with self._lock:
            return CacheStats(
                max_bytes=self.max_bytes,
                num_bytes=self._num_bytes(),
                entries=len(self._entries),
                hits=self._hits,
                misses=self._misses,
                evicted=self._entries.evicted,
                uncacheable=self._uncacheable,
            )

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if the accounting does not match the values held."""
        with self._lock:
            actual = sum(self._size_of(value) for value in self._entries.values())
            recorded = self._num_bytes()
            assert actual == recorded, f"{recorded} bytes recorded, {actual} held"
            assert actual <= self.max_bytes, f"{actual} bytes held, budget {self.max_bytes}"

    def _num_bytes(self) -> int:
        return int(self._entries.currsize)


class _FlightAbandonedError(Exception):
    """The shared work was cancelled while callers waited, e.g. because its event loop closed."""


class _Flight(Generic[V]):
    """One running call, the number of callers that wait for it, and the first caller's claim."""

    def __init__(self, loop: asyncio.AbstractEventLoop, claim: Claim | None) -> None:
        self.loop = loop
        self.claim = claim
        self.waiters = 0
        self.result: Future[V] = Future()
        # A running future cannot be cancelled, so the cancellation of one caller does not reach
        # the other callers.
        self.result.set_running_or_notify_cancel()
        self.task: asyncio.Task[V] | None = None


class SingleFlight(Generic[K, V]):
    """Concurrent calls with the same key share one run of the work.

    The work runs as a task of the first caller's event loop, in an empty context; callers may be on
    other loops and threads. The work is cancelled only when every caller has been cancelled. The
    result or error goes to the callers that wait at that moment and is not kept. If the loop that
    runs the work closes while callers of other loops wait, one of these starts the work again.

    The traceback of an error refers to everything the work held: encoded files, frames. A flight
    refers to its error. So no frame of such a traceback may keep a flight: that would be a
    reference cycle, and the files and frames would stay until the garbage collector runs.
    """

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[V]] = {}
        self._lock = threading.Lock()

    async def run(
        self, key: K, factory: Callable[[], Awaitable[V]], claim: Claim | None = None
    ) -> V:
        """Result of ``factory()``, or of the same key's call that is already running.

        Args:
            key: What the work is about.
            factory: Begins the work.
            claim: With which ``factory`` would wait for the media budget; the claim of the caller
                that began the work waits for all callers (``Claim.joined_by``) until they leave.
        """
        while True:
            flight = self._join_or_start(key, factory, claim)
            try:
                return await asyncio.wrap_future(flight.result)
            except _FlightAbandonedError:
                continue
            except RequestTooLargeError:
                # That of another request says nothing about this one.
                if flight.claim is claim:
                    raise
            finally:
                self._leave(key, flight, claim)
                del flight

    def __len__(self) -> int:
        """Number of calls running now."""
        with self._lock:
            return len(self._flights)

    def _join_or_start(
        self, key: K, factory: Callable[[], Awaitable[V]], claim: Claim | None
    ) -> _Flight[V]:
        loop = asyncio.get_running_loop()
        with self._lock:
            flight = self._flights.get(key)
            if flight is None or flight.loop.is_closed():
                flight = self._flights[key] = _Flight(loop, claim)
                # The work is nobody's own: context variables of the first caller (its options, its
                # trace) are not set in it.
                flight.task = loop.create_task(
                    self._fly(key, flight, factory), context=contextvars.Context()
                )
                flight.task.add_done_callback(lambda task: self._land(key, flight, task))
            elif claim is not None and flight.claim is not None:
                flight.claim.joined_by(claim)
            flight.waiters += 1
            return flight

    async def _fly(self, key: K, flight: _Flight[V], factory: Callable[[], Awaitable[V]]) -> V:
        try:
            return await factory()
        finally:
            # Before the result is known, so that no later caller joins a call that has finished.
            self._forget(key, flight)
            del flight

    def _land(self, key: K, flight: _Flight[V], task: asyncio.Task[V]) -> None:
        self._forget(key, flight)
        if task.cancelled():
            flight.result.set_exception(_FlightAbandonedError())
        elif (error := task.exception()) is not None:
            flight.result.set_exception(error)
        else:
            flight.result.set_result(task.result())

    def _leave(self, key: K, flight: _Flight[V], claim: Claim | None) -> None:
        if claim is not None and flight.claim is not None:
            flight.claim.left_by(claim)
        with self._lock:
            flight.waiters -= 1
            if flight.waiters or flight.result.done():
                return
            # Removed at once: a new caller must not join work that is being cancelled.
            if self._flights.get(key) is flight:
                del self._flights[key]
        if flight.task is not None and not flight.loop.is_closed():
            flight.loop.call_soon_threadsafe(flight.task.cancel)

    def _forget(self, key: K, flight: _Flight[V]) -> None:
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]
