"""A bound on bytes that several tasks of one event loop hold at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteGate:
    """Lets tasks through in their order while there is room for what they announce.

    One that announces more than the bound goes through alone. Not for several event loops.

    Args:
        max_bytes: The bound.

    Attributes:
        used: Bytes announced by those inside.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.used = 0

    @asynccontextmanager
    async def room(self, num_bytes: int) -> AsyncIterator[None]:
        """Wait for room, and hold it for the body of the ``async with``."""
        await self._enter(num_bytes)
        try:
            yield
        finally:
            self.used -= num_bytes
            self._admit()

    async def _enter(self, num_bytes: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        entry = (num_bytes, turn)
        self._queue.append(entry)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # Let in at the very moment it gave up.
                self.used -= num_bytes
            elif entry in self._queue:
                self._queue.remove(entry)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._queue and self._fits(self._queue[0][0]):
            num_bytes, turn = self._queue.popleft()
            if not turn.cancelled():
                self.used += num_bytes
                turn.set_result(None)

    def _fits(self, num_bytes: int) -> bool:
        return not self.used or self.used + num_bytes <= self._max_bytes
