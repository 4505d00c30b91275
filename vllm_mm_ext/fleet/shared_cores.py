"""The clock of a simulated server whose work may want more cores than it has."""

from __future__ import annotations

import heapq
import math


class SharedCores:
    """A clock that goes slower while more threads work than there are cores.

    All work of the server is told, and ends, on its own clock: while threads want more cores than
    there are, all of them are slower alike.

    Args:
        cores: Cores of the server; infinity: its work never waits for one.

    Attributes:
        engine: Threads of the engine that work now.
    """

    def __init__(self, cores: float = math.inf) -> None:
        self._cores = cores
        self._now = self._own = 0.0
        self.engine = 0.0
        # Threads beside the engine's now, and times of the own clock at which these change.
        self._threads = 0.0
        self._changes: list[tuple[float, float]] = []

    def work(self, begins: float, ends: float, threads: float = 1.0) -> None:
        """Note work beside the engine's.

        Args:
            begins: When it begins, on the own clock; not before now.
            ends: When it ends, on the own clock.
            threads: Cores that it keeps busy.
        """
        if self._cores < math.inf and ends > begins:
            heapq.heappush(self._changes, (begins, threads))
            heapq.heappush(self._changes, (ends, -threads))

    def own(self, now: float) -> float:
        """Go on to a time that is not before the last one; returns the own clock's time then."""
        if self._cores == math.inf:
            return now
        while self._changes:
            at, change = self._changes[0]
            reached = self._now + (at - self._own) / self._speed(self._threads)
            if reached > now:
                break
            heapq.heappop(self._changes)
            self._now, self._own = reached, at
            self._threads += change
        if not self._changes:
            # What rounding has left.
            self._threads = 0.0
        self._own += max(0.0, now - self._now) * self._speed(self._threads)
        self._now = now
        return self._own

    def when(self, own: float) -> float:
        """The time at which the own clock will show a time, if no more work comes."""
        if math.inf in (self._cores, own):
            return own
        now, at, threads = self._now, self._own, self._threads
        for change_at, change in sorted(self._changes):
            if change_at >= own:
                break
            now += (change_at - at) / self._speed(threads)
            at, threads = change_at, threads + change
        return now + max(0.0, own - at) / self._speed(threads)

    def _speed(self, threads: float) -> float:
        wanted = threads + self.engine
        return self._cores / wanted if wanted > self._cores else 1.0
