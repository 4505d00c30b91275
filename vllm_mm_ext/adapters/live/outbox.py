"""The events on their way to one client, bounded in bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from vllm_mm_ext.live.effects import Close

# Characters that may wait for a client that does not read. An answer of 1,000 tokens has 0.3
# million.
MOST_WAITING = 4 << 20


class SlowReaderError(Exception):
    """A client reads so slowly that more events wait for it than may."""


class Outbox:
    """A queue of events as text, and of the close that ends it.

    Args:
        most: When so many characters wait, no other event may. One that comes before may be of any
            length.

    Attributes:
        waiting: Characters that wait now.
    """

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._most = most
        self._texts: deque[str] = deque()
        self.waiting = 0
        self._close: Close | None = None
        self._changed = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Whether the close has been put in; what is put in later is not sent."""
        return self._close is not None

    def put(self, text: str) -> None:
        """Put an event behind the others.

        Raises:
            SlowReaderError: Too many characters wait.
        """
        if self._close is not None:
            return
        if self.waiting >= self._most:
            raise SlowReaderError
        self._texts.append(text)
        self.waiting += len(text)
        self._changed.set()

    def close(self, close: Close) -> None:
        """Let the socket be closed once all that waits is sent; only the first close counts."""
        if self._close is None:
            self._close = close
            self._changed.set()

    def drop(self) -> None:
        """Forget what waits, but for the event that is being sent."""
        while len(self._texts) > 1:
            self.waiting -= len(self._texts.pop())

    async def send_all(self, send: Callable[[str], Awaitable[None]]) -> Close:
        """Send what comes, in order, until the close, which is returned.

        Args:
            send: Returns once the text is on its way.
        """
        while True:
            while self._texts:
                await send(self._texts[0])
                # It waits until then: a socket takes a text only when there is room for it.
                self.waiting -= len(self._texts.popleft())
            if self._close is not None:
                return self._close
            self._changed.clear()
            await self._changed.wait()
