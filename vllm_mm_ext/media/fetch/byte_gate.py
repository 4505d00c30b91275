"""The media budget: a bound on the media bytes that all requests of a process hold in memory.

What counts, from when to when:

- An encoded file (HTTP, local file or data URL alike) counts from the moment its bytes are read
  until the last user of the file lets go of it.
- Decoded frames and sound count from before they are decoded in a worker until the last view of
  them is gone: while they wait for vLLM's preprocessing too.
- What one of the two media caches keeps counts in that cache's own budget instead, and counts here
  again if the cache evicts it while somebody still uses it.

So all media together take at most the media budget plus the budgets of the caches, plus what the
oldest request may take beyond that (below), plus media that older requests shared with later ones.

Why nobody waits for ever:

- A request waits for nothing else while it waits for bytes: no connection, thread or decode worker
  is held meanwhile. What it does hold are bytes: a request with several videos holds one file while
  it waits for the next, and a file while it waits for room for the frames.
- Requests are numbered in the order in which they first ask. Bytes go to the waiting request with
  the lowest number, so no later request passes an earlier one.
- The request with the lowest number of those that are not done never waits: it gets bytes even
  beyond the budget. So it gets done, whatever the others hold; then the next one is the oldest.
- Work that several requests share (``SingleFlight``) waits with the lowest number of all requests
  that wait for it, whichever began it (priority inheritance).
- A request whose media cannot fit into the budget together is refused as too large, which bounds
  what the oldest request takes beyond the budget by the budget itself. A single item larger than
  the budget passes when its request is the oldest.
- Nobody waits longer than ``max_wait_s``: then the request is refused as busy, and its client sends
  it again. Where nobody would do so (``LLM``, `vllm run-batch`), it is infinite.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from vllm_mm_ext.errors import BusyError, MediaTooLargeError
from vllm_mm_ext.media.fetch.byte_lease import Account, Lease


class RequestTooLargeError(MediaTooLargeError):
    """All media of a request together are more than the budget; a part of them may not be."""


class Claim:
    """One request's place in the order of those that share the budget.

    It ends with :meth:`end`, or when nobody refers to it any more. Made by ``MediaBudget.claim``.
    """

    def __init__(self, budget: MediaBudget) -> None:
        self._budget = budget
        self._account = Account()
        self._number = math.inf
        # The requests that wait for work that this one began. Weak: two requests may wait for each
        # other's work. With the number of works for which each waits.
        self._heirs: weakref.WeakKeyDictionary[Claim, int] = weakref.WeakKeyDictionary()
        self._ended = False

    async def acquire(self, num_bytes: int, *, beside: int = 0, sure: int | None = None) -> Lease:
        """Wait for bytes.

        Args:
            num_bytes: How many; an upper estimate where the real number is not known.
            beside: Of the bytes this request holds, those that belong to the same media item.
            sure: Where the number is a guess: the part of it that is needed in any case. Only this
                part makes the request too large, and the lease may have no more.

        Returns:
            The bytes. The caller releases them, or has their lifetime do so (``Lease.follow``).

        Raises:
            BusyError: They did not become free in time.
            RequestTooLargeError: With the request's other media they are more than the budget.
        """
        return await self._budget._acquire(
            _Waiter(self, num_bytes, beside, num_bytes if sure is None else sure)
        )

    @property
    def max_wait_s(self) -> float:
        """Seconds that the request may wait for others."""
        return self._budget.max_wait_s

    def lease(self) -> Lease:
        """A lease of no bytes, to grow."""
        return Lease(self._budget, self._account)

    def grow(self, lease: Lease, num_bytes: int, spare: int = 0) -> bool:
        """Add bytes to one of this request's leases at once, or not at all.

        Args:
            lease: Of this request.
            num_bytes: How many.
            spare: How many more to add, as far as there is room.

        Returns:
            Whether there was room. There is none for a new lease while older requests wait.
        """
        return self._budget._grow(self, lease, num_bytes, spare)

    def joined_by(self, other: Claim) -> None:
        """Let work of this request wait with the number of ``other``, if that is lower.

        Args:
            other: A request that waits for work that this one began.
        """
        if other is not self:
            self._budget._join(self, other)

    def left_by(self, other: Claim) -> None:
        """Take back one call of ``joined_by``: the work is done, or ``other`` has given it up."""
        if other is not self:
            self._budget._post(partial(self._part, other))

    def end(self) -> None:
        """The request needs no more bytes; those it holds stay counted until they are released."""
        self._budget._post(self._end)

    def __del__(self) -> None:
        if not self._ended and self._number < math.inf:
            self._budget._post(partial(self._budget._forget, self._number))

    # --- under the budget's lock ------------------------------------------------------------------

    def _enter(self) -> None:
        if self._number == math.inf and not self._ended:
            self._number = next(self._budget._numbers)
            self._budget._live[self._number] = None

    def _end(self) -> None:
        self._ended = True
        self._budget._forget(self._number)

    def _part(self, other: Claim) -> None:
        count = self._heirs.pop(other, 0) - 1
        if count > 0:
            self._heirs[other] = count

    def _rank(self) -> float:
        """The lowest number of the requests that wait for this one's work, itself included."""
        lowest, seen, left = math.inf, {id(self)}, [self]
        while left:
            claim = left.pop()
            if not claim._ended:
                lowest = min(lowest, claim._number)
            for heir in claim._heirs:
                if id(heir) not in seen:
                    seen.add(id(heir))
                    left.append(heir)
        return lowest


class _Waiter:
    """One call of ``Claim.acquire``."""

    def __init__(self, claim: Claim, num_bytes: int, beside: int, sure: int) -> None:
        self.claim = claim
        self.num_bytes = num_bytes
        self.sure = sure
        self.beside = beside
        self.lease = claim.lease()
        self.granted = False
        # Bytes that the request would hold, if they are too many to wait for. Not an error: its
        # traceback would lead back here.
        self.too_many = 0
        self.loop = asyncio.get_running_loop()
        self.decided = asyncio.Event()

    def wake(self) -> None:
        """Let the caller see what was decided."""
        try:
            self.loop.call_soon_threadsafe(self.decided.set)
        except RuntimeError:
            # The loop is closed: nobody is left to release them.
            self.lease._add(-self.lease.num_bytes)


class MediaBudget:
    """Hands out bytes to the requests of a process. For any thread and any event loop.

    Args:
        max_bytes: The budget.
        max_wait_s: Seconds a request may wait before it is refused as busy; infinite for no end.

    Attributes:
        max_bytes, max_wait_s: As given.
    """

    def __init__(self, max_bytes: int, max_wait_s: float = 30.0) -> None:
        self.max_bytes = max_bytes
        self.max_wait_s = max_wait_s
        self._used = 0
        self._peak = 0
        self._refused = 0
        self._numbers = itertools.count()
        # Numbers of the requests that asked and have not ended, ascending; an ordered set.
        self._live: dict[float, None] = {}
        # Those that wait, in the order in which they asked; an ordered set.
        self._waiters: dict[_Waiter, None] = {}
        self._lock = threading.Lock()
        self._posted: deque[Callable[[], None]] = deque()

    @property
    def used(self) -> int:
        """Bytes that count at present."""
        return self._used

    def claim(self) -> Claim:
        """A place for a request. It gets its number when the request first asks for bytes."""
        return Claim(self)

    def stats(self) -> dict[str, int]:
        """Bytes that count now and at most so far, those that wait, and those refused as busy."""
        return {
            "max_bytes": self.max_bytes,
            "used_bytes": self._used,
            "peak_bytes": self._peak,
            "waiting": len(self._waiters),
            "refused": self._refused,
        }

    async def _acquire(self, waiter: _Waiter) -> Lease:
        with self._locked():
            waiter.claim._enter()
            self._waiters[waiter] = None
        try:
            async with asyncio.timeout(self.max_wait_s):
                # Without a turn of the event loop where it is decided already.
                if not (waiter.granted or waiter.too_many):
                    await waiter.decided.wait()
        except TimeoutError:
            self._leave(waiter)
        except BaseException:
            self._leave(waiter)
            waiter.lease.release()
            raise
        if waiter.granted:
            return waiter.lease
        if waiter.too_many:
            raise RequestTooLargeError(
                f"The media of this request take at least {waiter.too_many} bytes together, "
                f"encoded and decoded, past the limit of {self.max_bytes} "
                "(media.cache.in_flight_mb).",
                value=waiter.too_many,
            )
        self._refused += 1
        raise BusyError(
            f"The server is busy with other media: {waiter.num_bytes} more bytes found no room "
            f"within {self.max_wait_s:g} s. All media being worked on take at most "
            f"{self.max_bytes} bytes (media.cache.in_flight_mb). Try again later."
        )

    def _leave(self, waiter: _Waiter) -> None:
        with self._locked():
            self._waiters.pop(waiter, None)

    def _grow(self, claim: Claim, lease: Lease, num_bytes: int, spare: int) -> bool:
        with self._locked():
            claim._enter()
            rank = claim._rank()
            passes = not lease.num_bytes and any(w.claim._rank() <= rank for w in self._waiters)
            if passes or not self._may_have(rank, num_bytes):
                return False
            if self._too_many(claim, num_bytes, lease.num_bytes):
                return False
            free = max(self.max_bytes - self._used - num_bytes, 0)
            lease._add(num_bytes + min(spare, free))
            self._peak = max(self._peak, self._used)
            return True

    def _join(self, claim: Claim, other: Claim) -> None:
        with self._locked():
            other._enter()
            claim._heirs[other] = claim._heirs.get(other, 0) + 1

    # --- under the lock ---------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiters:
            # The first of equals: the items of one request in the order in which it asked.
            waiter = min(self._waiters, key=lambda waiter: waiter.claim._rank())
            waiter.too_many = self._too_many(waiter.claim, waiter.sure, waiter.beside)
            if not waiter.too_many:
                num_bytes = waiter.num_bytes
                if waiter.sure < num_bytes:
                    # Beside the request's other media there may never be room for the whole guess.
                    left = self.max_bytes - waiter.claim._account.held
                    num_bytes = max(waiter.sure, min(num_bytes, left))
                if not self._may_have(waiter.claim._rank(), num_bytes):
                    return
                waiter.lease._add(num_bytes)
                waiter.granted = True
            del self._waiters[waiter]
            waiter.wake()

    def _may_have(self, rank: float, num_bytes: int) -> bool:
        oldest = next(iter(self._live), None)
        return self._used + num_bytes <= self.max_bytes or rank == oldest

    def _too_many(self, claim: Claim, num_bytes: int, beside: int) -> int:
        """Bytes that a request would hold, if it may never hold so many; else 0."""
        held = claim._account.held
        if held <= beside or held + num_bytes <= self.max_bytes:
            return 0
        return held + num_bytes

    def _forget(self, number: float) -> None:
        self._live.pop(number, None)

    # --- the lock ---------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._catch_up()
            yield
            self._settle()
        self._post()

    def _post(self, change: Callable[[], None] | None = None) -> None:
        """Make a change now, or leave it to whoever has the lock.

        Objects may be freed anywhere, in a garbage collection too that interrupts a thread which
        has the lock. So a release of bytes never waits for the lock.
        """
        if change is not None:
            self._posted.append(change)
        # Looked at again after each turn: the next change may have come just before the release.
        while self._posted and self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        self._catch_up()
        self._admit()
        self._peak = max(self._peak, self._used)

    def _catch_up(self) -> None:
        while self._posted:
            self._posted.popleft()()
