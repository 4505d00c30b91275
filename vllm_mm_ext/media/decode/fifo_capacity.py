"""Sharing a capacity among those who ask for it, in the order in which they ask.

Plain bookkeeping without threads or clocks: the caller holds a lock and wakes those who wait.
"""

from __future__ import annotations

from collections import deque


class Share:
    """A part of a capacity that somebody asked for.

    Attributes:
        amount: How much of the capacity, in the capacity's unit.
        granted: The share may be used now; before that, its owner waits.
    """

    __slots__ = ("amount", "granted")

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.granted = False


class FifoCapacity:
    """Grants shares of a capacity strictly in the order in which they were asked for.

    The first share in the queue that does not fit makes all later shares wait, so nobody is passed
    for ever. A share larger than the whole capacity is granted when nothing else is in use.

    Args:
        capacity: How much may be in use at a time (worker processes, bytes...).

    Attributes:
        used: Sum of the granted shares that were not given back yet.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._queue: deque[Share] = deque()
        self.used = 0

    @property
    def waiting(self) -> int:
        """Shares that were asked for and not granted yet."""
        return len(self._queue)

    def ask(self, amount: int) -> Share:
        """Queue for a share; it may be granted at once."""
        share = Share(amount)
        self._queue.append(share)
        self._grant()
        return share

    def give_back(self, share: Share) -> None:
        """End a granted share, or take one that still waits out of the queue."""
        if share.granted:
            self.used -= share.amount
        else:
            self._queue.remove(share)
        self._grant()

    def _grant(self) -> None:
        while self._queue:
            head = self._queue[0]
            if self.used and self.used + head.amount > self._capacity:
                return
            self._queue.popleft()
            self.used += head.amount
            head.granted = True
