"""A bound on bytes that several tasks of one event loop hold at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class NoRoomError(Exception):
    """Nothing became free within the time a task was ready to wait."""


class Room:
    """What one task holds of a gate.

    Attributes:
        num_bytes: Bytes held.
    """

    def __init__(self, gate: ByteGate, num_bytes: int) -> None:
        self._gate = gate
        self.num_bytes = num_bytes

    def grow(self, num_bytes: int) -> bool:
        """Hold so many bytes more, at once or not at all.

        Nobody waits while holding room, so tasks that grow cannot lock each other out. The one
        that has been inside longest always may grow: somebody gets done.
        """
        return self._gate._grow(self, num_bytes)


class ByteGate:
    """Lets tasks through in their order while there is room for what they ask.

    One that asks for more than the bound goes through alone. All inside but the one that has been
    there longest hold no more than the bound together. Not for several event loops.

    Args:
        max_bytes: The bound.

    Attributes:
        max_bytes: The bound.
        used: Bytes held by those inside.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._queue: deque[tuple[Room, asyncio.Future[None]]] = deque()
        # In the order of entry; a dict serves as an ordered set.
        self._inside: dict[Room, None] = {}
        self.used = 0

    @asynccontextmanager
    async def room(self, num_bytes: int, patience_s: float | None = None) -> AsyncIterator[Room]:
        """Wait for room, and hold it for the body of the ``async with``.

        Args:
            num_bytes: Bytes to hold from the start.
            patience_s: Seconds to wait at most; None for no limit.

        Raises:
            NoRoomError: There was no room within ``patience_s``.
        """
        room = Room(self, num_bytes)
        try:
            async with asyncio.timeout(patience_s):
                await self._enter(room)
        except TimeoutError:
            raise NoRoomError from None
        try:
            yield room
        finally:
            self._leave(room)

    async def _enter(self, room: Room) -> None:
        turn = asyncio.get_running_loop().create_future()
        entry = (room, turn)
        self._queue.append(entry)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # Let in at the very moment it gave up.
                self._leave(room)
            elif entry in self._queue:
                self._queue.remove(entry)
                self._admit()
            raise

    def _leave(self, room: Room) -> None:
        del self._inside[room]
        self.used -= room.num_bytes
        self._admit()

    def _admit(self) -> None:
        while self._queue and (not self._inside or self._fits(self._queue[0][0].num_bytes)):
            room, turn = self._queue.popleft()
            if not turn.cancelled():
                self._inside[room] = None
                self.used += room.num_bytes
                turn.set_result(None)

    def _grow(self, room: Room, num_bytes: int) -> bool:
        if not self._fits(num_bytes) and room is not next(iter(self._inside)):
            return False
        room.num_bytes += num_bytes
        self.used += num_bytes
        return True

    def _fits(self, num_bytes: int) -> bool:
        return self.used + num_bytes <= self.max_bytes
